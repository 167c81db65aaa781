"""Loads the C++ extension; its ops register themselves with torch.ops.fastllm for the CPU."""

from __future__ import annotations

_reason = ""
_capability = ""

try:
    import fastllm._C as _C
except ModuleNotFoundError:
    _reason = "the C++ extension is not built"
except ImportError as error:  # built for another torch or platform, say
    _reason = f"the C++ extension does not load: {error}"
else:
    _capability = _C.capability()


def unavailable() -> str:
    """Why the C++ kernels cannot be used; empty when they can."""
    return _reason


def capability() -> str:
    """The instruction set chosen at run time: baseline, avx2, avx512 or avx512_bf16; empty without the extension."""
    return _capability
