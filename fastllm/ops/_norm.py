"""What the norms share: checks of the normalised input and its weights, and their promotion to one dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.ops import _check


def check_and_promote(x: Tensor, eps: float, **others: Tensor | None) -> list[Tensor | None]:
    """x and the other tensors ((C,) weights, or x's shape for "residual") in their promoted dtype, after all checks."""
    _check.is_floating("x", x)
    if x.dim() == 0:
        _check.has_rank_of_at_least("x", x, 1)
    _check.in_range("eps", eps, 0.0)
    dtype = x.dtype
    for name, other in others.items():
        if other is None:
            continue
        _check.is_floating(name, other)
        if name == "residual":
            if other.shape != x.shape:
                _check.has_shape(name, other, tuple(x.shape), "the shape of x")
        elif other.dim() != 1 or other.shape[0] != x.shape[-1]:
            _check.has_shape(name, other, tuple(x.shape[-1:]), "the last dimension of x")
        if other.device != x.device:
            _check.same_device(name, other, "x", x)
        if other.dtype != dtype:
            dtype = torch.promote_types(dtype, other.dtype)
    tensors = [x, *others.values()]
    return (
        tensors
        if all(t is None or t.dtype == dtype for t in tensors)
        else [None if t is None else t.to(dtype) for t in tensors]
    )
