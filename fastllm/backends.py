"""Which backend serves a call, and why.

Four backends: ``torch`` is the plain definition and serves everything; ``cpp`` serves CPU tensors; ``triton`` serves
CUDA and ROCm tensors, and CPU tensors under TRITON_INTERPRET=1; ``cuda`` serves CUDA tensors for the ops that have a
CUDA C++ kernel, where it is forced. Unforced, a CPU tensor goes to ``cpp``, a GPU tensor to ``triton``, and whatever
has no kernel (another device, float64) to ``torch``.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastllm.errors import BackendError
from fastllm.kernels import cpp, cuda, triton

NAMES = ("torch", "cpp", "triton", "cuda")
PREFERRED = {"cpu": "cpp", "cuda": "triton"}  # by type of device
KERNEL_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def _valid(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    return name


# The use_backend blocks under way, oldest first: those of several threads need not end in the order they began.
_blocks: dict[object, str] = {}
_outside: str | None = None  # what holds when all have ended
_lock = threading.Lock()
# An unknown name in the environment is an error of the first call, not of the import: `fastllm doctor` tells of it.
forced: str | None = os.environ.get("FASTLLM_BACKEND") or None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every op inside the ``with`` block, backward passes of those calls included.

    Args:
        name: ``"torch"``, ``"cpp"``, ``"triton"`` or ``"cuda"``.

    Raises:
        ValueError: for another name.
        BackendError: from an op inside the block that the backend cannot serve, naming op and reason.

    The choice is the process's, not the thread's. The environment variable FASTLLM_BACKEND sets the initial one.
    """
    global forced, _outside
    _valid(name)
    if torch.compiler.is_compiling():  # one thread traces, and a lock cannot be traced
        before, forced = forced, name
        try:
            yield
        finally:
            forced = before
        return
    block = object()
    with _lock:
        if not _blocks:
            _outside = forced
        _blocks[block] = forced = name
    try:
        yield
    finally:
        with _lock:
            del _blocks[block]
            forced = next(reversed(_blocks.values()), _outside)


def unavailable(name: str) -> str:
    """Why a backend cannot be used in this process; empty when it can."""
    if name == "torch":
        return ""
    if name == "cpp":
        return cpp.unavailable()
    if name == "triton":
        if triton.unavailable():
            return triton.unavailable()
        if not triton.interpreted() and not torch.cuda.is_available():
            return "no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
        return ""
    return cuda.unavailable()


def available() -> list[str]:
    """The backends usable in this process, a sublist of ``["torch", "cpp", "triton", "cuda"]``."""
    return [name for name in NAMES if not unavailable(_valid(name))]


def refusal(name: str, kernels: frozenset[str], device: torch.device, dtype: torch.dtype) -> str:
    """Why backend `name` cannot run an op with these `kernels` on such a tensor; empty when it can."""
    if name == "torch":
        return ""
    if name not in NAMES:
        return f"FASTLLM_BACKEND must be one of {', '.join(NAMES)}, got {name!r}"
    if reason := unavailable(name):
        return reason
    if name not in kernels:
        return f"this op has no {name} kernel"
    if dtype not in KERNEL_DTYPES:
        return f"{name} kernels take float32, bfloat16 and float16, not {dtype}"
    on_cpu = device.type == "cpu"
    if name == "cpp" and not on_cpu:
        return f"cpp kernels take CPU tensors, not {device}"
    if name == "cuda" and device.type != "cuda":
        return f"cuda kernels take CUDA tensors, not {device}"
    if name == "triton" and not (device.type == "cuda" or (on_cpu and triton.interpreted())):
        return f"triton kernels take GPU tensors, not {device} (TRITON_INTERPRET=1 accepts CPU tensors)"
    return ""


def select(op: str, kernels: frozenset[str], device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves a call. A forced one that cannot raises BackendError."""
    if forced is not None:
        if reason := refusal(forced, kernels, device, dtype):
            raise BackendError(f"{op}: backend {forced!r} cannot serve this call: {reason}")
        return forced
    preferred = PREFERRED.get(device.type, "torch")
    return preferred if not refusal(preferred, kernels, device, dtype) else "torch"


def by_definition(op: str, reason: str) -> None:
    """Raises BackendError where a backend is forced and a call is the definition's, which `reason` says why."""
    if forced not in (None, "torch"):
        raise BackendError(f"{op}: backend {forced!r} cannot serve this call: {reason}")


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Says which backend a call of `op` with these arguments would use and why the others would not be.

    Args:
        op: a public name of ``fastllm.ops`` or ``fastllm.rl``, for example ``"rms_norm"``.
        *args, **kwargs: what the op would be called with; the first tensor decides device and dtype.

    Returns:
        Lines of text; the first names the backend that serves the call.

    Raises:
        ValueError: for an unknown op. TypeError: without a tensor among the arguments.
        BackendError: when a forced backend cannot serve the call.
    """
    from fastllm import ops, rl
    from fastllm.ops import _op  # the registry of ops sits above this module; looked up only when a person asks

    if op in _op.COMPOSED:
        return f"{op}: {_op.COMPOSED[op]}"
    if op not in _op.PUBLIC:
        known = sorted(_op.PUBLIC | _op.COMPOSED)
        raise ValueError(f"op must be one of {', '.join(known)}, got {op!r}")
    tensor = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None)
    if tensor is None:
        raise TypeError(f"explain({op!r}, ...) needs the tensors the op would be called with")
    kernels = _op.PUBLIC[op].kernels
    bound = inspect.signature(getattr(ops if hasattr(ops, op) else rl, op)).bind_partial(*args, **kwargs).arguments
    learned = [n for n in _op.PUBLIC[op].constants if getattr(bound.get(n), "requires_grad", False)]
    if learned and torch.is_grad_enabled():
        reason = f"kernels have no gradient for {' and '.join(learned)}"
        by_definition(op, reason)
        return f"{op}: torch ({reason})"
    library, why, others = _op.ROUTES[op](*args, **kwargs) if op in _op.ROUTES else ("fastllm", "", {})
    told = [f"  not {name}: {reason}" for name, reason in others.items()]
    if library != "fastllm":
        return "\n".join([f"{op}: {library} ({why})", "  not fastllm's own: force a backend with use_backend", *told])
    chosen = select(op, kernels, tensor.device, tensor.dtype)
    why = "forced" if forced else f"{tensor.device.type} tensor, {tensor.dtype}"
    if chosen == "cpp":
        why += f", kernels for {cpp.capability()}"
    lines = [f"{op}: {chosen} ({why})"]
    for name in NAMES:
        if name != chosen:
            reason = refusal(name, kernels, tensor.device, tensor.dtype)
            served = "another is forced" if forced else "slower here; force it with use_backend"
            lines.append(f"  not {name}: {reason or served}")
    return "\n".join(lines + told)
