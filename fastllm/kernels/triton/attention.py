"""Softmax attention: forward, the gradients of keys and values, that of queries, and decoding split over the cache.

After Dao (arXiv 2307.08691), in powers of two. A program holds one block of queries (or, for the gradients of keys and
values, of keys) and goes over the blocks that it sees: those that every pair of sees without any arithmetic of masks, the
edges of the diagonal, the window and the sinks with it. No atomics: results repeat to the last bit.

Packed documents are cut into blocks of their own; a table made on the device says which document a program's block is of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, Work, triton_type
from fastllm.kernels.triton._numeric import add_product, narrow, product

LOG2_E = 1.4426950408889634
_LOG2_E, _LN_2 = tl.constexpr(LOG2_E), tl.constexpr(1 / LOG2_E)
# Arguments of which Triton is to compile no special case for 1 or for multiples of 16.
_COUNTS = ["blocks", "heads", "kv_heads", "group", "queries", "keys", "tokens", "window", "sinks", "splits"]


@triton.jit
def _sequence(table_ptr, cu_q_ptr, cu_k_ptr, block, queries, keys, PACKED: tl.constexpr):
    """Of a program: its block inside the sequence, the sequence's first query and key, and how many it has of both."""
    first_q, first_k = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    if PACKED:
        document = tl.load(table_ptr + 2 * block)
        block = tl.load(table_ptr + 2 * block + 1)
        first_q, first_k = tl.load(cu_q_ptr + document), tl.load(cu_k_ptr + document)
        queries = tl.load(cu_q_ptr + document + 1) - first_q
        keys = tl.load(cu_k_ptr + document + 1) - first_k
    return block, first_q.to(tl.int64), first_k.to(tl.int64), queries, keys


