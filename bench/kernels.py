"""``python -m bench kernels``: the ops of a layer and the loss, at the shapes of a 7 B model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import eager, peers, suite
from bench.case import FORWARD, Case
from bench.loss import CROSS_ENTROPY
from fastllm import ops

Inputs = Callable[[torch.dtype], tuple[Any, ...]]


def _normal(*shapes: tuple[int, ...]) -> Inputs:
    return lambda dtype: tuple(torch.randn(shape).to(dtype) for shape in shapes)


def _rope(projected: bool = False) -> Inputs:
    """q (4,32,2048,128), k (4,8,2048,128) and their tables. `projected`: in the memory order of a model's projections,
    (B, L, H, D) seen as (B, H, L, D)."""

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        angles = torch.outer(torch.arange(2048.0), 10000.0 ** -torch.arange(0, 1, 2 / 128)).repeat(1, 2).unsqueeze(0)
        if projected:
            q, k = (torch.randn(4, 2048, heads, 128).transpose(1, 2).to(dtype) for heads in (32, 8))
        else:
            q, k = (torch.randn(4, heads, 2048, 128).to(dtype) for heads in (32, 8))
        return q, k, angles.cos().to(dtype), angles.sin().to(dtype)

    return inputs


def _rope_by_positions(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The same q and k, positions and fp32 frequencies."""
    q, k, *_ = _rope()(dtype)
    return q, k, torch.arange(2048).unsqueeze(0), 10000.0 ** -torch.arange(0, 1, 2 / 128)


BIG, CHANNELS = (8192, 4096), (4096,)
WIDE = (8192, 11008)
ROPE = (ops.apply_rope, eager.apply_rope, eager.apply_rope)
LIGER_ROPE = peers.liger("liger_rope", lambda f, *arguments: f(*arguments))
CASES = [
    Case(
        "rms_norm", "8192x4096", _normal(BIG, CHANNELS), ops.rms_norm, eager.rms_norm, eager.exact_rms_norm,
        {"F.rms_norm": peers.torch_rms_norm, "xformers": peers.xformers_rms_norm}
        | peers.liger("liger_rms_norm", lambda f, x, w: f(x, w, 1e-6, in_place=False))
        | peers.flash_attn("layer_norm:rms_norm_fn", lambda f, x, w: f(x, w, None, eps=1e-6)),
        length=8192,
    ),
    *(  # few rows: where the cost of a call shows
        Case(
            "rms_norm", f"{rows}x4096", _normal((rows, 4096), CHANNELS), ops.rms_norm, eager.rms_norm,
            eager.exact_rms_norm, {"F.rms_norm": peers.torch_rms_norm}, dtypes=(torch.bfloat16,), passes=(FORWARD,),
            length=rows,
        )
        for rows in (16, 128, 1024)
    ),
    Case(
        "rms_norm", "8192x4096 into out", _normal(BIG, CHANNELS, BIG), lambda x, w, out: ops.rms_norm(x, w, out=out),
        eager.rms_norm_into, eager.exact_rms_norm, passes=(FORWARD,),
    ),
    Case(
        "add_rms_norm", "8192x4096", _normal(BIG, BIG, CHANNELS), ops.add_rms_norm, eager.add_rms_norm,
        eager.exact_add_rms_norm,
        peers.liger("liger_fused_add_rms_norm", lambda f, x, r, w: f(x, r, w, 1e-6, in_place=False)),
    ),
    Case(
        "layer_norm", "8192x4096", _normal(BIG, CHANNELS, CHANNELS), ops.layer_norm, eager.layer_norm, eager.layer_norm,
        peers.liger("liger_layer_norm", lambda f, x, w, b: f(x, w, b, 1e-5))
        | peers.flash_attn("layer_norm:layer_norm_fn", lambda f, x, w, b: f(x, w, b, eps=1e-5)),
    ),
    Case("apply_rope", "q 4x32x2048x128 k 4x8", _rope(), *ROPE, LIGER_ROPE, constants=(2, 3)),
    Case(
        "apply_rope", "q 4x32x2048x128 k 4x8 projected", _rope(projected=True), *ROPE, LIGER_ROPE, constants=(2, 3),
        passes=(FORWARD,),
    ),
    Case("rope", "q 4x32x2048x128 k 4x8", _rope_by_positions, ops.rope, eager.rope, eager.rope, constants=(2, 3)),
    Case(
        "swiglu", "8192x11008", _normal(WIDE, WIDE), ops.swiglu, eager.swiglu, eager.swiglu,
        peers.liger("liger_swiglu", lambda f, gate, up: f(gate, up)),
    ),
    CROSS_ENTROPY,
]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    return suite.main("kernels", CASES, arguments)
