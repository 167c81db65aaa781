"""The forward pass: out, lse, and what rounding lse lost.

A program holds a block of queries and goes over the blocks of keys that any of them sees, with an online softmax in
powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._numeric import add_product, narrow_to, product
from fastllm.kernels.triton.attention.blocks import (
    COUNTS,
    LN_2,
    LOG2_E,
    bent_scores,
    block_rows,
    key_at,
    key_steps,
    load_rows,
    pairs_seen,
    sequence,
    store_rows,
)
from fastllm.kernels.triton.attention.call import describable, fresh_out, prepare, rows_of, steps
from fastllm.kernels.triton.attention.tiles import is_dense, tiles_for


def forward(
    q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, scale: float, causal: bool, window: int, sinks: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    c = prepare(q, k, v, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k, scale, causal, window, sinks, softcap)
    out = fresh_out(q, v.shape[-1])
    lse = q.new_empty((q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3], dtype=torch.float32)
    lost = torch.empty_like(lse)
    if lse.numel():
        tiles = tiles_for("forward", c.flags, q.dtype, c.chip, describable(c.k, c.v))
        blocks, table = c.blocks(True, tiles.m)
        sink = c.q if sink_logits is None else sink_logits.float().contiguous()
        k_rows, v_rows = (rows_of(t, tiles.n, tiles.descriptors) for t in (c.k, c.v))
        forward_kernel[(blocks * (lse.numel() // c.numbers["tokens"]),)](
            c.q, k_rows, v_rows, out, lse, lost, sink, *c.pointers(table), *steps(c.q), *steps(c.k), *steps(c.v), *steps(out),
            *c.mask_steps(), blocks, **c.numbers, **c.flags, **c.lists(True, tiles), DENSE=is_dense(c.flags, q.dtype),
            SINK_LOGITS=sink_logits is not None, PRECISE=q.dtype == torch.float32, **tiles.options(),
        )  # fmt: skip
    return out, lse, lost


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lost_ptr, sink_ptr, slope_ptr, mask_ptr, table_ptr, cu_q_ptr, cu_k_ptr, q_batch,
    q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token, mask_batch,
    mask_head, mask_q, mask_k, blocks, heads, group, queries, keys, tokens, scale_log2, cap_in, cap_out, window, sinks,
    list_ptr, count_ptr, list_batch, list_head, list_length, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr,
    DENSE: tl.constexpr, SINK_LOGITS: tl.constexpr, PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SPECIALIZED: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if not PACKED:
        block = blocks - 1 - block  # the last queries see most: they begin
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    block, first_q, first_k, queries, keys = sequence(table_ptr, cu_q_ptr, cu_k_ptr, block, queries, keys, PACKED)
    first = block * M
    if first >= queries:
        return
    shift = keys - queries
    i = first + tl.arange(0, M)[:, None]
    q = load_rows(q_ptr + batch * q_batch + head * q_head + first_q * q_token, first, queries, q_token, M, D, BLOCK_D)
    kv_head = head // group
    if not DESCRIPTORS:
        k_ptr += batch * k_batch + kv_head * k_head + first_k * k_token
        v_ptr += batch * v_batch + kv_head * v_head + first_k * v_token
    mask_ptr += batch * mask_batch + head * mask_head
    if MASK:
        own = (batch * list_batch + head * list_head) * blocks + block
        list_ptr += own * list_length
        count_ptr += 2 * own
    slope = 0.0
    if ALIBI:
        slope = tl.load(slope_ptr + head) * LOG2_E
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, BLOCK_DV], tl.float32)
    last = tl.minimum(first + M, queries) - 1
    room, jump, edge, end = key_steps(
        first, last, shift, keys, window, sinks, list_ptr, count_ptr, list_length, N, CAUSAL, WINDOW, SINKS, MASK, DENSE
    )
    if DENSE:
        sums, most, total = _forward_blocks(
            sums, most, total, q, i, first, 0, edge, k_ptr, v_ptr, batch, kv_head, k_token, v_token, shift, queries, keys,
            slope, scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, list_ptr, room, jump, False, CAUSAL,
            WINDOW, SINKS, MASK, CAP, ALIBI, N, D, BLOCK_D, DV, BLOCK_DV, DESCRIPTORS, SPECIALIZED,
        )  # fmt: skip
    sums, most, total = _forward_blocks(
        sums, most, total, q, i, first, edge, end, k_ptr, v_ptr, batch, kv_head, k_token, v_token, shift, queries, keys,
        slope, scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, list_ptr, room, jump, True, CAUSAL,
        WINDOW, SINKS, MASK, CAP, ALIBI, N, D, BLOCK_D, DV, BLOCK_DV, DESCRIPTORS, SPECIALIZED,
    )  # fmt: skip
    if SINK_LOGITS:
        sink = tl.load(sink_ptr + head) * LOG2_E
        now = tl.maximum(most, sink)
        base = tl.where(now == float("-inf"), 0.0, now)
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.exp2(sink - base)
        sums *= shrink[:, None]
        most = now
    blind = (total == 0.0) & (most == float("-inf"))
    out = sums / tl.where(blind, 1.0, total)[:, None]
    if PRECISE:
        exact = most.to(tl.float64) / LOG2_E + tl.log(tl.where(blind, 1.0, total)).to(tl.float64)
        lse = tl.where(blind, float("-inf"), exact.to(tl.float32))
        lost = tl.where(blind, 0.0, (exact - lse.to(tl.float64)).to(tl.float32))
    else:
        lse = tl.where(blind, float("-inf"), most * LN_2 + tl.log(tl.where(blind, 1.0, total)))
        lost = tl.zeros([M], tl.float32)
    out_ptr += batch * out_batch + head * out_head + first_q * out_token
    store_rows(out_ptr, out, first, queries, out_token, M, DV, BLOCK_DV)
    at = first + tl.arange(0, M)
    stats = row.to(tl.int64) * tokens + first_q + at
    tl.store(lse_ptr + stats, lse, mask=at < queries)
    tl.store(lost_ptr + stats, lost, mask=at < queries)


@triton.jit
def _forward_blocks(
    sums, most, total, q, i, i0, begin, end, k_ptr, v_ptr, batch, kv_head, k_token, v_token, shift, queries, keys, slope,
    scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, list_ptr, room, jump, EDGE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    ALIBI: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    for step in tl.range(begin, end, N, warp_specialize=SPECIALIZED):
        j0 = key_at(step, room, jump, list_ptr, N, SINKS, MASK)
        k = block_rows(k_ptr, batch, kv_head, j0, keys, k_token, N, D, BLOCK_D, DESCRIPTORS)
        products = product(q, tl.trans(k))
        j = j0 + tl.arange(0, N)[None, :]
        scores, _ = bent_scores(products, i, j, shift, slope, scale_log2, cap_in, cap_out, CAP, ALIBI)
        if EDGE:
            seen = pairs_seen(
                i, j, i0, j0, shift, queries, keys, window, sinks, mask_ptr, mask_q, mask_k, CAUSAL, WINDOW, SINKS,
                MASK, True,
            )  # fmt: skip
            scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now) if EDGE else now
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(weights, 1)
        v = block_rows(v_ptr, batch, kv_head, j0, keys, v_token, N, DV, BLOCK_DV, DESCRIPTORS)
        sums = add_product(sums * shrink[:, None], narrow_to(weights, q.dtype), v)
        most = now
    return sums, most, total
