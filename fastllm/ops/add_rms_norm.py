"""Residual addition and RMS norm in one pass (arXiv 1910.07467, eq. 4, of a sum)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm.ops._norm import check_and_promote
from fastllm.ops._op import Op, vjp
from fastllm.ops.rms_norm import backward_fake, definition, fake


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``s = x + residual`` and ``s / sqrt(mean(s²) + eps) * (weight + weight_offset)``: each read and written once.

    Args:
        x, residual: (..., C), float32, bfloat16 or float16; float64 is served by the definition.
        weight: (C,) or None. eps, weight_offset: as in ``rms_norm``.

    Returns:
        (normed, s), both (..., C) in the promoted dtype of the inputs; s is rounded to it before it is normalised, as
        the two separate operations would. Differentiable in x, residual and weight, any number of times, through both
        outputs.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices do not match, or eps is negative.
    """
    x, residual, weight = check_and_promote(x, eps, residual=residual, weight=weight)  # type: ignore[assignment]
    return _add_rms_norm(x, residual, weight, eps, weight_offset)[:2]


def _definition(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, ...]:
    total = x + residual
    y, rstd = definition(total, weight, eps, weight_offset)
    return y, total, rstd


def _fake(x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> tuple[Tensor, ...]:
    y, rstd = fake(x, weight, eps, weight_offset)
    return y, torch.empty_like(y), rstd


def _backward_definition(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    def both(total: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        return definition(total, weight, eps, weight_offset)[0], total * 1

    grad_x, grad_weight = vjp(both, (total, weight), (grad_y, grad_sum))
    return grad_x, total.new_empty(0) if grad_weight is None else grad_weight


def _backward_fake(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    return backward_fake(grad_y, total, weight, rstd, eps, weight_offset)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, ctx.eps, ctx.weight_offset = inputs
    _, total, rstd = output
    ctx.save_for_backward(total, weight, rstd)
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_sum: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    total, weight, rstd = ctx.saved_tensors
    if grad_y is None:
        return grad_sum, grad_sum, None, None, None
    grad, grad_weight = _add_rms_norm_backward(grad_y, grad_sum, total, weight, rstd, ctx.eps, ctx.weight_offset)
    return grad, grad, None if weight is None else grad_weight, None, None


_add_rms_norm = Op(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset)"
    " -> (Tensor y, Tensor sum, Tensor rstd)",
    _definition,
    fake=_fake,
    triton="rms_norm:add_forward",
    save=_save,
    backward=_backward,
    public=["add_rms_norm"],
)
_add_rms_norm_backward = Op(
    "add_rms_norm_backward(Tensor grad_y, Tensor? grad_sum, Tensor sum, Tensor? weight, Tensor rstd, float eps,"
    " float weight_offset) -> (Tensor grad_x, Tensor grad_weight)",
    _backward_definition,
    fake=_backward_fake,
    triton="rms_norm:add_backward",
)
