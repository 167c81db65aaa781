"""The backward pass: the gradients of keys and values, and those of queries. No atomics: results repeat to the last bit.

For the gradients of keys and values a program holds a block of keys and goes over the queries that see any of them, all
heads that share the keys after one another; for those of queries it is as in the forward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._numeric import add_product, narrow_to, product
from fastllm.kernels.triton.attention.blocks import (
    COUNTS,
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
from fastllm.kernels.triton.attention.call import describable, prepare, rows_of, steps, whole_rows
from fastllm.kernels.triton.attention.tiles import is_dense, passes, tiles_for


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    lost: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None, mask: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, scale: float, causal: bool, window: int, sinks: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    c = prepare(q, k, v, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k, scale, causal, window, sinks, softcap)
    grad_q, grad_k, grad_v = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    if lse.numel() == 0 or k.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    grad_out, out, lse = whole_rows(grad_out), whole_rows(out), lse.contiguous()
    lost, precise = lost.contiguous(), q.dtype == torch.float32
    delta = torch.empty_like(lse)
    tokens = c.numbers["tokens"]
    rows = lse.numel() // tokens
    block = delta_rows(c.flags["BLOCK_DV"], q.element_size())
    many = triton.cdiv(tokens, block)
    delta_kernel[(many * rows,)](
        out, grad_out, lse if grad_lse is None else grad_lse.float().contiguous(), delta, *steps(out), *steps(grad_out),
        many, c.numbers["heads"], tokens, HAS_GRAD_LSE=grad_lse is not None, DV=c.flags["DV"],
        BLOCK_DV=c.flags["BLOCK_DV"], M=block,
    )  # fmt: skip
    operands = (*steps(c.q), *steps(c.k), *steps(c.v), *steps(grad_out))
    tiles = tiles_for("key_value", c.flags, q.dtype, c.chip, describable(c.q, grad_out))
    blocks, table = c.blocks(False, tiles.n)
    q_rows, grad_rows = (rows_of(t, tiles.m, tiles.descriptors) for t in (c.q, grad_out))
    for grad_of_k, grad_of_v in passes(c.flags, q.dtype):
        key_value_kernel[(blocks * (rows // c.numbers["group"]),)](
            q_rows, c.k, c.v, grad_rows, lse, lost, delta, grad_k, grad_v, *c.pointers(table), *operands, *steps(grad_k),
            *steps(grad_v), *c.mask_steps(), blocks, **c.numbers, **c.flags, **c.lists(False, tiles), scale=scale,
            GRAD_K=grad_of_k, GRAD_V=grad_of_v, PRECISE=precise, **tiles.options(),
        )  # fmt: skip
    tiles = tiles_for("query", c.flags, q.dtype, c.chip, describable(c.k, c.v))
    blocks, table = c.blocks(True, tiles.m)
    k_rows, v_rows = (rows_of(t, tiles.n, tiles.descriptors) for t in (c.k, c.v))
    query_kernel[(blocks * rows,)](
        c.q, k_rows, v_rows, grad_out, lse, lost, delta, grad_q, *c.pointers(table), *operands, *steps(grad_q),
        *c.mask_steps(), blocks, **c.numbers, **c.flags, **c.lists(True, tiles), DENSE=is_dense(c.flags, q.dtype),
        PRECISE=precise, scale=scale, **tiles.options(),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def delta_rows(width: int, bytes_each: int) -> int:
    """Rows of a program that sums them: 8192 values of each operand in 16 bits, half as many in 32."""
    return max(16, min(64, 16384 // (bytes_each * width)))


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(
    out_ptr, grad_ptr, grad_lse_ptr, delta_ptr, out_batch, out_head, out_token, grad_batch, grad_head, grad_token, blocks,
    heads, tokens, HAS_GRAD_LSE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """The row sums of out * grad_out, less the gradient of lse."""
    row, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * M
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    out = load_rows(out_ptr + batch * out_batch + head * out_head, first, tokens, out_token, M, DV, BLOCK_DV)
    grad = load_rows(grad_ptr + batch * grad_batch + head * grad_head, first, tokens, grad_token, M, DV, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    i = first + tl.arange(0, M)
    at = row.to(tl.int64) * tokens + i
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + at, mask=i < tokens, other=0.0)
    tl.store(delta_ptr + at, delta, mask=i < tokens)


@triton.jit(do_not_specialize=COUNTS)
def key_value_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, lost_ptr, delta_ptr, grad_k_ptr, grad_v_ptr, slope_ptr, mask_ptr, table_ptr,
    cu_q_ptr, cu_k_ptr, q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head,
    grad_token, grad_k_batch, grad_k_head, grad_k_token, grad_v_batch, grad_v_head, grad_v_token, mask_batch, mask_head,
    mask_q, mask_k, blocks, heads, group, queries, keys, tokens, scale, scale_log2, cap_in, cap_out, window, sinks, list_ptr,
    count_ptr, list_batch, list_head, list_length, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr,
    GRAD_K: tl.constexpr, GRAD_V: tl.constexpr, PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    kv_heads = heads // group
    batch, kv_head = (row // kv_heads).to(tl.int64), (row % kv_heads).to(tl.int64)
    block, first_q, first_k, queries, keys = sequence(table_ptr, cu_q_ptr, cu_k_ptr, block, queries, keys, PACKED)
    first = block * N
    if first >= keys:
        return
    shift = keys - queries
    k = load_rows(k_ptr + batch * k_batch + kv_head * k_head + first_k * k_token, first, keys, k_token, N, D, BLOCK_D)
    v = load_rows(v_ptr + batch * v_batch + kv_head * v_head + first_k * v_token, first, keys, v_token, N, DV, BLOCK_DV)
    j = first + tl.arange(0, N)[:, None]
    begin, end = shift * 0, queries
    if CAUSAL and not MASK:
        begin = tl.minimum(tl.maximum(first - shift, 0), queries) // M * M
    if WINDOW and not MASK:
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
            slope = tl.load(slope_ptr + head) * LOG2_E
        q_here, grad_here = q_ptr, grad_ptr
        if not DESCRIPTORS:
            q_here += batch * q_batch + head * q_head + first_q * q_token
            grad_here += batch * grad_batch + head * grad_head + first_q * grad_token
        stats = (batch * heads + head) * tokens + first_q
        mask_here = mask_ptr + batch * mask_batch + head * mask_head
        list_here, room, jump = list_ptr, 0, 0
        if MASK:
            own = (batch * list_batch + head * list_head) * blocks + block
            list_here = list_ptr + own * list_length
            every, some = tl.load(count_ptr + 2 * own), tl.load(count_ptr + 2 * own + 1)
            room, jump, end = every * M, (list_length - every - some) * M, (every + some) * M
        grad_k, grad_v = _key_value_blocks(
            grad_k, grad_v, k, v, j, first, begin, end, q_here, grad_here, batch, head, lse_ptr + stats, lost_ptr + stats,
            delta_ptr + stats, q_token, grad_token, shift, queries, keys, slope, scale_log2, cap_in, cap_out, window, sinks,
            mask_here, mask_q, mask_k, list_here, room, jump, CAUSAL, WINDOW, SINKS, MASK, CAP, ALIBI, M, D, BLOCK_D, DV,
            BLOCK_DV, GRAD_K, GRAD_V, PRECISE, DESCRIPTORS, SPECIALIZED,
        )  # fmt: skip
    grad_k_ptr += batch * grad_k_batch + kv_head * grad_k_head + first_k * grad_k_token
    grad_v_ptr += batch * grad_v_batch + kv_head * grad_v_head + first_k * grad_v_token
    if GRAD_K:
        store_rows(grad_k_ptr, grad_k * scale, first, keys, grad_k_token, N, D, BLOCK_D)
    if GRAD_V:
        store_rows(grad_v_ptr, grad_v, first, keys, grad_v_token, N, DV, BLOCK_DV)


@triton.jit
def _key_value_blocks(
    grad_k, grad_v, k, v, j, j0, begin, end, q_ptr, grad_ptr, batch, head, lse_ptr, lost_ptr, delta_ptr, q_token, grad_token,
    shift, queries, keys, slope, scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, list_ptr, room, jump,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr,
    ALIBI: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    GRAD_K: tl.constexpr, GRAD_V: tl.constexpr, PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    for step in tl.range(begin, end, M, warp_specialize=SPECIALIZED):
        i0 = key_at(step, room, jump, list_ptr, M, False, MASK)
        q = block_rows(q_ptr, batch, head, i0, queries, q_token, M, D, BLOCK_D, DESCRIPTORS)
        grad = block_rows(grad_ptr, batch, head, i0, queries, grad_token, M, DV, BLOCK_DV, DESCRIPTORS)
        at = i0 + tl.arange(0, M)
        lse, lost = _logarithms(lse_ptr, lost_ptr, at, at < queries, PRECISE)
        products = product(k, tl.trans(q))
        i = at[None, :]
        scores, steep = bent_scores(products, i, j, shift, slope, scale_log2, cap_in, cap_out, CAP, ALIBI)
        weights = tl.exp2(scores - lse[None, :] - lost[None, :]) if PRECISE else tl.exp2(scores - lse[None, :])
        if CAUSAL or WINDOW or MASK:
            seen = pairs_seen(
                i, j, i0, j0, shift, queries, keys, window, sinks, mask_ptr, mask_q, mask_k, CAUSAL, WINDOW, SINKS,
                MASK, False,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        if GRAD_V:
            grad_v = add_product(grad_v, narrow_to(weights, k.dtype), grad)
        if GRAD_K:
            delta = tl.load(delta_ptr + at, mask=at < queries, other=0.0)
            grad_scores = weights * (product(v, tl.trans(grad)) - delta[None, :]) * steep
            grad_k = add_product(grad_k, narrow_to(grad_scores, k.dtype), q)
    return grad_k, grad_v


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, lost_ptr, delta_ptr, grad_q_ptr, slope_ptr, mask_ptr, table_ptr, cu_q_ptr, cu_k_ptr,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, grad_batch, grad_head, grad_token,
    grad_q_batch, grad_q_head, grad_q_token, mask_batch, mask_head, mask_q, mask_k, blocks, heads, group, queries, keys, tokens,
    scale, scale_log2, cap_in, cap_out, window, sinks, list_ptr, count_ptr, list_batch, list_head,
    list_length, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, ALIBI: tl.constexpr, PACKED: tl.constexpr, DENSE: tl.constexpr,
    PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if not PACKED:
        block = blocks - 1 - block
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    block, first_q, first_k, queries, keys = sequence(table_ptr, cu_q_ptr, cu_k_ptr, block, queries, keys, PACKED)
    first = block * M
    if first >= queries:
        return
    shift = keys - queries
    at = first + tl.arange(0, M)
    i = at[:, None]
    q = load_rows(q_ptr + batch * q_batch + head * q_head + first_q * q_token, first, queries, q_token, M, D, BLOCK_D)
    grad_ptr += batch * grad_batch + head * grad_head + first_q * grad_token
    grad = load_rows(grad_ptr, first, queries, grad_token, M, DV, BLOCK_DV)
    stats = row.to(tl.int64) * tokens + first_q + at
    lse, lost = _logarithms(lse_ptr, lost_ptr, stats, at < queries, PRECISE)
    delta = tl.load(delta_ptr + stats, mask=at < queries, other=0.0)
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
    last = tl.minimum(first + M, queries) - 1
    room, jump, edge, end = key_steps(
        first, last, shift, keys, window, sinks, list_ptr, count_ptr, list_length, N, CAUSAL, WINDOW, SINKS, MASK, DENSE
    )
    grad_q = tl.zeros([M, BLOCK_D], tl.float32)
    if DENSE:
        grad_q = _query_blocks(
            grad_q, q, grad, lse, lost, delta, i, first, 0, edge, k_ptr, v_ptr, batch, kv_head, k_token, v_token, shift,
            queries, keys, slope, scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, list_ptr, room, jump,
            False, CAUSAL, WINDOW, SINKS, MASK, CAP, ALIBI, N, D, BLOCK_D, DV, BLOCK_DV, PRECISE, DESCRIPTORS, SPECIALIZED,
        )  # fmt: skip
    grad_q = _query_blocks(
        grad_q, q, grad, lse, lost, delta, i, first, edge, end, k_ptr, v_ptr, batch, kv_head, k_token, v_token, shift,
        queries, keys, slope, scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, list_ptr, room, jump,
        True, CAUSAL, WINDOW, SINKS, MASK, CAP, ALIBI, N, D, BLOCK_D, DV, BLOCK_DV, PRECISE, DESCRIPTORS, SPECIALIZED,
    )  # fmt: skip
    grad_q_ptr += batch * grad_q_batch + head * grad_q_head + first_q * grad_q_token
    store_rows(grad_q_ptr, grad_q * scale, first, queries, grad_q_token, M, D, BLOCK_D)


@triton.jit
def _query_blocks(
    grad_q, q, grad, lse, lost, delta, i, i0, begin, end, k_ptr, v_ptr, batch, kv_head, k_token, v_token, shift, queries,
    keys, slope, scale_log2, cap_in, cap_out, window, sinks, mask_ptr, mask_q, mask_k, list_ptr, room, jump,
    EDGE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr,
    CAP: tl.constexpr, ALIBI: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISE: tl.constexpr, DESCRIPTORS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    for step in tl.range(begin, end, N, warp_specialize=SPECIALIZED):
        j0 = key_at(step, room, jump, list_ptr, N, SINKS, MASK)
        k = block_rows(k_ptr, batch, kv_head, j0, keys, k_token, N, D, BLOCK_D, DESCRIPTORS)
        v = block_rows(v_ptr, batch, kv_head, j0, keys, v_token, N, DV, BLOCK_DV, DESCRIPTORS)
        j = j0 + tl.arange(0, N)[None, :]
        products = product(q, tl.trans(k))
        scores, steep = bent_scores(products, i, j, shift, slope, scale_log2, cap_in, cap_out, CAP, ALIBI)
        weights = tl.exp2(scores - lse[:, None] - lost[:, None]) if PRECISE else tl.exp2(scores - lse[:, None])
        if EDGE:
            seen = pairs_seen(
                i, j, i0, j0, shift, queries, keys, window, sinks, mask_ptr, mask_q, mask_k, CAUSAL, WINDOW, SINKS,
                MASK, True,
            )  # fmt: skip
            weights = tl.where(seen, weights, 0.0)
        grad_scores = weights * (product(grad, tl.trans(v)) - delta[:, None]) * steep
        grad_q = add_product(grad_q, narrow_to(grad_scores, q.dtype), k)
    return grad_q


@triton.jit
def _logarithms(lse_ptr, lost_ptr, at, there, PRECISE: tl.constexpr):
    """Of softmax denominators to base 2, for scores in those units, and what their rounding to fp32 lost (0 unless PRECISE)."""
    lse = tl.load(lse_ptr + at, mask=there, other=float("-inf"))
    blind = lse == float("-inf")  # who sees nothing has no weights
    if PRECISE:
        exact = (lse.to(tl.float64) + tl.load(lost_ptr + at, mask=there, other=0.0).to(tl.float64)) * LOG2_E
        rounded = exact.to(tl.float32)
        lost = tl.where(blind, 0.0, (exact - rounded.to(tl.float64)).to(tl.float32))
    else:
        rounded = lse * LOG2_E
        lost = 0.0
    return tl.where(blind, float("inf"), rounded), lost
