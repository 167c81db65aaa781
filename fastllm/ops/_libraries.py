"""Attention of other libraries: which calls each can serve to the letter, and on which devices it is the faster one.

A library is asked only for what it honours entirely; whatever it cannot do (sinks, learned sink logits, lse, ...) keeps the
call with our kernels. Which one is the faster is known where `python -m bench attention` was run and kept (``FASTEST``, written
by ``make docs`` from bench/results); elsewhere by what is known of the hardware, see ``_expected``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastllm import backends
from fastllm.kernels import cpp
from fastllm.ops._attention_rules import FASTEST

OURS = "fastllm"


class Call(NamedTuple):
    """A call of ``attention`` whose arguments were checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool
    scale: float
    window: int | None
    sinks: int
    sink_logits: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    mask: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    return_lse: bool

    @property
    def learns(self) -> bool:
        return torch.is_grad_enabled() and (self.q.requires_grad or self.k.requires_grad or self.v.requires_grad)

    @property
    def must_repeat(self) -> bool:
        """Whether a backward pass is to come that must give the same bits each time."""
        return self.learns and torch.are_deterministic_algorithms_enabled()


# ---- what each can serve: empty, or the reason why not -------------------------------------------------------------


def _common(call: Call) -> str:
    for name in ("sink_logits", "mask"):
        if getattr(call, name) is not None:
            return f"it has no {name}" if name == "sink_logits" else "its rows that see nothing are not 0 for certain"
    if call.sinks and call.window is not None:
        return "it has no sinks"
    if call.return_lse:
        return "it returns no lse"
    if not call.scale > 0:
        return "it masks before it scales, which a scale that is not positive does not survive"
    if call.q.numel() == 0 or call.k.numel() == 0:
        return "nothing to compute"
    return ""


def _capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU. Enough for all elsewhere: on ROCm, where libraries have rules of their own, and
    of a fake tensor's device."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return (8, 0)
    return torch.cuda.get_device_capability(device)


_capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _only_warned() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()


# torch.compile cannot trace the question, and guards what it answers: it compiles again once the mode changes.
_only_warned._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _sdpa_refuses(call: Call) -> str:
    if reason := _common(call):
        return reason
    for name in ("window", "alibi_slopes", "softcap", "cu_seqlens_q"):
        if getattr(call, name) is not None:
            return f"it has no {name}"
    if call.causal and call.q.shape[2] not in (1, call.k.shape[2]):
        return "its causal mask aligns the first query with the first key"
    if call.q.shape[-1] != call.v.shape[-1]:
        return "its fused kernels take one head dimension"
    if (
        call.q.is_cuda
        and call.q.shape[1] != call.k.shape[1]
        and (call.q.dtype == torch.float32 or call.q.shape[-1] > 256)
    ):
        return "it has no fused kernel for grouped heads here"
    if call.q.is_cuda and call.must_repeat and _only_warned():
        return (
            "its backward pass repeats to the last bit only where torch.use_deterministic_algorithms does not just warn"
        )
    return ""


def _flash_attn_refuses(call: Call) -> str:
    if reason := _common(call):
        return reason
    if (capability := _capability(call.q.device)) < (8, 0):
        return f"it takes GPUs of compute capability 8.0 and later, this one has {capability[0]}.{capability[1]}"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 and bfloat16, not {call.q.dtype}"
    if call.q.shape[-1] != call.v.shape[-1] or call.q.shape[-1] > 256:
        return "it takes one head dimension of at most 256"
    if call.window is not None and not call.causal:
        return "its window without causality is another one"
    if call.alibi_slopes is not None and not call.causal:
        return "its ALiBi without causality is another one"
    if call.alibi_slopes is not None and call.alibi_slopes.requires_grad and torch.is_grad_enabled():
        return "it finds no gradient of alibi_slopes"
    return ""


def _xformers_refuses(call: Call) -> str:
    if reason := _sdpa_refuses(call):
        return reason
    if call.q.shape[1] != call.k.shape[1]:
        return "it would copy keys for grouped heads"
    if call.must_repeat:
        return "its backward pass is not deterministic, and torch.use_deterministic_algorithms is on"
    return ""


# ---- calls -----------------------------------------------------------------------------------------------------------


def _sdpa(call: Call) -> Tensor:
    causal = call.causal and call.q.shape[2] > 1  # a single query, the last, sees all keys
    grouped = call.q.shape[1] != call.k.shape[1]
    return F.scaled_dot_product_attention(
        call.q, call.k, call.v, is_causal=causal, scale=call.scale, enable_gqa=grouped
    )


def _flash_attn(call: Call) -> Tensor:
    library = importlib.import_module("flash_attn")
    options: dict[str, Any] = {
        "softmax_scale": call.scale, "causal": call.causal, "softcap": call.softcap or 0.0,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "window_size": (-1, -1) if call.window is None else (call.window - 1, 0),
        "alibi_slopes": None if call.alibi_slopes is None else call.alibi_slopes.float(),
    }  # fmt: skip
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        return library.flash_attn_func(*(t.transpose(1, 2) for t in (call.q, call.k, call.v)), **options).transpose(
            1, 2
        )
    return library.flash_attn_varlen_func(
        call.q, call.k, call.v, call.cu_seqlens_q, call.cu_seqlens_k, call.q.shape[0], call.k.shape[0], **options
    )


