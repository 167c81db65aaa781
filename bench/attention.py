"""``python -m bench attention``: dense, windowed, packed and dilated attention, and decoding over a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import eager, peers, suite
from bench.case import FORWARD, Case
from fastllm import ops, use_backend

WINDOW, SINKS = 1024, 4
DOCUMENTS = (300, 1700, 48, 2000, 1, 47)  # 4096 tokens in all
SEGMENTS, RATES = (1024, 4096, 16384), (1, 4, 16)


def _qkv(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int) -> Callable[[torch.dtype], Any]:
    """In the memory order of a model's projections."""
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return lambda dtype: tuple(torch.randn(batch, n, h, width).to(dtype).transpose(1, 2) for n, h in shapes)


def _cache(batch: int, heads: int, kv_heads: int, length: int, width: int) -> Callable[[torch.dtype], Any]:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        caches = (torch.randn(batch, kv_heads, length, width).to(dtype) for _ in range(2))
        return torch.randn(batch, heads, 1, width).to(dtype), *caches, torch.full((batch,), length)

    return inputs


def _packed(dtype: torch.dtype) -> tuple[Tensor, ...]:
    bounds = torch.tensor([0, *DOCUMENTS]).cumsum(0).int()
    return (*(torch.randn(sum(DOCUMENTS), 12, 64).to(dtype) for _ in range(3)), bounds)


def _ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """fastllm's own kernels, wherever the call would go by itself."""
    with use_backend("cpp" if q.device.type == "cpu" else "triton"):
        return ops.attention(q, k, v, **options)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _dense(heads: int, length: int, width: int, dtypes: tuple[torch.dtype, ...]) -> Case:
    return Case(
        "attention", f"causal 1x{heads}x{length}x{width}", _qkv(1, heads, heads, length, length, width), _ours,
        _causal, eager.exact_attention, peers.attention(), dtypes=dtypes, flops=2 * heads * length * length * width,
    )  # fmt: skip


def _pairs(length: int) -> int:
    """Queries and keys that see each other under the window and the sinks."""
    return sum(min(p + 1, WINDOW) + min(SINKS, max(0, p + 1 - WINDOW)) for p in range(length))


def _windowed(length: int) -> Case:
    return Case(
        "attention", f"window {WINDOW} sinks {SINKS} 1x2x{length}x64", _qkv(1, 2, 2, length, length, 64),
        lambda q, k, v: _ours(q, k, v, window=WINDOW, sinks=SINKS),
        lambda q, k, v: eager.windowed_attention(q, k, v, WINDOW, SINKS),
        lambda q, k, v: eager.exact_attention(q, k, v, WINDOW, SINKS),
        peers.flex_attention(lambda b, h, i, j: (j <= i) & ((i - j < WINDOW) | (j < SINKS))), dtypes=(torch.bfloat16,),
        flops=4 * 2 * _pairs(length) * 64, length=length,
    )  # fmt: skip


def _dilated(length: int) -> Case:
    seen = sum(min(segment, length) / rate**2 for segment, rate in zip(SEGMENTS, RATES)) / 2
    return Case(
        "dilated_attention", f"1x16x{length}x64", _qkv(1, 16, 16, length, length, 64),
        lambda q, k, v: ops.dilated_attention(q, k, v, SEGMENTS, RATES),
        lambda q, k, v: eager.dilated_attention(q, k, v, SEGMENTS, RATES),
        lambda q, k, v: eager.dilated_attention(q, k, v, SEGMENTS, RATES),
        dtypes=(torch.bfloat16,), passes=(FORWARD,), flops=int(4 * 16 * length * seen * 64), length=length,
        uncompiled="its loop over segments takes minutes to compile",
    )  # fmt: skip


CASES = [
    _dense(12, 2048, 64, (torch.float32, torch.bfloat16)),
    _dense(32, 2048, 128, (torch.bfloat16,)),
    *(_windowed(length) for length in (4096, 16384)),
    Case(
        "attention", "packed 4096x12x64", _packed,
        lambda q, k, v, bounds: _ours(q, k, v, cu_seqlens_q=bounds), eager.packed_attention, eager.packed_attention,
        dtypes=(torch.bfloat16,), flops=sum(2 * 12 * n * n * 64 for n in DOCUMENTS),
    ),
    *(
        Case(
            "decode_attention", f"1x32x1x128 over 1x8x{length}x128", _cache(1, 32, 8, length, 128), ops.decode_attention,
            eager.decode_attention, eager.decode_attention, passes=(FORWARD,), length=length,
        )
        for length in (8192, 32768)
    ),
    *(_dilated(length) for length in (1024, 4096, 16384, 65536)),
]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    return suite.main("attention", CASES, arguments)
