"""What the launchers give their kernels: tensors that the kernels can read, numbers, flags, and tables of documents."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastllm.kernels.triton.attention.mask_blocks import mask_lists
from fastllm.kernels.triton.attention.tiles import Tiles, chip_of

_LOG2_E = math.log2(math.e)


class Call(NamedTuple):
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
    chip: str

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

    def lists(self, of_queries: bool, tiles: Tiles) -> dict[str, Any]:
        """Which blocks of keys the mask leaves to each block of queries, or the other way round, as kernels are told it."""
        if self.mask is None:
            return {"list_ptr": self.q, "count_ptr": self.q, "list_batch": 0, "list_head": 0, "list_length": 0}
        causal, window, sinks = self.flags["CAUSAL"], self.numbers["window"], self.numbers["sinks"]
        found = mask_lists(self.mask, of_queries, tiles.m, tiles.n, causal, window, sinks)
        return {
            "list_ptr": found.blocks, "count_ptr": found.counts, "list_batch": found.batch, "list_head": found.head,
            "list_length": found.length,
        }  # fmt: skip

    def mask_steps(self) -> tuple[int, ...]:
        return (0, 0, 0, 0) if self.mask is None else self.mask.stride()


def prepare(
    q: Tensor, k: Tensor, v: Tensor, alibi_slopes: Tensor | None, mask: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, scale: float, causal: bool, window: int, sinks: int, softcap: float,
) -> Call:  # fmt: skip
    q, k, v = whole_rows(q), whole_rows(k), whole_rows(v)
    packed = cu_seqlens_q is not None
    queries, keys = (q.shape[0], k.shape[0]) if packed else (q.shape[2], k.shape[2])
    window, sinks = window if window < keys else 0, min(sinks, keys)
    numbers = {
        "heads": q.shape[1], "group": q.shape[1] // k.shape[1], "queries": queries, "keys": keys, "tokens": queries,
        "scale_log2": scale * _LOG2_E, "cap_in": scale / softcap if softcap else 0.0, "cap_out": softcap * _LOG2_E,
        "window": window, "sinks": sinks,
    }  # fmt: skip
    flags = {
        "D": q.shape[-1], "BLOCK_D": width_of(q.shape[-1]), "DV": v.shape[-1], "BLOCK_DV": width_of(v.shape[-1]),
        "CAUSAL": causal, "WINDOW": window > 0, "SINKS": window > 0 and sinks > 0, "MASK": mask is not None,
        "CAP": softcap > 0, "ALIBI": alibi_slopes is not None, "PACKED": packed,
    }  # fmt: skip
    return Call(
        q, k, v, None if alibi_slopes is None else alibi_slopes.float().contiguous(),
        None if mask is None else _whole_mask(mask).view(torch.uint8), cu_seqlens_q if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
        cu_seqlens_k if cu_seqlens_k is None else cu_seqlens_k.contiguous(), numbers, flags, chip_of(q.device),
    )  # fmt: skip


def fresh_out(q: Tensor, channels: int) -> Tensor:
    """The heads of a token side by side; not a view of another tensor."""
    if q.dim() == 3:
        return q.new_empty(q.shape[0], q.shape[1], channels)
    batch, heads, queries = q.shape[:3]
    row = heads * channels
    return q.new_empty_strided((batch, heads, queries, channels), (queries * row, channels, row, 1))


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


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can serve: four dimensions, 16-bit elements, every row of channels on a multiple of 16 bytes."""
    return all(
        t.dim() == 4
        and t.itemsize == 2
        and t.numel() > 0
        and t.data_ptr() % 16 == 0
        and all(size == 1 or (step > 0 and step % 8 == 0) for size, step in zip(t.shape[:3], t.stride()[:3]))
        for t in tensors
    )


def rows_of(t: Tensor, block: int, descriptors: bool) -> Any:
    """A tensor as a kernel reads its blocks of tokens: itself, or its descriptor."""
    if not descriptors:
        return t
    # The step along a dimension of one element means nothing, and may be anything.
    strides = [8 if size == 1 else step for size, step in zip(t.shape[:3], t.stride()[:3])]
    return TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, block, width_of(t.shape[-1])])


def steps(t: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and token; a packed tensor is one batch."""
    return (0, t.stride(1), t.stride(0)) if t.dim() == 3 else (t.stride(0), t.stride(1), t.stride(2))


def whole_rows(t: Tensor) -> Tensor:
    """With channels side by side, and tokens so near that offsets within a block fit 32 bits."""
    return t if t.stride(-1) == 1 and t.stride(0 if t.dim() == 3 else 2) < 1 << 24 else t.contiguous()


def _whole_mask(mask: Tensor) -> Tensor:
    return mask if max(mask.stride()[2:]) < 1 << 24 else mask.contiguous()


def width_of(channels: int) -> int:
    return max(16, triton.next_power_of_2(channels))