def _xformers(call: Call) -> Tensor:
    library = importlib.import_module("xformers.ops")
    bias = library.LowerTriangularMask() if call.causal and call.q.shape[2] > 1 else None
    q, k, v = (t.transpose(1, 2) for t in (call.q, call.k, call.v))
    return library.memory_efficient_attention(q, k, v, attn_bias=bias, scale=call.scale).transpose(1, 2)


@dataclass(frozen=True)
class Library:
    """refuses: why it cannot serve a call to the letter, or nothing; module: what must be installed; on_cpu: whether it takes
    CPU tensors."""

    refuses: Callable[[Call], str]
    run: Callable[[Call], Tensor]
    module: str
    on_cpu: bool = False

    def absent(self) -> str:
        return _absent(self.module)


LIBRARIES = {
    "sdpa": Library(_sdpa_refuses, _sdpa, "torch", on_cpu=True),
    "flash-attn": Library(_flash_attn_refuses, _flash_attn, "flash_attn"),
    "xformers": Library(_xformers_refuses, _xformers, "xformers"),
}


@functools.cache
def _absent(module: str) -> str:
    """Why a library cannot be called; empty when it can."""
    if module == "torch":
        return ""
    if importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    try:
        library = importlib.import_module(module)
    except Exception as error:  # built for another torch, say
        return f"{module} does not import: {(str(error).splitlines() or [''])[0]}"
    if module == "flash_attn" and "softcap" not in inspect.signature(library.flash_attn_func).parameters:
        return "flash_attn is older than 2.6"
    return ""


# ---- which is the fastest --------------------------------------------------------------------------------------------


@functools.cache
def _device_name(device: torch.device) -> str:
    """As bench/results has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpp.cpu_model()}, {cpp.capability()}"


def _expected(device: torch.device, dtype: torch.dtype, learns: bool) -> tuple[tuple[str, ...], str]:
    """Who is to be asked first on a device where nobody has measured, and why."""
    if device.type == "cuda":
        return ("sdpa", "flash-attn", OURS), "nobody has timed our kernels on this GPU"
    if dtype == torch.bfloat16 and not learns and torch.cpu._is_amx_tile_supported():
        return ("sdpa", OURS), "this processor has AMX, which SDPA's forward pass uses and ours does not"
    return (OURS,), "ours is the faster one on every processor without AMX that was measured, and in the backward pass"


_rankings: dict[tuple[torch.device, torch.dtype, bool], tuple[tuple[str, ...], str]] = {}


def ranking(device: torch.device, dtype: torch.dtype, learns: bool) -> tuple[tuple[str, ...], str]:
    """Libraries and OURS, the fastest first, and what that is known from."""
    key = (device, dtype, learns)
    if key not in _rankings:
        _rankings[key] = _rank(*key)
    return _rankings[key]


# To torch.compile a constant: neither files nor the device's name are read while it traces. This is what
# torch.compiler.assume_constant_result sets, which would import all of torch.compile with fastllm.
ranking._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _rank(device: torch.device, dtype: torch.dtype, learns: bool) -> tuple[tuple[str, ...], str]:
    if device.type == "cpu" or torch.cuda.is_available():  # else a fake tensor's device, of which nothing is known
        name = _device_name(device)
        if measured := FASTEST.get((name, str(dtype).removeprefix("torch."), learns)):
            return measured, f"measured on {name}, see docs/benchmarks.md"
    return _expected(device, dtype, learns)


def choose(call: Call) -> str:
    """The library that is to serve a call; OURS where none is faster and able."""
    if backends.forced is not None or call.q.device.type not in ("cpu", "cuda"):
        return OURS
    if call.q.device.type == "cpu" and cpp.unavailable():
        return OURS
    order, _ = ranking(call.q.device, call.q.dtype, call.learns)
    if order[0] == OURS:
        return OURS
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return OURS  # the definition has every derivative
    return next((name for name in order if name == OURS or not _refusal(name, call)), OURS)


def _refusal(name: str, call: Call) -> str:
    library = LIBRARIES[name]
    if reason := library.absent():
        return reason
    if call.q.device.type == "cpu" and not library.on_cpu:
        return "it takes GPU tensors"
    return library.refuses(call)


def reasons(call: Call) -> tuple[str, str, dict[str, str]]:
    """Who serves a call, why, and why each other library does not."""
    chosen = choose(call)
    order: tuple[str, ...] = (OURS,)
    why = "no library takes such tensors"
    if call.q.device.type in ("cpu", "cuda"):
        order, why = ranking(call.q.device, call.q.dtype, call.learns)
    if chosen == "flash-attn" and call.must_repeat:
        why += "; asked for its deterministic backward pass"
    found = {}
    for name in LIBRARIES:
        if name != chosen:
            forced = "another backend is forced" if backends.forced is not None else ""
            behind = "slower here" if name not in order else f"{order[0]} comes first"
            found[name] = forced or _refusal(name, call) or f"{behind}: {why}"
    return chosen, why, found
