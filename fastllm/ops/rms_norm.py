"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467, eq. 4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops._norm import check_and_promote
from fastllm.ops._op import Op, vjp


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, weight_offset: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """Normalises the last dimension: ``y = x / sqrt(mean(x²) + eps) * (weight + weight_offset)``.

    Args:
        x: (..., C), float32, bfloat16 or float16; float64 is served by the definition.
        weight: (C,) or None for no scaling. A dtype other than x's promotes the result, as in PyTorch.
        eps: added to the mean square, >= 0.
        weight_offset: added to the weight; 1.0 gives Gemma's ``1 + weight``. Ignored without a weight.
        out: a contiguous tensor of x's shape and the result's dtype to write into, instead of a fresh one. Not
            differentiable, as everywhere in PyTorch.

    Returns:
        (..., C) in the promoted dtype of x and weight; `out` where it was given. Differentiable in x and weight, any
        number of times.

    Raises:
        TypeError: x, weight or out is not a floating-point tensor.
        ValueError: shapes, devices or out's dtype do not match, eps is negative, or a gradient is required with out.
    """
    x, weight = check_and_promote(x, eps, weight=weight)  # type: ignore[assignment]
    if out is None:
        return _rms_norm(x, weight, eps, weight_offset)[0]
    _check.is_floating("out", out)
    if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous() or out.device != x.device:
        raise ValueError(
            f"out must be a contiguous {x.dtype} tensor of shape {tuple(x.shape)} on {x.device}, got {out.dtype} "
            f"{tuple(out.shape)} with strides {out.stride()} on {out.device}"
        )
    if not torch.compiler.is_compiling():
        if out.data_ptr() != x.data_ptr() or not x.is_contiguous():  # over x itself it may write: row by row
            _check.apart("out", out, "x", x)
        if weight is not None:
            _check.apart("out", out, "weight", weight)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, out)):
        raise ValueError("out does not support gradients: detach the tensors or call under torch.no_grad()")
    _rms_norm_out(x, weight, eps, weight_offset, out)
    if not torch.compiler.is_compiling() and not out.is_inference():  # so that autograd knows what it saved has changed
        torch.autograd.graph.increment_version(out)
    return out


def definition(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    wide = x.double() if x.dtype == torch.float64 else x.float()
    rstd = torch.rsqrt(wide.square().mean(-1) + eps)
    y = wide * rstd.unsqueeze(-1)
    if weight is not None:
        y = y * (weight.to(wide.dtype) + weight_offset)
    return y.to(x.dtype), rstd


def fake(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    rstd_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(x.shape[:-1], dtype=rstd_dtype)


def _backward_definition(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    def normed(x: Tensor, weight: Tensor | None) -> Tensor:
        return definition(x, weight, eps, weight_offset)[0]

    grad_x, grad_weight = vjp(normed, (x, weight), (grad_y,))
    return grad_x, x.new_empty(0) if grad_weight is None else grad_weight


def backward_fake(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, x.new_empty(0) if weight is None else torch.empty_like(weight)


def _out_definition(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out: Tensor) -> None:
    out.copy_(definition(x, weight, eps, weight_offset)[0])


def _out_fake(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out: Tensor) -> None:
    return None


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
    definition,
    fake=fake,
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
    fake=backward_fake,
    triton="rms_norm:backward",
    cuda=True,
)
_rms_norm_out = Op(
    "rms_norm_out(Tensor x, Tensor? weight, float eps, float weight_offset, Tensor(a!) out) -> ()",
    _out_definition,
    fake=_out_fake,
    triton="rms_norm:forward_out",
)