@triton.jit
def _rows(pointer, first, count, step, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [first, first + BLOCK) of `count` rows, WIDTH channels of which CHANNELS are there; zero elsewhere.

    One 64-bit offset for the block and 32-bit ones within it, which do not change from block to block: 64-bit pointers to
    every element would take the registers that the sums need.
    """
    row, channel = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (row < count - first)[:, None]
    if CHANNELS != WIDTH:
        inside = inside & (channel < CHANNELS)[None, :]
    block = pointer + (tl.zeros([], tl.int64) + first) * step
    return tl.load(block + (row[:, None] * step + channel[None, :]), mask=inside, other=0.0)


@triton.jit
def _store_rows(pointer, value, first, count, step, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    row, channel = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (row < count - first)[:, None] & (channel < CHANNELS)[None, :]
    block = pointer + (tl.zeros([], tl.int64) + first) * step
    tl.store(block + (row[:, None] * step + channel[None, :]), narrow(value, pointer), mask=inside)


@triton.jit
def _bent(products, i, j, shift, slope, scale_log2, cap_in, cap_out, CAP: tl.constexpr, ALIBI: tl.constexpr):
    """Scores in units of log 2, and what a cap multiplies their gradients by. i and j broadcast against products."""
    steep = 1.0
    if CAP:
        x = products * cap_in
        z = x * x  # tanh: a polynomial (Cephes tanhf) below 0.625, where the difference that serves beyond would cancel
        p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
        near = x + x * z * (p * z - 3.33332819422e-1)
        t = tl.where(z < 0.390625, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
        scores, steep = t * cap_out, 1.0 - t * t
    else:
        scores = products * scale_log2
    if ALIBI:
        scores += slope * (j - i - shift).to(tl.float32)
    return scores, steep


@triton.jit
def _seen(
    i, j, i0, j0, shift, queries, keys, window, sinks, mask_ptr, mask_q, mask_k,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    """Which pairs of queries i and keys j see each other; the two broadcast. Without BOUNDS, rows beyond the last count.
    i0 and j0 are the first of both."""
    if CAUSAL:
        seen = j <= i + shift
    else:
        seen = (j >= 0) & (i >= 0)
    if BOUNDS or MASK:
        seen = seen & (j < keys) & (i < queries)
    if WINDOW:
        near = i + shift - j < window
        if SINKS:
            near = near | (j < sinks)
        seen = seen & near
    if MASK:
        zero = tl.zeros([], tl.int64)
        block = mask_ptr + (zero + i0) * mask_q + (zero + j0) * mask_k
        seen = seen & (tl.load(block + ((i - i0) * mask_q + (j - j0) * mask_k), mask=seen, other=0) != 0)
    return seen


@triton.jit
def _key_range(
    first, last, shift, keys, window, sinks, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
):  # fmt: skip
    """Of queries [first, last]: how many keys their blocks of sinks take, where their window begins, where their keys end."""
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, tl.maximum(last + shift + 1, 0))
    begin, sinks_room = end * 0, end * 0
    if WINDOW:
        begin = tl.minimum(tl.maximum(first + shift - window + 1, 0), end) // N * N
    if SINKS:
        sinks_room = (tl.minimum(sinks, begin) + N - 1) // N * N
    return sinks_room, begin, end


@triton.jit
def _whole_end(first, shift, keys, N: tl.constexpr, CAUSAL: tl.constexpr):
    """Up to where all queries from `first` on see all keys, without a window or a mask."""
    end = keys // N * N
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(first + shift + 1, 0) // N * N)
    return end


@triton.jit
def _forward_blocks(
    sums, most, total, q, i, i0, begin, end, k_ptr, v_ptr, k_token, v_token, shift, queries, keys, slope, scale_log2, cap_in,
    cap_out, window, sinks, mask_ptr, mask_q, mask_k, sinks_room, jump, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    for n0 in range(begin, end, N):
        j0 = n0
        if SINKS:  # from the last block of sinks on to the window
            j0 = n0 + tl.where(n0 < sinks_room, 0, jump)
        k = _rows(k_ptr, j0, keys, k_token, N, D, BLOCK_D)
        products = product(q, tl.trans(k))
        j = j0 + tl.arange(0, N)[None, :]
        scores, _ = _bent(products, i, j, shift, slope, scale_log2, cap_in, cap_out, CAP, ALIBI)
        if EDGE:
            seen = _seen(
                i,
                j,
                i0,
                j0,
                shift,
                queries,
                keys,
                window,
                sinks,
                mask_ptr,
                mask_q,
                mask_k,
                CAUSAL,
                WINDOW,
                SINKS,
                MASK,
                True,
            )
            scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now) if EDGE else now
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.sum(weights, 1)
        v = _rows(v_ptr, j0, keys, v_token, N, DV, BLOCK_DV)
        sums = add_product(sums * shrink[:, None], narrow(weights, v_ptr), v)
        most = now
    return sums, most, total


@triton.jit(do_not_specialize=_COUNTS)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lost_ptr, sink_ptr, slope_ptr, mask_ptr, table_ptr, cu_q_ptr, cu_k_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    mask_batch, mask_head, mask_q, mask_k, blocks, heads, group, queries, keys, tokens, scale_log2, cap_in, cap_out, window, sinks,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    ALIBI: tl.constexpr, PACKED: tl.constexpr, DENSE: tl.constexpr, SINK_LOGITS: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if not PACKED:
        block = blocks - 1 - block  # the last queries see most: they begin
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    block, first_q, first_k, queries, keys = _sequence(table_ptr, cu_q_ptr, cu_k_ptr, block, queries, keys, PACKED)
    first = block * M
    if first >= queries:
        return
    shift = keys - queries
    i = first + tl.arange(0, M)[:, None]
    q = _rows(q_ptr + batch * q_batch + head * q_head + first_q * q_token, first, queries, q_token, M, D, BLOCK_D)
    k_ptr += batch * k_batch + head // group * k_head + first_k * k_token
    v_ptr += batch * v_batch + head // group * v_head + first_k * v_token
    mask_ptr += batch * mask_batch + head * mask_head
    slope = 0.0
    if ALIBI:
        slope = tl.load(slope_ptr + head) * _LOG2_E
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, BLOCK_DV], tl.float32)
    last = tl.minimum(first + M, queries) - 1
    sinks_room, begin, end = _key_range(first, last, shift, keys, window, sinks, N, CAUSAL, WINDOW, SINKS)
    # Dense: the blocks that all see, without arithmetic of masks, then the edge. Else one loop: copies of it take registers.
    jump, edge = begin - sinks_room, begin * 0
    if WINDOW and not SINKS:
        jump, edge = begin * 0, begin
    if DENSE:
        edge = _whole_end(first, shift, keys, N, CAUSAL)
    if DENSE:
        sums, most, total = _forward_blocks(
            sums, most, total, q, i, first, 0, edge, k_ptr, v_ptr, k_token, v_token, shift, queries, keys, slope, scale_log2,
            cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, sinks_room, jump, False, CAUSAL, WINDOW, SINKS, MASK,
            CAP, ALIBI, N, D, BLOCK_D, DV, BLOCK_DV,
        )  # fmt: skip
    sums, most, total = _forward_blocks(
        sums, most, total, q, i, first, edge, end - jump, k_ptr, v_ptr, k_token, v_token, shift, queries, keys, slope, scale_log2,
        cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, sinks_room, jump, True, CAUSAL, WINDOW, SINKS, MASK, CAP,
        ALIBI, N, D, BLOCK_D, DV, BLOCK_DV,
    )  # fmt: skip
    if SINK_LOGITS:
        sink = tl.load(sink_ptr + head) * _LOG2_E
        now = tl.maximum(most, sink)
        base = tl.where(now == float("-inf"), 0.0, now)
        shrink = tl.exp2(most - base)
        total = total * shrink + tl.exp2(sink - base)
        sums *= shrink[:, None]
        most = now
    blind = (total == 0.0) & (most == float("-inf"))
    out = sums / tl.where(blind, 1.0, total)[:, None]
    if PRECISE:
        exact = most.to(tl.float64) / _LOG2_E + tl.log(tl.where(blind, 1.0, total)).to(tl.float64)
        lse = tl.where(blind, float("-inf"), exact.to(tl.float32))
        lost = tl.where(blind, 0.0, (exact - lse.to(tl.float64)).to(tl.float32))
    else:
        lse = tl.where(blind, float("-inf"), most * _LN_2 + tl.log(tl.where(blind, 1.0, total)))
        lost = tl.zeros([M], tl.float32)
    out_ptr += batch * out_batch + head * out_head + first_q * out_token
    _store_rows(out_ptr, out, first, queries, out_token, M, DV, BLOCK_DV)
    at = first + tl.arange(0, M)
    stats = row.to(tl.int64) * tokens + first_q + at
    tl.store(lse_ptr + stats, lse, mask=at < queries)
    tl.store(lost_ptr + stats, lost, mask=at < queries)


@triton.jit(do_not_specialize=_COUNTS)
def _delta_kernel(
    out_ptr, grad_ptr, grad_lse_ptr, delta_ptr, out_batch, out_head, out_token, grad_batch, grad_head, grad_token, blocks,
    heads, tokens, HAS_GRAD_LSE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The row sums of out * grad_out, less the gradient of lse."""
    row, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * M
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    out = _rows(out_ptr + batch * out_batch + head * out_head, first, tokens, out_token, M, DV, BLOCK_DV)
    grad = _rows(grad_ptr + batch * grad_batch + head * grad_head, first, tokens, grad_token, M, DV, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    i = first + tl.arange(0, M)
    at = row.to(tl.int64) * tokens + i
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + at, mask=i < tokens, other=0.0)
    tl.store(delta_ptr + at, delta, mask=i < tokens)


@triton.jit
def _logarithms(lse_ptr, lost_ptr, at, there, PRECISE: tl.constexpr):
    """Of softmax denominators to base 2, for scores in those units, and what their rounding to fp32 lost (0 unless PRECISE)."""
    lse = tl.load(lse_ptr + at, mask=there, other=float("-inf"))
    blind = lse == float("-inf")  # who sees nothing has no weights
    if PRECISE:
        exact = (lse.to(tl.float64) + tl.load(lost_ptr + at, mask=there, other=0.0).to(tl.float64)) * _LOG2_E
        rounded = exact.to(tl.float32)
        lost = tl.where(blind, 0.0, (exact - rounded.to(tl.float64)).to(tl.float32))
    else:
        rounded = lse * _LOG2_E
        lost = 0.0
    return tl.where(blind, float("inf"), rounded), lost


@triton.jit
def _key_value_blocks(
    grad_k, grad_v, k, v, j, j0, begin, end, q_ptr, grad_ptr, lse_ptr, lost_ptr, delta_ptr, q_token, grad_token, shift, queries, keys,
    slope, scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, M: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    for i0 in range(begin, end, M):
        q = _rows(q_ptr, i0, queries, q_token, M, D, BLOCK_D)
        grad = _rows(grad_ptr, i0, queries, grad_token, M, DV, BLOCK_DV)
        at = i0 + tl.arange(0, M)
        lse, lost = _logarithms(lse_ptr, lost_ptr, at, at < queries, PRECISE)
        products = product(k, tl.trans(q))
        i = at[None, :]
        scores, steep = _bent(products, i, j, shift, slope, scale_log2, cap_in, cap_out, CAP, ALIBI)
        weights = tl.exp2(scores - lse[None, :] - lost[None, :]) if PRECISE else tl.exp2(scores - lse[None, :])
        if CAUSAL or WINDOW or MASK:
            seen = _seen(
                i,
                j,
                i0,
                j0,
                shift,
                queries,
                keys,
                window,
                sinks,
                mask_ptr,
                mask_q,
                mask_k,
                CAUSAL,
                WINDOW,
                SINKS,
                MASK,
                False,
            )
            weights = tl.where(seen, weights, 0.0)
        if GRAD_V:
            grad_v = add_product(grad_v, narrow(weights, grad_ptr), grad)
        if GRAD_K:
            delta = tl.load(delta_ptr + at, mask=at < queries, other=0.0)
            grad_scores = weights * (product(v, tl.trans(grad)) - delta[None, :]) * steep
            grad_k = add_product(grad_k, narrow(grad_scores, q_ptr), q)
    return grad_k, grad_v


@triton.jit(do_not_specialize=_COUNTS)
def _key_value_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, lost_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, slope_ptr, mask_ptr, table_ptr, cu_q_ptr,
    cu_k_ptr, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head,
    grad_token, grad_k_batch, grad_k_head, grad_k_token, grad_v_batch, grad_v_head, grad_v_token,
    mask_batch, mask_head, mask_q, mask_k, blocks, heads, group, queries, keys, tokens, scale, scale_log2, cap_in, cap_out, window,
    sinks, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr,
    CAP: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    kv_heads = heads // group
    batch, kv_head = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    block, first_q, first_k, queries, keys = _sequence(table_ptr, cu_q_ptr, cu_k_ptr, block, queries, keys, PACKED)
    first = block * N
    if first >= keys:
        return
    shift = keys - queries
    k = _rows(k_ptr + batch * k_batch + kv_head * k_head + first_k * k_token, first, keys, k_token, N, D, BLOCK_D)
    v = _rows(v_ptr + batch * v_batch + kv_head * v_head + first_k * v_token, first, keys, v_token, N, DV, BLOCK_DV)
    j = first + tl.arange(0, N)[:, None]
    begin, end = shift * 0, queries
    if CAUSAL:
        begin = tl.minimum(tl.maximum(first - shift, 0), queries) // M * M
    if WINDOW:
        reach = tl.minimum(tl.maximum(tl.minimum(first + N, keys) - 1 + window - shift, 0), queries)
        if SINKS:
            end = tl.where(first < sinks, queries, reach)
        else:
            end = reach
    grad_k = tl.zeros([N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([N, BLOCK_DV], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        slope = 0.0
        if ALIBI:
            slope = tl.load(slope_ptr + head) * _LOG2_E
        q_here = q_ptr + batch * q_batch + head * q_head + first_q * q_token
        grad_here = grad_ptr + batch * grad_batch + head * grad_head + first_q * grad_token
        stats = (batch * heads + head) * tokens + first_q
        mask_here = mask_ptr + batch * mask_batch + head * mask_head
        grad_k, grad_v = _key_value_blocks(
            grad_k, grad_v, k, v, j, first, begin, end, q_here, grad_here, lse_ptr + stats, lost_ptr + stats,
            delta_ptr + stats, q_token, grad_token, shift, queries, keys, slope, scale_log2, cap_in, cap_out, window, sinks,
            mask_here, mask_q, mask_k, CAUSAL, WINDOW, SINKS, MASK, CAP, ALIBI, M, D, BLOCK_D, DV, BLOCK_DV, GRAD_K,
            GRAD_V, PRECISE,
        )  # fmt: skip
    grad_k_ptr += batch * grad_k_batch + kv_head * grad_k_head + first_k * grad_k_token
    grad_v_ptr += batch * grad_v_batch + kv_head * grad_v_head + first_k * grad_v_token
    if GRAD_K:
        _store_rows(grad_k_ptr, grad_k * scale, first, keys, grad_k_token, N, D, BLOCK_D)
    if GRAD_V:
        _store_rows(grad_v_ptr, grad_v, first, keys, grad_v_token, N, DV, BLOCK_DV)


@triton.jit
def _query_blocks(
    grad_q, q, grad, lse, lost, delta, i, i0, begin, end, k_ptr, v_ptr, k_token, v_token, shift, queries, keys, slope, scale_log2,
    cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, sinks_room, jump, EDGE: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    for n0 in range(begin, end, N):
        j0 = n0
        if SINKS:
            j0 = n0 + tl.where(n0 < sinks_room, 0, jump)
        k = _rows(k_ptr, j0, keys, k_token, N, D, BLOCK_D)
        v = _rows(v_ptr, j0, keys, v_token, N, DV, BLOCK_DV)
        j = j0 + tl.arange(0, N)[None, :]
        products = product(q, tl.trans(k))
        scores, steep = _bent(products, i, j, shift, slope, scale_log2, cap_in, cap_out, CAP, ALIBI)
        weights = tl.exp2(scores - lse[:, None] - lost[:, None]) if PRECISE else tl.exp2(scores - lse[:, None])
        if EDGE:
            seen = _seen(
                i,
                j,
                i0,
                j0,
                shift,
                queries,
                keys,
                window,
                sinks,
                mask_ptr,
                mask_q,
                mask_k,
                CAUSAL,
                WINDOW,
                SINKS,
                MASK,
                True,
            )
            weights = tl.where(seen, weights, 0.0)
        grad_scores = weights * (product(grad, tl.trans(v)) - delta[:, None]) * steep
        grad_q = add_product(grad_q, narrow(grad_scores, k_ptr), k)
    return grad_q


@triton.jit(do_not_specialize=_COUNTS)
def _query_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, lost_ptr, delta_ptr, grad_q_ptr, slope_ptr, mask_ptr, table_ptr, cu_q_ptr, cu_k_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head, grad_token,
    grad_q_batch, grad_q_head, grad_q_token, mask_batch, mask_head, mask_q, mask_k, blocks, heads, group, queries, keys, tokens,
    scale, scale_log2, cap_in, cap_out, window, sinks, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr, DENSE: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if not PACKED:
        block = blocks - 1 - block
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    block, first_q, first_k, queries, keys = _sequence(table_ptr, cu_q_ptr, cu_k_ptr, block, queries, keys, PACKED)
    first = block * M
    if first >= queries:
        return
    shift = keys - queries
    at = first + tl.arange(0, M)
    i = at[:, None]
    q = _rows(q_ptr + batch * q_batch + head * q_head + first_q * q_token, first, queries, q_token, M, D, BLOCK_D)
    grad_ptr += batch * grad_batch + head * grad_head + first_q * grad_token
    grad = _rows(grad_ptr, first, queries, grad_token, M, DV, BLOCK_DV)
    stats = row.to(tl.int64) * tokens + first_q + at
    lse, lost = _logarithms(lse_ptr, lost_ptr, stats, at < queries, PRECISE)
    delta = tl.load(delta_ptr + stats, mask=at < queries, other=0.0)
    k_ptr += batch * k_batch + head // group * k_head + first_k * k_token
    v_ptr += batch * v_batch + head // group * v_head + first_k * v_token
    mask_ptr += batch * mask_batch + head * mask_head
    slope = 0.0
    if ALIBI:
        slope = tl.load(slope_ptr + head) * _LOG2_E
    last = tl.minimum(first + M, queries) - 1
    sinks_room, begin, end = _key_range(first, last, shift, keys, window, sinks, N, CAUSAL, WINDOW, SINKS)
    # Dense: the blocks that all see, without arithmetic of masks, then the edge. Else one loop: copies of it take registers.
    jump, edge = begin - sinks_room, begin * 0
    if WINDOW and not SINKS:
        jump, edge = begin * 0, begin
    if DENSE:
        edge = _whole_end(first, shift, keys, N, CAUSAL)
    grad_q = tl.zeros([M, BLOCK_D], tl.float32)
    if DENSE:
        grad_q = _query_blocks(
            grad_q, q, grad, lse, lost, delta, i, first, 0, edge, k_ptr, v_ptr, k_token, v_token, shift, queries, keys, slope,
            scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, sinks_room, jump, False, CAUSAL, WINDOW,
            SINKS, MASK, CAP, ALIBI, N, D, BLOCK_D, DV, BLOCK_DV, PRECISE,
        )  # fmt: skip
    grad_q = _query_blocks(
        grad_q, q, grad, lse, lost, delta, i, first, edge, end - jump, k_ptr, v_ptr, k_token, v_token, shift, queries, keys, slope,
        scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, sinks_room, jump, True, CAUSAL, WINDOW, SINKS,
        MASK, CAP, ALIBI, N, D, BLOCK_D, DV, BLOCK_DV, PRECISE,
    )  # fmt: skip
    grad_q_ptr += batch * grad_q_batch + head * grad_q_head + first_q * grad_q_token
    _store_rows(grad_q_ptr, grad_q * scale, first, queries, grad_q_token, M, D, BLOCK_D)


@triton.jit(do_not_specialize=_COUNTS)
def _decode_kernel(
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
        slope = tl.load(slope_ptr + head, mask=r < count, other=0.0) * _LOG2_E
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
        scores, _ = _bent(products, position, j[None, :], 0, slope[:, None], scale_log2, cap_in, cap_out, CAP, ALIBI)
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


@triton.jit(do_not_specialize=_COUNTS)
def _join_kernel(
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
        most = tl.load(sink_ptr + head) * _LOG2_E
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
    lse = tl.where(blind, float("-inf"), most * _LN_2 + tl.log(tl.where(blind, 1.0, total)))
    out_ptr += row // queries // heads * out_batch + head * out_head + row % queries * out_token
    tl.store(out_ptr + channel, narrow(out, out_ptr), mask=channel < DV)
    tl.store(lse_ptr + row, lse)


# ---- launchers ---------------------------------------------------------------------------------------------------


class Tiles(NamedTuple):
    """Queries and keys a program holds at a time, and how it is compiled."""

    m: int
    n: int
    num_warps: int
    num_stages: int


# By the wider of the head dims, up to 64, 128 and 256: what spills nothing; not timed yet. gfx942 has 64 KB of shared memory and
# another pipeline. A kernel without tiles for a chip of its own takes those of sm_80.
_TILES = {
    ("forward", "sm_80"): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2)),
    ("forward", "gfx942"): (Tiles(128, 64, 8, 1), Tiles(64, 64, 8, 1), Tiles(32, 32, 8, 1)),
    ("key_value", "sm_80"): (Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 1)),
    ("key_value", "sm_90"): (Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(16, 64, 8, 2)),
    ("key_value", "sm_100"): (Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(16, 64, 8, 1)),
    ("key_value", "gfx942"): (Tiles(16, 64, 4, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
    ("query", "sm_80"): (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 16, 8, 2)),
    ("query", "gfx942"): (Tiles(128, 64, 8, 1), Tiles(128, 32, 8, 1), Tiles(64, 16, 8, 1)),
}
_FP32_TILES = {
    ("forward", "sm_80"): Tiles(16, 32, 8, 2),
    ("forward", "gfx942"): Tiles(16, 32, 8, 1),
    ("key_value", "sm_80"): Tiles(16, 16, 4, 2),
    ("key_value", "gfx942"): Tiles(16, 16, 4, 1),
    ("query", "sm_80"): Tiles(16, 16, 4, 2),
    ("query", "gfx942"): Tiles(16, 16, 4, 1),
}
# Boolean masks, and the arithmetic of windows and sinks beside a wide block of weights, take registers of their own.
_MASK_TILES = {
    ("forward", "sm_80"): (Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 1)),
    ("query", "sm_80"): (Tiles(64, 64, 4, 1), Tiles(128, 32, 8, 1), Tiles(64, 16, 8, 2)),
    ("forward", "gfx942"): (Tiles(128, 64, 8, 1), Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
    ("key_value", "gfx942"): (Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 8, 1)),
    ("query", "gfx942"): (Tiles(64, 32, 4, 1), Tiles(128, 32, 8, 1), Tiles(64, 16, 8, 1)),
}


def _tiles(kernel: str, flags: dict[str, Any], dtype: torch.dtype, chip: str) -> Tiles:
    def of(table: dict[tuple[str, str], Any]) -> Any:
        return table.get((kernel, chip)) or (None if chip == "gfx942" else table.get((kernel, "sm_80")))

    if dtype == torch.float32:
        return of(_FP32_TILES)  # type: ignore[no-any-return]
    width = max(flags["BLOCK_D"], flags["BLOCK_DV"])
    crowded = flags["MASK"] or (kernel == "forward" and (flags["SINKS"] or (flags["WINDOW"] and width <= 64)))
    chosen = (of(_MASK_TILES) if crowded else None) or of(_TILES)
    return chosen[0 if width <= 64 else 1 if width <= 128 else 2]  # type: ignore[no-any-return]


def _chip(device: torch.device) -> str:
    """The one of sm_80, sm_90, sm_100 and gfx942 whose tiles a device takes; the interpreter is none of them."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "sm_80"
    return {8: "sm_80", 9: "sm_90"}.get(torch.cuda.get_device_capability(device)[0], "sm_100")


def _passes(flags: dict[str, Any], dtype: torch.dtype) -> tuple[tuple[bool, bool], ...]:
    """Which of the gradients of keys and values a launch makes: the sums of both at once do not fit at 256 channels."""
    both = max(flags["BLOCK_D"], flags["BLOCK_DV"]) <= 128
    return ((True, True),) if both else ((True, False), (False, True))


def _dense(flags: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether blocks that need no mask have a loop of their own; in fp32 its copy would not fit the registers."""
    return not (flags["WINDOW"] or flags["MASK"]) and dtype != torch.float32


def _width(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))


def _whole_rows(t: Tensor) -> Tensor:
    """With channels side by side, and tokens so near that offsets within a block fit 32 bits."""
    return t if t.stride(-1) == 1 and t.stride(0 if t.dim() == 3 else 2) < 1 << 24 else t.contiguous()


def _whole_mask(mask: Tensor) -> Tensor:
    return mask if max(mask.stride()[2:]) < 1 << 24 else mask.contiguous()


def _steps(t: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token; a packed tensor is one batch."""
    return (0, t.stride(1), t.stride(0)) if t.dim() == 3 else (t.stride(0), t.stride(1), t.stride(2))


def _table(bounds: Tensor, tokens: int, block: int) -> Tensor:
    """(programs, 2) int32: of each program its document and its block there, past the end for the programs to spare."""
    counts = (bounds[1:] - bounds[:-1] + (block - 1)) // block
    ends = counts.cumsum(0)
    program = torch.arange(triton.cdiv(tokens, block) + counts.numel(), device=bounds.device)
    document = torch.searchsorted(ends, program, right=True)
    spare = document >= counts.numel()
    document = document.clamp(max=counts.numel() - 1)
    inside = (program - (ends - counts)[document]).masked_fill(spare, 1 << 20)
    return torch.stack((document, inside), 1).int()


class _Call(NamedTuple):
    """What all kernels of a call are given."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None
    mask: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    numbers: dict[str, Any]
    flags: dict[str, Any]

    def blocks(self, of_queries: bool, block: int) -> tuple[int, Tensor | None]:
        """How many programs a head takes, and their table."""
        t, bounds = (self.q, self.cu_q) if of_queries else (self.k, self.cu_k)
        if bounds is None:
            return triton.cdiv(t.shape[2], block), None
        table = _table(bounds, t.shape[0], block)
        return table.shape[0], table

    def pointers(self, table: Tensor | None) -> tuple[Tensor, ...]:
        """Slopes, mask, table and bounds; any tensor where there is none."""
        return tuple(self.q if t is None else t for t in (self.slopes, self.mask, table, self.cu_q, self.cu_k))

    def mask_steps(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.mask is None else self.mask.stride()


def _call(
    q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, mask: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, scale: float, causal: bool, window: int, sinks: int, softcap: float,
) -> _Call:  # fmt: skip
    q, k, v = _whole_rows(q), _whole_rows(k), _whole_rows(v)
    packed = cu_seqlens_q is not None
    queries, keys = (q.shape[0], k.shape[0]) if packed else (q.shape[2], k.shape[2])
    window, sinks = window if window < keys else 0, min(sinks, keys)
    numbers = {
        "heads": q.shape[1], "group": q.shape[1] // k.shape[1], "queries": queries, "keys": keys, "tokens": queries,
        "scale_log2": scale * LOG2_E, "cap_in": scale / softcap if softcap else 0.0, "cap_out": softcap * LOG2_E,
        "window": window, "sinks": sinks,
    }  # fmt: skip
    flags = {
        "D": q.shape[-1], "BLOCK_D": _width(q.shape[-1]), "DV": v.shape[-1], "BLOCK_DV": _width(v.shape[-1]),
        "CAUSAL": causal, "WINDOW": window > 0, "SINKS": window > 0 and sinks > 0, "MASK": mask is not None,
        "CAP": softcap > 0, "ALIBI": alibi_slopes is not None, "PACKED": packed,
    }  # fmt: skip
    return _Call(
        q, k, v, None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        None if mask is None else _whole_mask(mask).view(torch.uint8), cu_seqlens_q if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        cu_seqlens_k if cu_seqlens_k is None else cu_seqlens_k.contiguous(), numbers, flags,
    )  # fmt: skip


def _fresh_out(q: Tensor, channels: int) -> Tensor:
    """The heads of a token side by side; not a view of another tensor."""
    if q.dim() == 3:
        return q.new_empty(q.shape[0], q.shape[1], channels)
    batch, heads, queries = q.shape[:3]
    row = heads * channels
    return q.new_empty_strided((batch, heads, queries, channels), (queries * row, channels, row, 1))


def forward(
    q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, scale: float, causal: bool, window: int, sinks: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    c = _call(q, k, v, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k, scale, causal, window, sinks, softcap)
    out = _fresh_out(q, v.shape[-1])
    lse = q.new_empty((q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3], dtype=torch.float32)
    lost = torch.empty_like(lse)
    if lse.numel():
        tiles = _tiles("forward", c.flags, q.dtype, _chip(q.device))
        blocks, table = c.blocks(True, tiles.m)
        sink = c.q if sink_logits is None else sink_logits.float().contiguous()
        _forward_kernel[(blocks * (lse.numel() // c.numbers["tokens"]),)](
            c.q, c.k, c.v, out, lse, lost, sink, *c.pointers(table), *_steps(c.q), *_steps(c.k), *_steps(c.v), *_steps(out),
            *c.mask_steps(), blocks, **c.numbers, **c.flags, DENSE=_dense(c.flags, q.dtype),
            SINK_LOGITS=sink_logits is not None, PRECISE=q.dtype == torch.float32, M=tiles.m, N=tiles.n,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    return out, lse, lost


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lost: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None, mask: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, scale: float, causal: bool, window: int, sinks: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    c = _call(q, k, v, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k, scale, causal, window, sinks, softcap)
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if lse.numel() == 0 or k.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    grad_out, out, lse = _whole_rows(grad_out), _whole_rows(out), lse.contiguous()
    lost, precise = lost.contiguous(), q.dtype == torch.float32
    delta = torch.empty_like(lse)
    tokens = c.numbers["tokens"]
    rows = lse.numel() // tokens
    many = triton.cdiv(tokens, 64)
    _delta_kernel[(many * rows,)](
        out, grad_out, lse if grad_lse is None else grad_lse.float().contiguous(), delta, *_steps(out), *_steps(grad_out),
        many, c.numbers["heads"], tokens, HAS_GRAD_LSE=grad_lse is not None, DV=c.flags["DV"],
        BLOCK_DV=c.flags["BLOCK_DV"], M=64,
    )  # fmt: skip
    operands = (*_steps(c.q), *_steps(c.k), *_steps(c.v), *_steps(grad_out))
    tiles = _tiles("key_value", c.flags, q.dtype, _chip(q.device))
    blocks, table = c.blocks(False, tiles.n)
    for grad_of_k, grad_of_v in _passes(c.flags, q.dtype):
        _key_value_kernel[(blocks * (rows // c.numbers["group"]),)](
            c.q, c.k, c.v, grad_out, lse, lost, delta, grad_k, grad_v, *c.pointers(table), *operands, *_steps(grad_k),
            *_steps(grad_v), *c.mask_steps(), blocks, **c.numbers, **c.flags, scale=scale, GRAD_K=grad_of_k,
            GRAD_V=grad_of_v, PRECISE=precise, M=tiles.m, N=tiles.n, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip
    tiles = _tiles("query", c.flags, q.dtype, _chip(q.device))
    blocks, table = c.blocks(True, tiles.m)
    _query_kernel[(blocks * rows,)](
        c.q, c.k, c.v, grad_out, lse, lost, delta, grad_q, *c.pointers(table), *operands, *_steps(grad_q), *c.mask_steps(),
        blocks, **c.numbers, **c.flags, DENSE=_dense(c.flags, q.dtype), PRECISE=precise, scale=scale, M=tiles.m, N=tiles.n,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


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
        out, lse = _fresh_out(q, v_cache.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)
        for n, part in enumerate(parts):
            out[:, :, n * most : (n + 1) * most], lse[:, :, n * most : (n + 1) * most] = part
        return out, lse
    c = _call(q, k_cache, v_cache, alibi_slopes, None, None, None, scale, True, window, sinks, softcap)
    window, sinks = c.numbers["window"], c.numbers["sinks"]
    batch, heads, queries, _ = q.shape
    kv_heads, room, channels = k_cache.shape[1], k_cache.shape[2], v_cache.shape[-1]
    out = _fresh_out(q, channels)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if not lse.numel():
        return out, lse
    reach = min(room, window + queries + sinks) if window else room
    splits = _splits(q.device, batch * kv_heads, reach)
    sums = q.new_empty((splits, lse.numel(), channels), dtype=torch.float32)
    stats = q.new_empty((splits, lse.numel(), 2), dtype=torch.float32)
    flags = {n: c.flags[n] for n in ("D", "BLOCK_D", "DV", "BLOCK_DV", "WINDOW", "SINKS", "CAP", "ALIBI")}
    numbers = {n: c.numbers[n] for n in ("group", "queries", "scale_log2", "cap_in", "cap_out", "window", "sinks")}
    block, warps = _decode_tiles(q.dtype)
    _decode_kernel[(batch * kv_heads, splits)](
        c.q, c.k, c.v, cache_lengths.contiguous(), c.q if c.slopes is None else c.slopes, sums, stats, *_steps(c.q),
        *_steps(c.k), *_steps(c.v), kv_heads, **numbers, **flags, M=_width(c.numbers["group"] * queries), N=block,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    _join_kernel[(lse.numel(),)](
        sums, stats, c.q if sink_logits is None else sink_logits.float().contiguous(), out, lse, *_steps(out), heads,
        queries, splits, SINK_LOGITS=sink_logits is not None, DV=channels, BLOCK_DV=c.flags["BLOCK_DV"],
    )  # fmt: skip
    return out, lse


_MOST_DECODED = 64  # rows of a program: new tokens times the heads that share a key head


def _decode_tiles(dtype: torch.dtype) -> tuple[int, int]:
    """Keys a program holds at a time, and its warps."""
    return (32, 8) if dtype == torch.float32 else (64, 4)


def _splits(device: torch.device, programs: int, keys: int) -> int:
    """Shares of the cache: enough programs to fill the chip twice over, none of fewer than 256 keys."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(triton.cdiv(2 * processors, programs), triton.cdiv(keys, 256)))


# ---- shipped configurations --------------------------------------------------------------------------------------


def configurations() -> list[Configuration]:
    """Head dims of models in each dtype, and the masks that models use at head dim 128; token and head strides are
    multiples of 16, as projections leave them."""
    dense = {"CAUSAL": True}
    cases: list[tuple[str, int, torch.dtype, dict[str, bool]]] = [
        ("causal", 64, torch.bfloat16, dense),
        ("causal", 128, torch.bfloat16, dense),
        ("causal", 128, torch.float16, dense),
        ("causal", 128, torch.float32, dense),
        ("causal", 256, torch.bfloat16, dense),
        ("window and sinks", 128, torch.bfloat16, {"CAUSAL": True, "WINDOW": True, "SINKS": True}),
        ("packed", 128, torch.bfloat16, {"CAUSAL": True, "PACKED": True}),
        ("mask", 128, torch.bfloat16, {"MASK": True}),
        ("window, cap", 256, torch.bfloat16, {"CAUSAL": True, "WINDOW": True, "CAP": True}),
        ("window, sink logits", 64, torch.bfloat16, {"CAUSAL": True, "WINDOW": True, "SINK_LOGITS": True}),
    ]
    return [c for case in cases for c in _shipped(*case)] + [
        _shipped_decode(128, torch.bfloat16, 4), _shipped_decode(64, torch.bfloat16, 8), _shipped_decode(128, torch.float32, 4)
    ]  # fmt: skip


def _shipped(name: str, width: int, dtype: torch.dtype, flags: dict[str, bool]) -> list[Configuration]:
    names = ("CAUSAL", "WINDOW", "SINKS", "MASK", "CAP", "ALIBI", "PACKED")
    constants: dict[str, Any] = {n: flags.get(n, False) for n in names}
    constants |= {"D": width, "BLOCK_D": width, "DV": width, "BLOCK_DV": width, "mask_k": 1}
    t, matrix = triton_type(dtype), dtype != torch.float32
    signature = {
        n: t for n in ("q_ptr", "k_ptr", "v_ptr", "grad_ptr", "grad_q_ptr", "grad_k_ptr", "grad_v_ptr", "out_ptr")
    }
    signature |= dict.fromkeys(("lse_ptr", "lost_ptr", "delta_ptr", "sink_ptr", "slope_ptr"), "*fp32")
    signature |= {"mask_ptr": "*u8", **dict.fromkeys(("table_ptr", "cu_q_ptr", "cu_k_ptr"), "*i32")}
    for part in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v"):
        signature |= {f"{part}_batch": "i64:16", f"{part}_head": "i32:16", f"{part}_token": "i32:16"}
    signature |= {"mask_batch": "i64:16", "mask_head": "i64:16", "mask_q": "i32:16"}
    signature |= dict.fromkeys(("blocks", "heads", "group", "queries", "keys", "tokens", "window", "sinks"), "i32")
    signature |= dict.fromkeys(("scale", "scale_log2", "cap_in", "cap_out"), "fp32")
    heads, length, seen = 16, 16384, 4100 if flags.get("WINDOW") else 8192
    rows = heads * length
    label = f"{name} {t[1:]} head dim {width}"
    shape = f"1×{heads}×{length}×{width}" + (", window 4096" if flags.get("WINDOW") else "")
    found = []
    for kernel, name_of, what, products, tensors in (
        (_forward_kernel, "forward", "forward", 2, 4),
        (_key_value_kernel, "key_value", "backward of keys and values", 4, 6),
        (_query_kernel, "query", "backward of queries", 3, 5),
    ):
        fixed = dict(constants)
        if kernel is not _key_value_kernel:
            fixed["DENSE"] = _dense(constants, dtype)
        if kernel is _forward_kernel:
            fixed["SINK_LOGITS"] = flags.get("SINK_LOGITS", False)
        fixed["PRECISE"] = dtype == torch.float32
        work = Work(shape, tensors * rows * width * dtype.itemsize, products * 2 * rows * seen * width)
        passes = _passes(constants, dtype) if kernel is _key_value_kernel else ((True, True),)
        for grad_k, grad_v in passes:
            part = what if len(passes) == 1 else f"backward of {'keys' if grad_k else 'values'}"
            if kernel is _key_value_kernel:
                fixed |= {"GRAD_K": grad_k, "GRAD_V": grad_v}
            for tiles, chips in _by_tiles(name_of, constants, dtype).items():
                found.append(
                    Configuration(
                        kernel,
                        signature,
                        {**fixed, "M": tiles.m, "N": tiles.n},
                        num_warps=tiles.num_warps,
                        num_stages=tiles.num_stages,
                        label=f"attention {part}, {label} ({'/'.join(chips)})",
                        matrix=matrix,
                        work=work,
                        targets=chips,
                    )
                )
    return found


def _by_tiles(kernel: str, flags: dict[str, Any], dtype: torch.dtype) -> dict[Tiles, tuple[str, ...]]:
    chips: dict[Tiles, tuple[str, ...]] = {}
    for chip in ("sm_80", "sm_90", "sm_100", "gfx942"):
        tiles = _tiles(kernel, flags, dtype, chip)
        chips[tiles] = (*chips.get(tiles, ()), chip)
    return chips


def _shipped_decode(width: int, dtype: torch.dtype, group: int) -> Configuration:
    t = triton_type(dtype)
    signature = {"q_ptr": t, "k_ptr": t, "v_ptr": t, "lengths_ptr": "*i32"}
    signature |= dict.fromkeys(("slope_ptr", "sums_ptr", "stats_ptr"), "*fp32")
    for part in ("q", "k", "v"):
        signature |= {f"{part}_batch": "i64:16", f"{part}_head": "i32:16", f"{part}_token": "i32:16"}
    signature |= dict.fromkeys(("kv_heads", "group", "queries", "window", "sinks"), "i32")
    signature |= dict.fromkeys(("scale_log2", "cap_in", "cap_out"), "fp32")
    constants = {
        "D": width,
        "BLOCK_D": width,
        "DV": width,
        "BLOCK_DV": width,
        "M": _width(group),
        "N": _decode_tiles(dtype)[0],
    }
    constants |= {"WINDOW": False, "SINKS": False, "CAP": False, "ALIBI": False}
    work = Work(f"16×8×16384×{width}", 2 * 16 * 8 * 16384 * width * dtype.itemsize)
    return Configuration(
        _decode_kernel, signature, constants, num_warps=_decode_tiles(dtype)[1], num_stages=2,
        label=f"attention decode, group {group} {t[1:]} head dim {width}", work=work,
    )  # fmt: skip
