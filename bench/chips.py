"""What the chips that kernels are compiled for can hold and do, from their makers' documents: nothing here is measured.

Limits: CUDA C++ Programming Guide, "Compute Capabilities", with the rules of CUDA's cuda_occupancy.h; AMD's CDNA 3
instruction set reference with those of LLVM's AMDGPU backend. Peaks: data sheets, bf16 without sparsity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# On all four chips a multiprocessor has four schedulers, each with 512 registers for every lane of a warp, handed out
# to whole warps in steps of eight.
SCHEDULERS, REGISTERS, REGISTER_STEP = 4, 512, 8


@dataclass(frozen=True)
class Peak:
    """Published for one product: bytes a second of its memory and dense bf16 operations a second."""

    bytes_per_s: float
    flops_per_s: float

    def seconds(self, bytes_moved: float, flops: float) -> float:
        """The least time such work takes: that of the memory or of the matrix units, whichever is longer."""
        return max(bytes_moved / self.bytes_per_s, flops / self.flops_per_s)


@dataclass(frozen=True)
class Chip:
    """Limits of one multiprocessor; a warp is a wavefront on AMD. Shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_of_block: int
    peaks: Mapping[str, Peak]
    matrix_name: str
    matrix: str  # a regular expression for all of the chip's own matrix instructions
    lanes: int = 32
    shared_step: int = 128
    shared_reserved: int = 1024  # taken by each block besides its own
    tensor_columns: int = 0  # of tensor memory

    def occupancy(self, threads: int, registers: int, shared: int = 0, tensor_columns: int = 0) -> float:
        """The share of the warps a multiprocessor can hold that blocks like this fill; 0 where not even one fits."""
        warps = _divide_up(threads, self.lanes)
        warps_of_scheduler = REGISTERS // (REGISTER_STEP * max(1, _divide_up(registers, REGISTER_STEP)))
        if _divide_up(warps, SCHEDULERS) > warps_of_scheduler or shared > self.shared_of_block:
            return 0.0
        limits = [self.warps // warps, SCHEDULERS * warps_of_scheduler // warps]
        if self.lanes == 32 or warps > 1:  # AMD's limit is that of barriers; a block of one wavefront needs none
            limits.append(self.blocks)
        if taken := self.shared_step * _divide_up(shared + self.shared_reserved, self.shared_step):
            limits.append(self.shared // taken)
        if tensor_columns:
            limits.append(self.tensor_columns // tensor_columns)
        return min(limits) * warps / self.warps


def _divide_up(value: int, step: int) -> int:
    return -(-value // step)


CHIPS = {
    "sm_80": Chip(
        64, 32, 164 << 10, 163 << 10, {"A100": Peak(2039e9, 312e12)}, "HMMA", r"[A-Z]MMA"
    ),
    "sm_90": Chip(
        64, 32, 228 << 10, 227 << 10, {"H100": Peak(3350e9, 989e12), "H200": Peak(4800e9, 989e12)}, "HGMMA",
        r"[A-Z]GMMA",
    ),
    "sm_100": Chip(
        64, 32, 228 << 10, 227 << 10, {"B200": Peak(8000e9, 2250e12)}, "UTCHMMA", r"UTC[A-Z]*MMA", tensor_columns=512
    ),
    "gfx942": Chip(
        32, 16, 64 << 10, 64 << 10, {"MI300X": Peak(5300e9, 1307e12)}, "v_mfma", r"v_s?mfma.*", lanes=64,
        shared_step=512, shared_reserved=0,
    ),
}  # fmt: skip
