"""Attention of one or a few new tokens over a key/value cache, split over the cache so that every core has a share.

Split and merge after Flash-Decoding (Dao et al., 2023): each share keeps its maximum and total, joined exactly at the end.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops._attention import attend, check_qkv, check_scores, fresh_out, lay_out
from fastllm.ops._op import Op


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_lengths: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Causal ``attention`` of a row's last Lq tokens over the first ``cache_lengths[b]`` tokens of its cache.

    Query i of row b stands at position ``cache_lengths[b] - Lq + i``; its own key and value are in the cache already.

    Args:
        q: (B, H, Lq, D), float32, bfloat16 or float16; float64 is served by the definition.
        k_cache: (B, K, S, D) where K divides H. Tokens from ``cache_lengths[b]`` on are not read.
        v_cache: (B, K, S, Dv).
        cache_lengths: (B,) int32 or int64, tokens in each row's cache, those of q counted; 0 to S.
        scale, window, sinks, sink_logits, alibi_slopes, softcap, return_lse: as in ``attention``.

    Returns:
        (B, H, Lq, Dv) in q's dtype; with `return_lse` also the fp32 lse, (B, H, Lq). A query before its row's first
        token gives 0 and lse -inf. Differentiable in q, the caches and sink_logits, by the definition.

    Raises:
        TypeError, ValueError: as ``attention``, and for cache_lengths of the wrong shape or dtype or, on the CPU, out of range.
    """
    q, k, v = check_qkv(q, k_cache, v_cache, 4)
    scale = check_scores(q, scale, window, sinks, sink_logits, alibi_slopes, softcap)
    _check.is_tensor("cache_lengths", cache_lengths)
    if cache_lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cache_lengths must be an int32 or int64 tensor, got {cache_lengths.dtype}")
    _check.has_shape("cache_lengths", cache_lengths, (q.shape[0],), "one per row of q")
    _check.same_device("cache_lengths", cache_lengths, "q", q)
    lengths = _check.values_of(cache_lengths)
    if lengths is not None and any(not 0 <= length <= k.shape[2] for length in lengths):
        raise ValueError(f"cache_lengths must lie in 0 .. S = {k.shape[2]}, got {lengths}")
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if head_dim % 8:
        q, k = (F.pad(t, (0, -head_dim % 8)) for t in (q, k))
    if value_dim % 8:
        v = F.pad(v, (0, -value_dim % 8))
    out, lse = _decode_attention(
        q, k, v, cache_lengths, sink_logits, alibi_slopes, scale, window or 0, sinks, softcap or 0.0
    )
    out = out[..., :value_dim] if value_dim % 8 else out
    return (out, lse) if return_lse else out


def _definition(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None,
    scale: float, window: int, sinks: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    last = lengths.view(-1, 1, 1, 1)
    p = last - q.shape[2] + torch.arange(q.shape[2], device=q.device).unsqueeze(1)
    j = torch.arange(k.shape[2], device=q.device).unsqueeze(0)
    # What lies beyond a row's tokens is not data, and may be NaN.
    beyond = j.transpose(0, 1) >= last
    k, v = k.masked_fill(beyond, 0.0), v.masked_fill(beyond, 0.0)
    out, lse = attend(q, k, v, sink_logits, alibi_slopes, p, j, j < last, scale, True, window, sinks, softcap)
    return lay_out(out), lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return fresh_out(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=wide)


_decode_attention = Op(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_lengths, Tensor? sink_logits, "
    "Tensor? alibi_slopes, float scale, int window, int sinks, float softcap) -> (Tensor out, Tensor lse)",
    _definition,
    fake=_fake,
    triton="attention:decode",
    public=["decode_attention"],
)
