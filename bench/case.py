"""One benchmark case, declared once; everything else (timing, checking, bytes, tables) follows from the declaration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

FORWARD, BOTH = "forward", "forward+backward"
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Missing(Exception):
    """A contestant that cannot take part; the message says why."""


@dataclass(frozen=True)
class Case:
    """An op at one shape.

    ``inputs(dtype)`` makes one set of fresh random arguments, on torch's default device of the moment. ``ours``,
    ``eager`` and each peer are called with them.
    ``eager`` is what a model does without fastllm, in the same steps and dtypes; it is also run under torch.compile.
    ``exact`` is the formula in whatever dtype it is given: with fp64 inputs it is what every result is checked against.
    A peer maps its name to a function that imports it and returns the callable, or raises Missing or ImportError.
    ``constants`` are the positions of inputs without a gradient. ``flops`` counts one forward pass; bytes need no
    counting by hand, as each input is read once and each output written once. ``length`` is the number of `shape` that
    sets this case apart from others of its op: cases that differ in nothing else are plotted against it.
    """

    op: str
    shape: str
    inputs: Callable[[torch.dtype], tuple[Any, ...]]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    exact: Callable[..., Any]
    peers: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    passes: tuple[str, ...] = (FORWARD, BOTH)
    constants: tuple[int, ...] = ()
    flops: int = 0
    length: int | None = None
    uncompiled: str = ""  # why torch.compile takes no part

    def label(self, dtype: torch.dtype, which: str) -> str:
        """What --only matches: "rms_norm 8192x4096 bf16 forward"."""
        return f"{self.op} {self.shape} {DTYPE_NAMES[dtype]} {which}"

    def contestants(self) -> dict[str, Callable[[], Callable[..., Any]]]:
        """Ours first, then eager, torch.compile and the other peers, each as a function that builds it."""
        return {
            "fastllm": lambda: self.ours,
            "eager": lambda: self.eager,
            "torch.compile": self._compiled,
            **self.peers,
        }

    def _compiled(self) -> Callable[..., Any]:
        if self.uncompiled:
            raise Missing(self.uncompiled)
        return torch.compile(self.eager, dynamic=False)
