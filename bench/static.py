"""What the compilers make of every shipped Triton kernel, without a GPU: registers, spills, shared memory, wide loads.

    python -m bench.static                       every kernel for every chip
    python -m bench.static --target sm_90 --match rms_norm

Exit code 1 when a kernel does not compile, spills registers, needs more shared memory than a block may have, or lacks
the matrix instructions it is meant to use.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import Any

# Triton 3.9 contracts a*b+c to one instruction and warns that 3.10 will not unless told to: tell it, in both.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from bench.arguments import Parser
from fastllm.kernels.triton import _static, interpreted
from fastllm.kernels.triton._launch import Configuration

Row = dict[str, Any]
_configurations: list[Configuration] = []  # seen by the forked workers, which cannot be sent a kernel


def main(argv: Sequence[str] | None = None, configurations: Sequence[Configuration] | None = None) -> int:
    """Compiles, prints the table and returns the exit code. `configurations`: others than the shipped ones."""
    parser = Parser(prog="python -m bench.static", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=sorted(_static.TARGETS), help="a chip; default: all")
    parser.add_argument("--match", default="", help="only kernels whose label contains this")
    parser.add_argument("--json", action="store_true", help="print JSON for a program to read")
    arguments = parser.parse_args(argv)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    chosen = _static.shipped() if configurations is None else configurations
    _configurations[:] = [c for c in chosen if arguments.match in c.label]
    if not _configurations:
        parser.error(f"no kernel's label contains {arguments.match!r}")
    tasks = [(i, target) for target in arguments.target or _static.TARGETS for i in range(len(_configurations))]
    with multiprocessing.get_context("fork").Pool(min(len(tasks), os.cpu_count() or 1)) as pool:
        rows = pool.starmap(_row, tasks, chunksize=4)
    print(json.dumps(rows, indent=2) if arguments.json else _table(rows))
    return 1 if any(row["faults"] for row in rows) else 0


def _row(index: int, target: str) -> Row:
    configuration = _configurations[index]
    row: Row = {"kernel": configuration.label, "target": target, "warps": configuration.num_warps}
    try:
        compiled = _static.compile_for(configuration, target)
    except Exception as error:  # whatever a compiler raises is this row's finding; the others are still wanted
        lines = str(error).strip().splitlines() or [""]
        return {**row, "faults": [f"does not compile: {type(error).__name__}: {lines[0]}"]}
    faults = []
    if compiled.spilled_bytes:
        faults.append(f"spills {compiled.spilled_bytes} bytes a thread")
    if compiled.shared_bytes > _static.SHARED_LIMITS[target]:
        faults.append(
            f"needs {compiled.shared_bytes} bytes of shared memory, {_static.SHARED_LIMITS[target]} are there"
        )
    if configuration.matrix and not compiled.matrix_instructions:
        faults.append("uses no matrix instruction")
    return {
        **row,
        "registers": compiled.registers,
        "spilled_bytes": compiled.spilled_bytes,
        "shared_bytes": compiled.shared_bytes,
        "loads": compiled.loads,
        "wide_loads": compiled.wide_loads,
        "matrix_instructions": compiled.matrix_instructions,
        "faults": faults,
    }


def _table(rows: Sequence[Row]) -> str:
    width = max(len(row["kernel"]) for row in rows)
    lines = [f"{'kernel':<{width}}  chip    warps  registers  spilled  shared  128-bit loads  matrix"]
    for row in rows:
        start = f"{row['kernel']:<{width}}  {row['target']:<6}  {row['warps']:>5}"
        if "registers" not in row:
            lines.append(f"{start}  {row['faults'][0]}")
            continue
        loads = f"{row['wide_loads']} of {row['loads']}"
        lines.append(
            f"{start}  {row['registers']:>9}  {row['spilled_bytes']:>7}  {row['shared_bytes']:>6}  {loads:>13}  "
            f"{row['matrix_instructions']:>6}  {'; '.join(row['faults'])}".rstrip()
        )
    wrong = sum(bool(row["faults"]) for row in rows)
    lines.append(f"{len(rows)} compiled, {wrong} with a fault")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
