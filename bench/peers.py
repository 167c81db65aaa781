"""Other libraries as peers: each function imports one and returns what a case can call, or raises why it cannot."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.case import Missing

Peer = dict[str, Callable[[], Callable[..., Any]]]


def liger(name: str, call: Callable[..., Any]) -> Peer:
    """The peer "liger", which calls ``call(function, *arguments)`` with Liger-Kernel's function `name`."""
    return _on_gpu("liger", "liger_kernel.transformers.functional", name, call)


def flash_attn(path: str, call: Callable[..., Any]) -> Peer:
    """The peer "flash-attn": the function at `path`, "module:name", among the ops that this library has beside
    attention."""
    module, name = path.split(":")
    return _on_gpu("flash-attn", f"flash_attn.ops.triton.{module}", name, call)


def xformers_rms_norm() -> Callable[..., Any]:
    function = importlib.import_module("xformers.ops.rmsnorm").rms_norm
    return _for_gpu(lambda x, weight: function(x, weight, 1e-6))


def _on_gpu(label: str, module: str, name: str, call: Callable[..., Any]) -> Peer:
    def build() -> Callable[..., Any]:
        importlib.import_module(module.split(".")[0])  # is it there at all? its kernels may not import without a GPU
        if not torch.cuda.is_available():
            raise Missing("its Triton kernels need a GPU")
        function = getattr(importlib.import_module(module), name)
        return _for_gpu(lambda *arguments: call(function, *arguments))

    return {label: build}


def _for_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        if not arguments[0].is_cuda:
            raise Missing("its Triton kernels need a GPU")
        return function(*arguments)

    return checked


def torch_rms_norm() -> Callable[..., Any]:
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)


def torch_chunked_loss() -> Callable[..., Any]:
    """torch's own chunked linear_cross_entropy, with the options it picks for the machine."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has none")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options)
