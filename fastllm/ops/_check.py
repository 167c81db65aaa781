"""Argument checks shared by the ops: each failure names the argument, what it was and what was expected."""

from __future__ import annotations

import itertools
import numbers
from typing import Any

import torch

_INFINITE = (float("inf"), float("-inf"))


def shown(value: Any) -> str:
    """A value in a message, in one short line."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    line = " ".join(repr(value).split())
    return line if len(line) <= 60 else f"{line[:57]}..."


def is_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def is_floating(name: str, value: Any) -> None:
    is_tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got dtype {value.dtype}")


def is_mask(name: str, value: Any) -> None:
    is_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor, got {value.dtype} ({name}.bool() makes one of zeros and ones)")


def has_rank_of_at_least(name: str, value: torch.Tensor, rank: int) -> None:
    if value.dim() < rank:
        raise ValueError(
            f"{name} must have at least {rank} dimension{'s' * (rank > 1)}, got shape {tuple(value.shape)}"
        )


def has_shape(name: str, value: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """`meaning` says where the expected shape comes from, for example "the last dimension of x"."""
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)} ({meaning}), got {tuple(value.shape)}")


def same_device(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on one device, got {value.device} and {other.device}")


def apart(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """The two share no memory; elements between those of a strided view count as its own."""
    if value.untyped_storage().data_ptr() != other.untyped_storage().data_ptr() or not value.numel() * other.numel():
        return
    first, last = (
        (t.data_ptr(), t.data_ptr() + (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))) * t.element_size())
        for t in sorted((value, other), key=torch.Tensor.data_ptr)
    )
    if last[0] < first[1]:
        raise ValueError(f"{name} must not overlap {other_name} in memory, got two views of one storage")


def in_range(name: str, value: float, low: float, high: float = float("inf"), *, open_low: bool = False) -> None:
    """low <= value <= high, or low < value where `open_low`; an infinite bound must not be reached."""
    if type(value) is not float and (
        isinstance(value, bool)
        or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat, numbers.Real))  # NumPy's are Real
    ):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    above = value > low if open_low else value >= low
    if not above or not value <= high or value in _INFINITE:
        bounds = f"{'>' if open_low else '>='} {low}" + (f" and <= {high}" if high != float("inf") else "")
        raise ValueError(f"{name} must be a finite number {bounds}, got {value}")


def is_count(name: str, value: Any, least: int, meaning: str = "") -> None:
    """An integer of at least `least`; `meaning` says in brackets what that is."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an integer, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{meaning}, got {value}")


def values_of(value: torch.Tensor) -> list[Any] | None:
    """What a tensor of integers holds where that can be told without waiting for a device: None on a GPU, while compiling and
    for tensors that stand for others."""
    if value.device.type != "cpu" or type(value) is not torch.Tensor or torch.compiler.is_compiling():
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None
    return value.tolist()


def is_cu_seqlens(name: str, value: Any, other_name: str, other: torch.Tensor) -> int:
    """Where packed documents begin in the first dimension of `other`; returns how many there are."""
    is_tensor(name, value)
    tokens = other.shape[0]
    if value.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{name} must have shape (documents + 1,), got {tuple(value.shape)}")
    same_device(name, value, other_name, other)
    values = values_of(value) or [0, tokens]
    if values[0] != 0 or values[-1] != tokens or any(b < a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{name} must ascend from 0 to T = {tokens}, got {values}")
    return value.shape[0] - 1


def one_of(name: str, value: Any, valid: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, valid))}, got {shown(value)}")
