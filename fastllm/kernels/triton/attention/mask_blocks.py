"""Which blocks of a boolean mask anything is seen in, found once for a kernel's block sizes, so that the others are neither
loaded nor computed.

Of every block of queries, or of keys, a list of the blocks of the other kind: from its front those in which every pair sees
each other, which need no mask, and from its back those in which some do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration
from fastllm.kernels.triton.attention.blocks import pairs_seen

_KEYS, _ROWS = 256, 16  # of the mask that a program reads at a time
_LIST = 256  # blocks that a program sorts at a time
# With fewer warps the rows that a program reads at a time spill on sm_80.
_OPTIONS = {"num_warps": 8, "num_stages": 1}
_COUNTS = [
    "queries", "keys", "window", "sinks", "blocks_q", "blocks_k", "heads", "own", "others", "step_own", "step_other",
]  # fmt: skip


class Lists(NamedTuple):
    """What a kernel is given to find a block's list: blocks (rows, blocks, length), counts (rows, blocks, 2) of those where all
    and where some pairs see each other; batch and head: the steps between rows, 0 where the mask is the same for all."""

    blocks: Tensor
    counts: Tensor
    batch: int
    head: int
    length: int


def mask_lists(
    mask: Tensor, of_queries: bool, m: int, n: int, causal: bool, window: int, sinks: int
) -> Lists:  # mask: uint8, (B, H, Lq, Lk)
    """Of each block of m queries the blocks of n keys, or of each block of n keys the blocks of m queries."""
    batches, heads = (1 if mask.stride(d) == 0 else mask.shape[d] for d in (0, 1))
    queries, keys = mask.shape[2:]
    rows, blocks_q, blocks_k = batches * heads, triton.cdiv(queries, m), triton.cdiv(keys, n)
    state = mask.new_empty((rows, blocks_q, blocks_k), dtype=torch.int8)
    if state.numel():
        programs = rows * blocks_q * triton.cdiv(keys, _KEYS)
        _state_kernel[(programs,)](
            mask, state, *mask.stride(), heads, blocks_q, blocks_k, queries, keys, window, sinks, CAUSAL=causal,
            WINDOW=window > 0, SINKS=window > 0 and sinks > 0, M=m, N=n, ROWS=_ROWS, KEYS=_KEYS, **_OPTIONS,
        )  # fmt: skip
    own, others, steps = (blocks_q, blocks_k, (blocks_k, 1)) if of_queries else (blocks_k, blocks_q, (1, blocks_k))
    lists = mask.new_empty((rows, own, others), dtype=torch.int32)
    counts = mask.new_empty((rows, own, 2), dtype=torch.int32)
    if counts.numel():
        _list_kernel[(rows * own,)](state, lists, counts, own, others, *steps, CHUNK=_LIST, **_OPTIONS)
    return Lists(lists, counts, 0 if batches == 1 else heads, 0 if heads == 1 else 1, others)


@triton.jit(do_not_specialize=_COUNTS)
def _state_kernel(
    mask_ptr, state_ptr, mask_batch, mask_head, mask_q, mask_k, heads, blocks_q, blocks_k, queries, keys, window, sinks,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Of each block of M queries and N keys: 0 where no query sees a key, 2 where each sees every one, else 1."""
    parts = (keys + KEYS - 1) // KEYS
    block, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    row, block = (block // blocks_q).to(tl.int64), block % blocks_q
    mask_ptr += row // heads * mask_batch + row % heads * mask_head
    j = part * KEYS + tl.arange(0, KEYS)[None, :]
    some, every = tl.zeros([KEYS], tl.int32), tl.full([KEYS], 1, tl.int32)
    for first in range(block * M, tl.minimum((block + 1) * M, queries), ROWS):
        i = first + tl.arange(0, ROWS)[:, None]
        seen = pairs_seen(
            i, j, first, part * KEYS, keys - queries, queries, keys, window, sinks, mask_ptr, mask_q, mask_k, CAUSAL,
            WINDOW, SINKS, True, True,
        )  # fmt: skip
        some = tl.maximum(some, tl.max(seen.to(tl.int32), 0))
        every = tl.minimum(every, tl.min((seen | (i >= queries)).to(tl.int32), 0))
    some = tl.max(tl.reshape(some, (KEYS // N, N)), 1)
    every = tl.min(tl.reshape(every, (KEYS // N, N)), 1)
    other = part * (KEYS // N) + tl.arange(0, KEYS // N)
    tl.store(state_ptr + (row * blocks_q + block) * blocks_k + other, (some + every).to(tl.int8), mask=other < blocks_k)


@triton.jit(do_not_specialize=_COUNTS)
def _list_kernel(state_ptr, list_ptr, count_ptr, own, others, step_own, step_other, CHUNK: tl.constexpr):
    """The list of one block and how many there are of both kinds."""
    at = tl.program_id(0).to(tl.int64)
    state_ptr += at // own * own * others + at % own * step_own
    list_ptr += at * others
    every, some = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for first in range(0, others, CHUNK):
        other = first + tl.arange(0, CHUNK)
        state = tl.load(state_ptr + other.to(tl.int64) * step_other, mask=other < others, other=0)
        is_every, is_some = (state == 2).to(tl.int32), (state == 1).to(tl.int32)
        tl.store(list_ptr + every + tl.cumsum(is_every, 0) - 1, other, mask=state == 2)
        tl.store(list_ptr + others - some - tl.cumsum(is_some, 0), other, mask=state == 1)
        every += tl.sum(is_every, 0)
        some += tl.sum(is_some, 0)
    tl.store(count_ptr + 2 * at, every)
    tl.store(count_ptr + 2 * at + 1, some)


def configurations() -> list[Configuration]:
    """A mask alone and with all else that hides, of blocks as most calls have them, and the lists."""
    state = dict.fromkeys(("heads", "blocks_q", "blocks_k", "queries", "keys", "window", "sinks"), "i32")
    state |= {"mask_ptr": "*u8", "state_ptr": "*i8", "mask_batch": "i64:16", "mask_head": "i64:16", "mask_q": "i32:16"}
    sizes = {"M": 128, "N": 64, "ROWS": _ROWS, "KEYS": _KEYS, "mask_k": 1}
    lists = dict.fromkeys(("own", "others", "step_own", "step_other"), "i32")
    lists |= {"state_ptr": "*i8", "list_ptr": "*i32", "count_ptr": "*i32"}
    return [
        *(
            Configuration(
                _state_kernel, state, sizes | dict.fromkeys(("CAUSAL", "WINDOW", "SINKS"), hides), **_OPTIONS,
                label=f"attention, visible blocks of a mask{', causal, window and sinks' if hides else ''}",
            )
            for hides in (False, True)
        ),
        Configuration(_list_kernel, lists, {"CHUNK": _LIST}, **_OPTIONS, label="attention, lists of visible blocks"),
    ]  # fmt: skip
