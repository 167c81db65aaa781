"""A few new tokens over a cache: shares of the cache side by side, then joined exactly."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._numeric import add_product, narrow, product
from fastllm.kernels.triton.attention.blocks import COUNTS, LN_2, LOG2_E, bent_scores
from fastllm.kernels.triton.attention.call import fresh_out, prepare, steps, width_of

_MOST_DECODED = 64  # rows of a program: new tokens times the heads that share a key head


def decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, sink_logits: Tensor | None,
    alibi_slopes: Tensor | None, scale: float, window: int, sinks: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    most = max(1, _MOST_DECODED // (q.shape[1] // k_cache.shape[1]))
    if q.shape[2] > most:  # more queries than a program has room for: the last ones stand last, the others before them
        parts = []
        for first in range(0, q.shape[2], most):
            part = q[:, :, first : first + most]
            ends = (cache_lengths - (q.shape[2] - first - part.shape[2])).clamp(min=0)
            parts.append(decode(part, k_cache, v_cache, ends, sink_logits, alibi_slopes, scale, window, sinks, softcap))
        out, lse = fresh_out(q, v_cache.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
        for n, part in enumerate(parts):
            out[:, :, n * most : (n + 1) * most], lse[:, :, n * most : (n + 1) * most] = part
        return out, lse
    c = prepare(q, k_cache, v_cache, alibi_slopes, None, None, None, scale, True, window, sinks, softcap)
    window, sinks = c.numbers["window"], c.numbers["sinks"]
    batch, heads, queries, _ = q.shape
    kv_heads, room, channels = k_cache.shape[1], k_cache.shape[2], v_cache.shape[-1]
    out = fresh_out(q, channels)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not lse.numel():
        return out, lse
    reach = min(room, window + queries + sinks) if window else room
    splits = _splits(q.device, batch * kv_heads, reach)
    sums = q.new_empty((splits, lse.numel(), channels), dtype=torch.float32)
    stats = q.new_empty((splits, lse.numel(), 2), dtype=torch.float32)
    flags = {n: c.flags[n] for n in ("D", "BLOCK_D", "DV", "BLOCK_DV", "WINDOW", "SINKS", "CAP", "ALIBI")}
    numbers = {n: c.numbers[n] for n in ("group", "queries", "scale_log2", "cap_in", "cap_out", "window", "sinks")}
    block, warps = decode_tiles(q.dtype)
    decode_kernel[(batch * kv_heads, splits)](
        c.q, c.k, c.v, cache_lengths.contiguous(), c.q if c.slopes is None else c.slopes, sums, stats, *steps(c.q),
        *steps(c.k), *steps(c.v), kv_heads, **numbers, **flags, M=width_of(c.numbers["group"] * queries), N=block,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    join_kernel[(lse.numel(),)](
        sums, stats, c.q if sink_logits is None else sink_logits.float().contiguous(), out, lse, *steps(out), heads,
        queries, splits, SINK_LOGITS=sink_logits is not None, DV=channels, BLOCK_DV=c.flags["BLOCK_DV"],
    )  # fmt: skip
    return out, lse


def decode_tiles(dtype: torch.dtype) -> tuple[int, int]:
    """Keys a program holds at a time, and its warps."""
    return (16, 8) if dtype == torch.float32 else (64, 4)


def _splits(device: torch.device, programs: int, keys: int) -> int:
    """Shares of the cache: enough programs to fill the chip twice over, none of fewer than 256 keys."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(keys, 256)))


