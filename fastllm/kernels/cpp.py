"""Loads the C++ extension; its ops register themselves with torch.ops.fastllm for the CPU."""

from __future__ import annotations

_reason = ""
_capability = ""

try:
    from fastllm import _C
except ImportError as error:
    _reason = f"the C++ extension is not built ({error}); install a C++ compiler and reinstall fastllm"
else:
    _capability = _C.capability()


def unavailable() -> str:
    """Why the C++ kernels cannot be used; empty when they can."""
    return _reason


def capability() -> str:
    """The instruction set chosen at run time: baseline, avx2, avx512 or avx512_bf16; empty without the extension."""
    return _capability
