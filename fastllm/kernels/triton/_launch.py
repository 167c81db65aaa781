"""What the launchers share: block sizes, program counts, and shipped configurations, which compile anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

# A row up to this many channels is kept in registers; a longer one is read in steps of LOOP_BLOCK, the second time from
# the cache.
MAX_BLOCK = 8192
LOOP_BLOCK = 2048


@dataclass(frozen=True)
class Work:
    """What one launch at a representative shape must at least do, from the definition of the op.

    bytes: inputs read once and outputs written once; what is small beside them is left out. flops: those of the matrix
    products.
    """

    shape: str
    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Configuration:
    """One shipped specialisation of a kernel: everything ``triton.compile`` needs to build it without a GPU.

    signature maps each run-time argument to a Triton type ("*bf16", "fp32", "i64"; "i32:16" for an integer that is a
    multiple of 16, which lets loads be vectorised as they are at run time), constants each constexpr to its value; the
    launcher uses the same num_warps and num_stages for these constants. With a `work`, the time it takes at least on
    each chip is estimated.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    label: str = ""
    matrix: bool = field(default=False, kw_only=True)  # the inner loop must use the chip's matrix instructions
    work: Work | None = field(default=None, kw_only=True)
    targets: tuple[str, ...] = field(default=(), kw_only=True)  # of _static.TARGETS, where not the same for all


def block_for(channels: int) -> int:
    """The power of two that holds a row, or LOOP_BLOCK where none up to MAX_BLOCK does."""
    block = triton.next_power_of_2(max(channels, 16))
    return block if block <= MAX_BLOCK else LOOP_BLOCK


def warps_for(block: int, elements_per_thread: int = 16) -> int:
    """Warps that leave each thread at most so many elements of a row: 4 to 32."""
    return min(32, max(4, block // (32 * elements_per_thread)))


def program_count(device: torch.device, rows: int, per_processor: int = 4) -> int:
    """Programs for a kernel that loops over rows and keeps a running sum: enough to fill the chip, at most rows."""
    if device.type != "cuda":
        return min(rows, 2)
    return min(rows, per_processor * torch.cuda.get_device_properties(device).multi_processor_count)


def triton_type(dtype: torch.dtype) -> str:
    """A pointer to `dtype` in a Triton signature."""
    return {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
