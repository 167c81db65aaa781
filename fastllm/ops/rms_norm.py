"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops._op import Op, vjp


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0) -> Tensor:
    """Normalises the last dimension: ``y = x / sqrt(mean(x²) + eps) * (weight + weight_offset)``.

    Args:
        x: (..., C), float32, bfloat16 or float16; float64 is served by the definition.
        weight: (C,) or None for no scaling. A dtype other than x's promotes the result, as in PyTorch.
        eps: added to the mean square, > = 0.
        weight_offset: added to the weight; 1.0 gives Gemma's ``1 + weight``. Ignored without a weight.

    Returns:
        (..., C) in the promoted dtype of x and weight. Differentiable in x and weight, any number of times.

    Raises:
        TypeError: x or weight is not a floating-point tensor.
        ValueError: shapes or devices do not match, or eps is negative.
    """
    _check.is_floating("x", x)
    if x.dim() == 0:
        _check.has_rank_of_at_least("x", x, 1)
    _check.in_range("eps", eps, 0.0)
    if weight is not None:
        _check.is_floating("weight", weight)
        _check.has_shape("weight", weight, x.shape[-1:], "the last dimension of x")
        _check.same_device("weight", weight, "x", x)
        if weight.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, weight.dtype)
            x, weight = x.to(dtype), weight.to(dtype)
    return _rms_norm(x, weight, eps, weight_offset)[0]


def _definition(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + weight_offset)
    return y.to(x.dtype), rstd


def _fake(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    rstd_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[:-1], dtype=rstd_dtype)


def _backward_definition(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        return _definition(x, weight, eps, weight_offset)[0]

    grad_x, grad_weight = vjp(normed, (x, weight), (grad_y,))
    return grad_x, x.new_empty(0) if grad_weight is None else grad_weight


def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, x.new_empty(0) if weight is None else torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps, ctx.weight_offset = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None, None
    x, weight, rstd = ctx.saved_tensors
    grad_x, grad_weight = _rms_norm_backward(grad_y, x, weight, rstd, ctx.eps, ctx.weight_offset)
    return grad_x, None if weight is None else grad_weight, None, None


_rms_norm = Op(
    "rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset) -> (Tensor y, Tensor rstd)",
    _definition,
    fake=_fake,
    triton="rms_norm:forward",
    cuda=True,
    save=_save,
    backward=_backward,
    public=["rms_norm"],
)
_rms_norm_backward = Op(
    "rms_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor rstd, float eps, float weight_offset)"
    " -> (Tensor grad_x, Tensor grad_weight)",
    _backward_definition,
    fake=_backward_fake,
    triton="rms_norm:backward",
    cuda=True,
)
