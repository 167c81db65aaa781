"""Loads the CUDA C++ extension; its kernels register themselves as torch.ops.fastllm.<op>_cuda for CUDA tensors.

They serve where ``use_backend("cuda")`` asks for them: Triton stays the default for CUDA tensors.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

_BUILD = "with nvcc on PATH, FASTLLM_BUILD_CUDA=1 pip install --no-build-isolation --force-reinstall --no-deps ."


def unavailable() -> str:
    """Why the CUDA C++ kernels cannot be used; empty when they can. The first call that finds a GPU loads them."""
    built = extension() is not None
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "no CUDA device that torch can use" + ("" if built else ", and the CUDA C++ kernels are not built")
    return _load() if built else f"the CUDA C++ kernels are not built; in fastllm's source, {_BUILD}"


@functools.cache
def extension() -> str | None:
    """The path of the extension where it was built. It has no Python part: torch loads it as a library of operators."""
    found = importlib.util.find_spec("fastllm._C_cuda")
    return found.origin if found else None


@functools.cache
def _load() -> str:
    try:
        torch.ops.load_library(extension())
    except OSError as error:  # built for a newer driver or torch, say
        return f"the CUDA C++ kernels do not load: {error}"
    return ""
