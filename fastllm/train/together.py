"""What the processes of a run tell each other before they train; alone, a process agrees with itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from fastllm.errors import FastLLMError

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def everywhere(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks; they are pickled. Who has them knows that all have come so far."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def of_first(value: T) -> T:
    """The value that the first process has."""
    return everywhere(value)[0]


def agree(check: Callable[[], T], *, here: bool = True) -> T | None:
    """Runs `check` where `here` is true; what it raises in any process, all raise, so that none waits for one that has ended."""
    result, problem = None, None
    if here:
        try:
            result = check()
        except FastLLMError as error:
            problem = error
    for found in everywhere(problem):
        if found is not None:
            raise found
    return result


# Of gloo, of NCCL, and of the store by which both find each other.
_LOST = ("closed by peer", "reset by peer", "Broken pipe", "remote process exit", "Connection was likely closed")


def is_lost(error: BaseException | None) -> bool:
    """Whether it is what a process meets where another one, with which it exchanges something, has ended."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _LOST)
