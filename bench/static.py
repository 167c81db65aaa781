"""What the compilers make of every GPU kernel, without a GPU: registers, spills, shared memory, occupancy, matrix
instructions, widths of loads and stores, and the least time that a representative shape takes at published peaks.

    python -m bench static                       every Triton kernel and every .cu, for every chip
    python -m bench static --target sm_90 --match rms_norm

Exit code 1 when a kernel does not compile, spills registers, needs more memory on the chip than a block may have, or is
meant to use matrix instructions and has none of the chip's own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Triton 3.9 contracts a*b+c to one instruction and warns that 3.10 will not unless told to: tell it, in both.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from bench import disassembly, machine, suite
from bench.arguments import Parser
from bench.chips import CHIPS
from fastllm.kernels.triton import interpreted, unavailable

if TYPE_CHECKING:
    from fastllm.kernels.triton._launch import Configuration

Row = dict[str, Any]
Job = tuple[Callable[..., list[Row]], Any, str]  # a function, what it compiles, for which chip
_configurations: list[Configuration] = []  # seen by the forked workers, which cannot be sent a kernel


def main(argv: Sequence[str] | None = None, configurations: Sequence[Configuration] | None = None) -> int:
    """Compiles, prints the table and returns the exit code. `configurations`: these instead of all that is shipped."""
    parser = Parser(prog="python -m bench static", description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--target", action="append", choices=list(CHIPS), help="a chip; default: all")
    parser.add_argument("--match", default="", metavar="TEXT", help="only kernels whose label contains this")
    parser.add_argument("--json", metavar="F", help="write the rows to this file as well")
    parser.add_argument("--quiet", action="store_true", help="print the faults and the count, not the tables")
    options = parser.parse_args(argv)
    if unavailable():
        parser.error(unavailable())
    if interpreted():
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled; unset it")
    suite.check_writable(parser, options.json)
    from bench import nvcc
    from fastllm.kernels.triton import _static

    targets = [target for target in CHIPS if target in (options.target or CHIPS)]
    chosen = _static.shipped() if configurations is None else configurations
    _configurations[:] = [c for c in chosen if options.match in c.label]
    jobs: list[Job] = []
    for target in targets:
        if configurations is None and target.startswith("sm_"):
            jobs += [(_cuda_rows, source, target) for source in nvcc.SOURCES]
        jobs += [
            (_triton_rows, index, target)
            for index, configuration in enumerate(_configurations)
            if target in (configuration.targets or CHIPS)
        ]
    # A file that was not compiled is always told: no one knows the names of its kernels.
    rows = [row for row in _run(jobs) if options.match in row["kernel"] or "registers" not in row]
    missing = [row for row in rows if "missing" in row]
    if len(rows) == len(missing):
        parser.error("; ".join([f"no kernel's label contains {options.match!r}", *map(_sentence, missing)]))
    if options.json:
        where = machine.describe()
        Path(options.json).write_text(json.dumps([row | {"machine": where} for row in rows], indent=1) + "\n")
    if not options.quiet:
        print("\n".join(line for target in targets for line in _table(target, rows)))
    wrong = [row for row in rows if row["faults"]]
    for row in [*missing, *wrong]:
        print(_sentence(row))
    print(f"{len(rows) - len(missing)} compiled, {len(wrong)} with a fault")
    return 1 if wrong else 0


def _run(jobs: Sequence[Job]) -> list[Row]:
    try:
        workers = max(1, min(len(jobs), os.cpu_count() or 1))
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            futures = [pool.submit(compile_, what, target) for compile_, what, target in jobs]
            return [row for future in futures for row in future.result()]
    except BrokenProcessPool:  # a compiler took its process down: each job in a process of its own shows which
        if len(jobs) > 1:
            return [row for job in jobs for row in _run([job])]
        _, what, target = jobs[0]
        label = what.name if isinstance(what, Path) else _configurations[what].label
        return [{"kernel": label, "target": target, "faults": ["does not compile: the compiler crashed"]}]


def _triton_rows(index: int, target: str) -> list[Row]:
    import triton

    from fastllm.kernels.triton import _static

    configuration = _configurations[index]
    row: Row = {"kernel": configuration.label, "target": target, "compiler": f"triton {triton.__version__}"}
    try:
        compiled = _static.compile_for(configuration, target)
    except Exception as error:  # whatever a compiler raises is this row's finding; the others are still wanted
        lines = str(error).strip().splitlines() or [""]  # where, the source, what: only the first and last are wanted
        said = " ".join(dict.fromkeys([lines[0].strip(), lines[-1].strip()]))
        return [row | {"faults": [f"does not compile: {type(error).__name__}: {said}"]}]
    row |= _found(target, compiled, compiled.assembly, compiled.tensor_columns, configuration.matrix)
    if work := configuration.work:
        peaks = CHIPS[target].peaks.items()
        row |= {
            "shape": work.shape,
            "bytes": work.bytes,
            "flops": work.flops,
            "us_at_published_peak": {name: 1e6 * peak.seconds(work.bytes, work.flops) for name, peak in peaks},
        }
    return [row]


def _cuda_rows(source: Path, target: str) -> list[Row]:
    from bench import nvcc

    row: Row = {"kernel": source.name, "target": target}
    if reason := nvcc.missing(target):
        return [row | {"missing": reason, "faults": []}]
    row["compiler"] = f"nvcc {nvcc.version()}"
    try:
        kernels = list(nvcc.compile_for(source, target))
    except (RuntimeError, OSError) as error:
        return [row | {"faults": [f"does not compile: {error}"]}]
    return [
        row | {"kernel": f"{source.name} {kernel.name}"} | _found(target, kernel, kernel.assembly) for kernel in kernels
    ]


def _found(target: str, block: Any, assembly: str, tensor_columns: int = 0, matrix: bool = False) -> Row:
    """What the compiler reports of a block and what is read from its assembly, and what is wrong with it."""
    chip, instructions = CHIPS[target], disassembly.read(assembly)
    own = {name: count for name, count in instructions.matrix.items() if re.fullmatch(chip.matrix, name)}
    faults = []
    if block.spilled_bytes:
        faults.append(f"spills {block.spilled_bytes} bytes a thread")
    if block.shared_bytes > chip.shared_of_block:
        faults.append(f"needs {block.shared_bytes} bytes of shared memory, a block may have {chip.shared_of_block}")
    if tensor_columns > chip.tensor_columns:
        faults.append(f"needs {tensor_columns} columns of tensor memory, there are {chip.tensor_columns}")
    if matrix and not own:
        others = ", ".join(instructions.matrix)
        faults.append(f"is a matrix kernel without {chip.matrix_name}" + (f" (it has {others})" if others else ""))
    row: Row = {
        "threads": block.threads,
        "registers": block.registers,
        "spilled_bytes": block.spilled_bytes,
        "shared_bytes": block.shared_bytes,
        "matrix": matrix,
        "matrix_instructions": own,
        "loads": dict(instructions.loads),
        "stores": dict(instructions.stores),
        "faults": faults,
    }
    if block.threads:
        row["occupancy"] = chip.occupancy(block.threads, block.registers, block.shared_bytes, tensor_columns)
    return row


HEADINGS = ("threads", "regs", "spill", "shared", "occ.", "load", "store")


def _table(target: str, rows: Sequence[Row]) -> list[str]:
    chip = CHIPS[target]
    shown = [row for row in rows if row["target"] == target and "registers" in row]
    if not shown:
        return []
    cells = [("", *HEADINGS, chip.matrix_name, f"µs {'/'.join(chip.peaks)}", "at")]
    for row in shown:
        least = row.get("us_at_published_peak", {})
        cells.append((
            row["kernel"],
            str(row["threads"] or "–"),
            str(row["registers"]),
            str(row["spilled_bytes"]),
            str(row["shared_bytes"]),
            f"{row['occupancy']:.0%}" if "occupancy" in row else "–",
            _widths(row["loads"]),
            _widths(row["stores"]),
            str(sum(row["matrix_instructions"].values())),
            "/".join(f"{time:.{0 if time >= 10 else 1}f}" for time in least.values()),
            row.get("shape", ""),
        ))  # fmt: skip
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = [
        " ".join(
            cell.ljust(width) if column in (0, len(widths) - 1) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    ]
    lines[0] = target.ljust(widths[0]) + lines[0][widths[0] :]
    return [*lines, ""]


def _widths(accesses: Mapping[int | str, int]) -> str:
    """The most common width in bytes a thread, the wider of two as common, and how many instructions have it."""
    if not accesses:
        return "–"
    width = max(accesses, key=lambda width: (accesses[width], str(width).zfill(3)))
    total = sum(accesses.values())
    return str(width) if accesses[width] == total else f"{width} {accesses[width]}/{total}"


def _sentence(row: Row) -> str:
    if "missing" in row:
        return f"{row['kernel']} on {row['target']}: not compiled: {row['missing']}"
    return f"FAULT {row['kernel']} on {row['target']}: {'; '.join(row['faults'])}"


if __name__ == "__main__":
    sys.exit(main())
