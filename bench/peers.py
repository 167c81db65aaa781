"""Other libraries as peers: each function imports one and returns what a case can call, or raises why it cannot."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.case import Missing


def liger(name: str, call: Callable[..., Any]) -> dict[str, Callable[[], Callable[..., Any]]]:
    """The peer "liger", which calls ``call(function, *arguments)`` with Liger-Kernel's function `name`."""

    def build() -> Callable[..., Any]:
        if not torch.cuda.is_available():
            importlib.import_module("liger_kernel")
            raise Missing("its Triton kernels need a GPU")
        function = getattr(importlib.import_module("liger_kernel.transformers.functional"), name)
        return lambda *arguments: call(function, *arguments)

    return {"liger": build}


def torch_rms_norm() -> Callable[..., Any]:
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)


def torch_chunked_loss() -> Callable[..., Any]:
    """torch's own chunked linear_cross_entropy, with the options it picks for the machine."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has none")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options)
