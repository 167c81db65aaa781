"""Layer normalisation (Ba et al., arXiv 1607.06450, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm.ops._norm import check_and_promote
from fastllm.ops._op import Op, vjp


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Normalises the last dimension: ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``, var biased.

    Args:
        x: (..., C), float32, bfloat16 or float16; float64 is served by the definition.
        weight, bias: (C,) or None. A dtype other than x's promotes the result.
        eps: added to the variance, >= 0.

    Returns:
        (..., C) in the promoted dtype. Differentiable in x, weight and bias, any number of times.

    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: shapes or devices do not match, or eps is negative.
    """
    x, weight, bias = check_and_promote(x, eps, weight=weight, bias=bias)  # type: ignore[assignment]
    return _layer_norm(x, weight, bias, eps)[0]


def _definition(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    mean = wide.mean(-1)
    centred = wide - mean.unsqueeze(-1)
    rstd = torch.rsqrt(centred.square().mean(-1) + eps)
    y = centred * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * weight.to(wide.dtype)
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(x.dtype), mean, rstd


def _fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean = x.new_empty(x.shape[:-1], dtype=wide)
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, torch.empty_like(mean)


def _backward_definition(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, ...]:
    grads = vjp(lambda x, w, b: _definition(x, w, b, eps)[0], (x, weight, bias), (grad_y,))
    return tuple(x.new_empty(0) if g is None else g for g in grads)


def _backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, ...]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, *(x.new_empty(0) if t is None else torch.empty_like(t) for t in (weight, bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None, None
    x, weight, bias, mean, rstd = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = _layer_norm_backward(grad_y, x, weight, bias, mean, rstd, ctx.eps)
    return grad_x, None if weight is None else grad_weight, None if bias is None else grad_bias, None


_layer_norm = Op(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)",
    _definition,
    fake=_fake,
    triton="layer_norm:forward",
    save=_save,
    backward=_backward,
    public=["layer_norm"],
)
_layer_norm_backward = Op(
    "layer_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, float eps)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward_definition,
    fake=_backward_fake,
    triton="layer_norm:backward",
)
