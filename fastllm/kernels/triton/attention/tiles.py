"""How large the blocks of each kernel are and how it is compiled, by chip."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Tiles(NamedTuple):
    """Queries and keys a program holds at a time, and how it is compiled; descriptors: whether the memory engine copies the
    blocks of the inner loop (TMA), specialized: whether warps of their own do that and feed the matrix units."""

    m: int
    n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    specialized: bool = False

    def options(self) -> dict[str, Any]:
        """As kernels are launched and compiled with them."""
        return {
            "M": self.m, "N": self.n, "DESCRIPTORS": self.descriptors, "SPECIALIZED": self.specialized,
            "num_warps": self.num_warps, "num_stages": self.num_stages,
        }  # fmt: skip


# By the wider of the head dims, up to 64, 128 and 256: what spills nothing; not timed yet. gfx942 has 64 KB of shared memory and
# another pipeline. A kernel without tiles for a chip of its own takes those of sm_80.
TILES = {
    ("forward", "sm_80"): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2)),
    ("forward", "sm_100"): (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 16, 8, 2)),
    ("forward", "gfx942"): (Tiles(128, 64, 8, 1), Tiles(64, 64, 8, 1), Tiles(32, 32, 8, 1)),
    ("key_value", "sm_80"): (Tiles(64, 32, 8, 2), Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 1)),
    ("key_value", "sm_90"): (Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(16, 128, 8, 1)),
    ("key_value", "sm_100"): (Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2), Tiles(16, 64, 8, 1)),
    ("key_value", "gfx942"): (Tiles(16, 64, 4, 1), Tiles(32, 32, 8, 1), Tiles(16, 32, 8, 1)),
    ("query", "sm_80"): (Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 16, 8, 2)),
    ("query", "gfx942"): (Tiles(128, 64, 8, 1), Tiles(128, 32, 8, 1), Tiles(64, 16, 8, 1)),
}
_FP32_TILES = {
    ("forward", "sm_80"): Tiles(16, 32, 4, 2),
    ("forward", "gfx942"): Tiles(16, 32, 8, 1),
    ("key_value", "sm_80"): Tiles(16, 16, 4, 2),
    ("key_value", "sm_90"): Tiles(16, 16, 8, 2),
    ("key_value", "sm_100"): Tiles(32, 16, 8, 2),
    ("key_value", "gfx942"): Tiles(16, 16, 4, 1),
    ("query", "sm_80"): Tiles(16, 16, 8, 2),
    ("query", "gfx942"): Tiles(16, 16, 4, 1),
}
# Boolean masks, and the arithmetic of windows and sinks beside a wide block of weights, take registers of their own.
_MASK_TILES = {
    ("forward", "sm_80"): (Tiles(128, 64, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 32, 8, 1)),
    ("forward", "sm_100"): (Tiles(64, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 32, 8, 1)),
    ("query", "sm_80"): (Tiles(64, 64, 4, 1), Tiles(128, 32, 8, 1), Tiles(64, 16, 8, 2)),
    ("forward", "gfx942"): (Tiles(128, 64, 8, 1), Tiles(32, 64, 8, 1), Tiles(32, 32, 8, 1)),
    ("key_value", "gfx942"): (Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 8, 1)),
    ("query", "gfx942"): (Tiles(64, 32, 4, 1), Tiles(128, 32, 8, 1), Tiles(64, 16, 8, 1)),
}


# With tensor descriptors, where the chip has them and they can serve the call: blocks that the memory engine copies take no
# registers for addresses. The second table is for calls that look at pairs, or bend their scores.
DESCRIPTOR_TILES = {
    ("forward", "sm_90"): (Tiles(128, 128, 8, 2, True), Tiles(128, 128, 8, 2, True), Tiles(64, 64, 8, 2, True)),
    ("key_value", "sm_90"): (Tiles(64, 64, 8, 2, True), Tiles(32, 64, 8, 2, True), Tiles(16, 64, 8, 2, True)),
    ("query", "sm_90"): (Tiles(128, 64, 8, 2, True), Tiles(128, 64, 8, 2, True), Tiles(64, 32, 8, 2, True)),
    ("forward", "sm_100"): (
        Tiles(128, 64, 8, 3, True, True),
        Tiles(128, 64, 8, 3, True, True),
        Tiles(64, 64, 8, 2, True),
    ),
    ("key_value", "sm_100"): (Tiles(64, 64, 8, 2, True), Tiles(32, 64, 8, 2, True), Tiles(16, 64, 8, 1, True)),
    ("query", "sm_100"): (Tiles(128, 64, 8, 2, True), Tiles(128, 64, 8, 2, True), Tiles(64, 16, 8, 2)),
}
_DESCRIPTOR_EDGE_TILES = {
    ("forward", "sm_90"): (Tiles(128, 64, 8, 2, True), Tiles(128, 64, 8, 2, True), Tiles(64, 32, 8, 2, True)),
    ("key_value", "sm_90"): (Tiles(64, 64, 8, 2, True), Tiles(32, 64, 8, 2, True), Tiles(16, 64, 8, 2, True)),
    ("query", "sm_90"): (Tiles(128, 64, 8, 2, True), Tiles(128, 32, 8, 2, True), Tiles(64, 16, 8, 2, True)),
    ("forward", "sm_100"): (Tiles(128, 64, 8, 2, True), Tiles(128, 64, 8, 2, True), Tiles(64, 32, 8, 2, True)),
    ("key_value", "sm_100"): (Tiles(64, 64, 8, 2, True), Tiles(32, 64, 8, 2, True), Tiles(16, 64, 8, 1, True)),
    ("query", "sm_100"): (Tiles(128, 64, 8, 2, True), Tiles(128, 32, 8, 2, True), Tiles(64, 16, 8, 2, True)),
}


def tiles_for(kernel: str, flags: dict[str, Any], dtype: torch.dtype, chip: str, describable: bool) -> Tiles:
    def of(table: dict[tuple[str, str], Any]) -> Any:
        return table.get((kernel, chip)) or (None if chip == "gfx942" else table.get((kernel, "sm_80")))

    if dtype == torch.float32:
        return of(_FP32_TILES)  # type: ignore[no-any-return]
    width = max(flags["BLOCK_D"], flags["BLOCK_DV"])
    crowded = flags["MASK"] or (kernel == "forward" and (flags["SINKS"] or (flags["WINDOW"] and width <= 64)))
    size = 0 if width <= 64 else 1 if width <= 128 else 2
    if describable and (kernel, chip) in DESCRIPTOR_TILES:
        edges = any(flags[n] for n in ("MASK", "WINDOW", "CAP", "ALIBI"))
        return (_DESCRIPTOR_EDGE_TILES if edges else DESCRIPTOR_TILES)[kernel, chip][size]
    chosen = (of(_MASK_TILES) if crowded else None) or of(TILES)
    return chosen[size]  # type: ignore[no-any-return]


def chip_of(device: torch.device) -> str:
    """The one of sm_80, sm_90, sm_100 and gfx942 whose tiles a device takes; the interpreter is none of them."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "sm_80"
    # Older chips, and those of workstations, have neither the copies nor the matrix instructions of sm_90 and sm_100.
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def passes(flags: dict[str, Any], dtype: torch.dtype) -> tuple[tuple[bool, bool], ...]:
    """Which of the gradients of keys and values a launch makes: the sums of both at once do not fit at 256 channels."""
    both = max(flags["BLOCK_D"], flags["BLOCK_DV"]) <= 128
    return ((True, True),) if both else ((True, False), (False, True))


def is_dense(flags: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether blocks that need no mask have a loop of their own; in fp32 its copy would not fit the registers."""
    return (flags["MASK"] or not flags["WINDOW"]) and dtype != torch.float32
