"""Arithmetic over valid tokens, here and over ranks. What stands at masked positions, NaN included, reaches nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm.ops import _check


def saveable(*tensors: Any) -> list[Any]:
    """The tensors, some perhaps None, as autograd can save them: what torch.inference_mode made, in a rollout say, it does not
    take as it is."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return list(tensors)
    return [t.clone() if t is not None and t.is_inference() else t for t in tensors]


def check_tokens(mask: Any, **tensors: Any) -> None:
    """mask is a bool tensor, and each of `tensors` a floating-point one of its shape beside it."""
    _check.is_mask("mask", mask)
    for name, value in tensors.items():
        _check.is_floating(name, value)
        _check.has_shape(name, value, tuple(mask.shape), "that of mask")
        _check.same_device(name, value, "mask", mask)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def kept(x: Tensor, mask: Tensor, otherwise: float = 0.0) -> Tensor:
    """x in fp32 (fp64 stays), with `otherwise` where masked, in the gradient too."""
    return wide(x).masked_fill(~mask, otherwise)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """0-d mean over valid tokens; 0 where there is none."""
    return kept(x, mask).sum() / mask.sum().clamp(min=1)


def last_valid(mask: Tensor) -> Tensor:
    """(B, T) bool, True at the last valid token of each row that has one."""
    after = mask.flip(-1).cumsum(-1).flip(-1)  # valid tokens from here to the end
    return mask & (after == 1)


def sum_over_ranks(sums: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The element-wise sum over the ranks of `group` (None: all of them); one all-reduce."""
    if not (dist.is_available() and dist.is_initialized()):
        return sums
    sums = sums.clone()
    dist.all_reduce(sums, group=group)
    return sums


def device_of_ranks(group: dist.ProcessGroup | None) -> torch.device:
    """Where a number that is on no device yet can be reduced."""
    if dist.is_available() and dist.is_initialized() and "nccl" in dist.get_backend(group):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
