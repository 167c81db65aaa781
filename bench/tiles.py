"""``python -m bench tiles``: other tiles for the attention kernels, timed on this GPU beside the shipped ones."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import device, machine
from bench.arguments import Parser
from bench.suite import check_writable
from fastllm.kernels.triton import unavailable

SHAPES = ((64, 16384), (128, 16384))  # head dim, tokens; 16 heads, causal, bf16
QUERIES, KEYS, WARPS, STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m bench tiles", description=(__doc__ or "").strip())
    parser.add_argument("--json", type=Path, metavar="F", help="write the rows to this file as well")
    parser.add_argument("--quick", action="store_true", help="a few tiles, short sequences")
    options = parser.parse_args(arguments)
    check_writable(parser, options.json and str(options.json))
    try:
        on = device.find("cuda")
    except device.Absent as absent:
        print(f"nothing to time: {unavailable() or absent}")
        return 0
    rows: list[dict[str, Any]] = []
    for width, length in SHAPES:
        for kernel in ("forward", "key_value", "query"):
            rows += _time(kernel, width, 2048 if options.quick else length, options.quick)
            best = min((r for r in rows if r["kernel"] == kernel and r["head_dim"] == width), key=lambda r: r["ms"])
            own = next(r for r in rows if r["kernel"] == kernel and r["head_dim"] == width and r["shipped"])
            print(
                f"{kernel} at head dim {width}: shipped {own['tiles']} {own['ms']:.3f} ms, best {best['tiles']} "
                f"{best['ms']:.3f} ms, {own['ms'] / best['ms']:.2f}×",
                flush=True,
            )
            if options.json:
                options.json.write_text(json.dumps({"machine": machine.describe(on), "tiles": rows}, indent=1) + "\n")
    return 0


def _time(kernel: str, width: int, length: int, quick: bool) -> list[dict[str, Any]]:
    """A call with each of the tiles in one kernel's place, the others as shipped: what changes is that kernel's time."""
    from fastllm.kernels.triton import attention
    from fastllm.kernels.triton.attention import tiles as shipped_tiles

    chip = shipped_tiles.chip_of(torch.device("cuda"))
    q, k, v, grad = (torch.randn(1, 16, length, width, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    rest = (None, None, None, None, None, width**-0.5, True, 0, 0, 0.0)
    out, lse, lost = attention.forward(q, k, v, *rest)

    def call() -> None:
        if kernel == "forward":
            attention.forward(q, k, v, *rest)
        else:
            attention.backward(grad, None, q, k, v, out, lse, lost, *rest)

    place = (kernel, chip)
    described = place in shipped_tiles.DESCRIPTOR_TILES
    table: dict[tuple[str, str], Any] = shipped_tiles.DESCRIPTOR_TILES if described else shipped_tiles.TILES
    shipped = table.get(place)
    flags = {"BLOCK_D": width, "BLOCK_DV": width} | dict.fromkeys(("MASK", "WINDOW", "SINKS", "CAP", "ALIBI"), False)
    own = shipped_tiles.tiles_for(kernel, flags, torch.bfloat16, chip, described)
    # How blocks are read, and where the compiler knows how, by which warps.
    ways = [(described, False)] + [(False, False), (True, True)] * described
    tried = [own] + [
        shipped_tiles.Tiles(*t, *way) for way in ways for t in itertools.product(QUERIES, KEYS, WARPS, STAGES)
    ]
    found = []
    try:
        for tiles in dict.fromkeys(tried[:3] if quick else tried):
            table[place] = (tiles, tiles, tiles)
            try:
                milliseconds = _median(call)
            except Exception as error:  # too much shared memory for this chip, mostly
                print(f"  {kernel} {tuple(tiles)}: {type(error).__name__}", file=sys.stderr)
                continue
            found.append(
                {"kernel": kernel, "head_dim": width, "tokens": length, "tiles": list(tiles), "ms": milliseconds}
                | {"shipped": tiles == own}
            )
    finally:
        if shipped is None:
            del table[place]
        else:
            table[place] = shipped
    return found


def _median(call: Any, runs: int = 10) -> float:
    call()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)