@triton.jit(do_not_specialize=COUNTS)
def decode_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, slope_ptr, sums_ptr, stats_ptr, q_batch, q_head, q_token, k_batch, k_head, k_token,
    v_batch, v_head, v_token, kv_heads, group, queries, scale_log2, cap_in, cap_out, window, sinks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """One share of the cache for the queries of all heads of a key head: sums (splits, all rows, DV), and of each row its
    maximum and total (splits, all rows, 2)."""
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, kv_head = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    length = tl.load(lengths_ptr + batch).to(tl.int32)
    r = tl.arange(0, M)
    count = group * queries
    head = kv_head * group + r // queries
    i = r % queries
    channel = tl.arange(0, BLOCK_D)
    q = tl.load(
        q_ptr + batch * q_batch + head[:, None] * q_head + i.to(tl.int64)[:, None] * q_token + channel[None, :],
        mask=(r < count)[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    position = (length - queries + i)[:, None]
    # The keys that any of the queries sees, counted through: first the sinks, then the window.
    begin, sinks_end = length * 0, length * 0
    if WINDOW:
        begin = tl.maximum(length - queries - window + 1, 0)
        if SINKS:
            sinks_end = tl.minimum(sinks, begin)
    gap = begin - sinks_end
    visible = length - gap
    share = ((visible + splits - 1) // splits + N - 1) // N * N
    slope = tl.zeros([M], tl.float32)
    if ALIBI:
        slope = tl.load(slope_ptr + head, mask=r < count, other=0.0) * LOG2_E
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, BLOCK_DV], tl.float32)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head
    value_channel = tl.arange(0, BLOCK_DV)
    for n0 in range(split * share, tl.minimum((split + 1) * share, visible), N):
        n = n0 + tl.arange(0, N)
        j = tl.where(n < sinks_end, n, n + gap)
        inside = n < visible
        k = tl.load(
            k_ptr + j.to(tl.int64)[:, None] * k_token + channel[None, :],
            mask=inside[:, None] & (channel < D)[None, :],
            other=0.0,
        )
        products = product(q, tl.trans(k))
        scores, _ = bent_scores(
            products, position, j[None, :], 0, slope[:, None], scale_log2, cap_in, cap_out, CAP, ALIBI
        )
        seen = inside[None, :] & (j[None, :] <= position)
        if WINDOW:
            near = position - j[None, :] < window
            if SINKS:
                near = near | (j[None, :] < sinks)
            seen = seen & near
        scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            v_ptr + j.to(tl.int64)[:, None] * v_token + value_channel[None, :],
            mask=inside[:, None] & (value_channel < DV)[None, :],
            other=0.0,
        )
        sums = add_product(sums * shrink[:, None], narrow(weights, v_ptr), v)
        most = now
    all_rows = tl.num_programs(0).to(tl.int64) * count
    at = split * all_rows + row.to(tl.int64) * count + r
    tl.store(
        sums_ptr + at[:, None] * DV + value_channel[None, :],
        sums,
        mask=(r < count)[:, None] & (value_channel < DV)[None, :],
    )
    tl.store(stats_ptr + 2 * at, most, mask=r < count)
    tl.store(stats_ptr + 2 * at + 1, total, mask=r < count)


@triton.jit(do_not_specialize=COUNTS)
def join_kernel(
    sums_ptr, stats_ptr, sink_ptr, out_ptr, lse_ptr, out_batch, out_head, out_token, heads, queries, splits,
    SINK_LOGITS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Joins the shares of one row: (batch, head, query)."""
    row = tl.program_id(0).to(tl.int64)
    all_rows = tl.num_programs(0).to(tl.int64)
    head = row // queries % heads
    channel = tl.arange(0, BLOCK_DV)
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    sums = tl.zeros([BLOCK_DV], tl.float32)
    if SINK_LOGITS:
        most = tl.load(sink_ptr + head) * LOG2_E
        total += tl.where(most == float("-inf"), 0.0, 1.0)
    for split in range(splits):
        at = split * all_rows + row
        top, part = tl.load(stats_ptr + 2 * at), tl.load(stats_ptr + 2 * at + 1)
        now = tl.maximum(most, top)
        base = tl.where(now == float("-inf"), 0.0, now)
        kept, added = tl.exp2(most - base), tl.exp2(top - base)
        total = total * kept + part * added
        sums = sums * kept + tl.load(sums_ptr + at * DV + channel, mask=channel < DV, other=0.0) * added
        most = now
    blind = (total == 0.0) & (most == float("-inf"))
    out = sums / tl.where(blind, 1.0, total)
    lse = tl.where(blind, float("-inf"), most * LN_2 + tl.log(tl.where(blind, 1.0, total)))
    out_ptr += row // queries // heads * out_batch + head * out_head + row % queries * out_token
    tl.store(out_ptr + channel, narrow(out, out_ptr), mask=channel < DV)
    tl.store(lse_ptr + row, lse)
