"""Loads the C++ extension; its ops register themselves with torch.ops.fastllm for the CPU."""

from __future__ import annotations

import functools
import os
import platform
import warnings
from pathlib import Path

CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")
_asked = os.environ.get("FASTLLM_CPU_CAPABILITY", "")
if _asked and _asked not in CAPABILITIES:
    raise ValueError(f"FASTLLM_CPU_CAPABILITY must be one of {', '.join(CAPABILITIES)}, got {_asked!r}")

_reason = ""
_capability = ""

try:
    import fastllm._C as _C
except ModuleNotFoundError:
    _reason = (
        "the C++ extension is not built; with a C++ compiler (g++ or clang++) on PATH or in CXX, in fastllm's source: "
        "pip install --no-build-isolation --force-reinstall --no-deps ."
    )
except ImportError as error:  # built for another torch or platform, say
    _reason = f"the C++ extension does not load: {error}"
else:
    _capability = _C.capability()
    if _asked and _asked != _capability:
        warnings.warn(
            f"FASTLLM_CPU_CAPABILITY={_asked} is more than this processor has; the kernels for {_capability} are used",
            stacklevel=2,
        )


def unavailable() -> str:
    """Why the C++ kernels cannot be used; empty when they can."""
    return _reason


def capability() -> str:
    """The instruction set chosen at run time: baseline, avx2, avx512 or avx512_bf16; empty without the extension."""
    return _capability


@functools.cache
def cpu_model() -> str:
    """The processor, as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def advise_huge_pages(address: int, size: int) -> None:
    """Asks the operating system for huge pages under `size` bytes of fresh memory; nothing without the extension."""
    if not _reason:
        _C.advise_huge_pages(address, size)
