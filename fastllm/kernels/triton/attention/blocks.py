"""What the passes share on the device: rows of a sequence, scores and what bends them, which pairs of queries and keys see
each other, and which blocks have any."""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels.triton._numeric import narrow

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(1 / 1.4426950408889634)
# Arguments of which Triton is to compile no special case for 1 or for multiples of 16.
COUNTS = [
    "blocks", "heads", "kv_heads", "group", "queries", "keys", "tokens", "window", "sinks", "splits", "list_batch", "list_head",
    "list_length",
]  # fmt: skip


@triton.jit
def sequence(table_ptr, cu_q_ptr, cu_k_ptr, block, queries, keys, PACKED: tl.constexpr):
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
def load_rows(pointer, first, count, step, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
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
def block_rows(
    source, batch, head, first, count, step, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """As load_rows, of a sequence to which `source` points, or which it describes as one of (batches, heads, tokens, channels):
    then the memory engine copies the block by itself, with zeros beyond the last token and channel."""
    if DESCRIPTORS:
        return source.load([batch.to(tl.int32), head.to(tl.int32), first, 0]).reshape(BLOCK, WIDTH)
    else:  # noqa: RET505 - one constexpr choice, of which Triton compiles one branch
        return load_rows(source, first, count, step, BLOCK, CHANNELS, WIDTH)


@triton.jit
def store_rows(pointer, value, first, count, step, BLOCK: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    row, channel = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    inside = (row < count - first)[:, None] & (channel < CHANNELS)[None, :]
    block = pointer + (tl.zeros([], tl.int64) + first) * step
    tl.store(block + (row[:, None] * step + channel[None, :]), narrow(value, pointer), mask=inside)


@triton.jit
def bent_scores(products, i, j, shift, slope, scale_log2, cap_in, cap_out, CAP: tl.constexpr, ALIBI: tl.constexpr):
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
def pairs_seen(
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
def key_range(
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
def whole_end(first, shift, keys, N: tl.constexpr, CAUSAL: tl.constexpr):
    """Up to where all queries from `first` on see all keys, without a window or a mask."""
    end = keys // N * N
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(first + shift + 1, 0) // N * N)
    return end


@triton.jit
def key_steps(
    first, last, shift, keys, window, sinks, list_ptr, count_ptr, length, N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """The steps of queries [first, last] over blocks of N keys: from which on they jump and how far, from which on pairs
    must be looked at, and where they end.

    With a mask they are those of its list. Dense: the blocks that all see, without arithmetic of masks, and then the edge. Else
    one loop: copies of it take registers.
    """
    if MASK:
        every, some = tl.load(count_ptr), tl.load(count_ptr + 1)
        room, jump = every * N, (length - every - some) * N
        end = (every + some) * N
        edge = room if DENSE else room * 0
    else:
        room, begin, end = key_range(first, last, shift, keys, window, sinks, N, CAUSAL, WINDOW, SINKS)
        jump, edge = begin - room, begin * 0
        if WINDOW and not SINKS:
            jump, edge = begin * 0, begin
        if DENSE:
            edge = whole_end(first, shift, keys, N, CAUSAL)
        end -= jump
    return room, jump, edge, end


@triton.jit
def key_at(step, room, jump, list_ptr, N: tl.constexpr, SINKS: tl.constexpr, MASK: tl.constexpr):
    """The first key of a step's block: from the last block of sinks they go on to the window, from those of which a mask
    shows all to those of which it shows some."""
    first = step
    if SINKS or MASK:
        first = step + tl.where(step < room, 0, jump)
    if MASK:
        first = tl.load(list_ptr + first // N) * N
    return first
