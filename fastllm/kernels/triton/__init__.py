"""Triton kernels and their launchers, one file or folder per op. They take and return tensors; autograd is not their business.

Conventions every file keeps: program ids and offsets that may pass 2^31 are int64; arithmetic is fp32; a launcher
returns early on an empty grid; a kernel's shipped configurations are what its ``configurations()`` lists, so that
they can be compiled and inspected without a GPU.
"""

from __future__ import annotations

import importlib.util
import os

_reason = "" if importlib.util.find_spec("triton") else "triton is not installed"


def unavailable() -> str:
    """Why Triton kernels cannot be used in this process; empty when they can."""
    return _reason


def interpreted() -> bool:
    """True under TRITON_INTERPRET=1, where kernels run in Python on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
