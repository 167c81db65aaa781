"""A suite of cases from the command line: chooses, runs, prints one table a case as it is done, writes JSON."""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import device, machine, plots
from bench.arguments import Parser
from bench.case import Case
from bench.measure import run_case
from bench.results import Row, megabytes, milliseconds

RUNS, QUICK_RUNS = 20, 5


def parser(suite: str, description: str) -> Parser:
    """What every suite that measures understands."""
    made = Parser(prog=f"python -m bench {suite}", description=description)
    made.add_argument("--quick", action="store_true", help="fewer runs")
    made.add_argument("--json", metavar="F", help="write the rows to this file as well")
    made.add_argument("--plot", metavar="DIR", help="draw them into this folder as well")
    return made


def found_device(options: Parser, name: str) -> device.Cpu | device.Cuda:
    """The device of --device; a usage error where there is none."""
    try:
        return device.find(name)
    except device.Absent as error:
        options.error(f"--device {name}: {error}")


def check_fits(options: Parser, shape: str, least: int, on: device.Cpu | device.Cuda) -> None:
    """A usage error where a --shape needs more bytes than the device has."""
    if least > on.memory():
        options.error(
            f"--shape {shape} needs more than {least / 1e9:.0f} GB, this {on.name} has {on.memory() / 1e9:.0f}"
        )


def check_writable(parser: Parser, file: str | None, folder: str | None = None) -> None:
    """Ends the program before anything is measured when the results could not be written afterwards."""
    try:
        path = file
        if path is not None:
            with open(path, "a"):
                pass
        path = folder
        if path is not None:
            Path(path).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}")
    if folder is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed")


def console() -> Console:
    """At most 120 columns, and as many where the output is no terminal."""
    found = Console()
    return Console(width=min(found.width, 120) if found.is_terminal else 120, highlight=False)


def main(name: str, cases: Sequence[Case], arguments: Sequence[str]) -> int:
    """Runs the cases that --only leaves; exit code 1 when a result of ours was wrong or an op failed."""
    description = (
        f"Times every op beside its peers: medians and quartiles over {RUNS} runs taken in turn, fresh random inputs "
        "that no cache holds, results checked against fp64 in the same run. A turn of what takes under 10 ms is several calls, of "
        "which the first does not count."
    )
    options = parser(name, description)
    options.add_argument("--only", metavar="PATTERN", help="only cases that contain this text, as 'rms_norm' or 'bf16'")
    options.add_argument("--device", default="cpu", choices=device.NAMES, help="where the inputs are (default cpu)")
    chosen = options.parse_args(arguments)
    rows = [(case, dtype, which) for case in cases for dtype in case.dtypes for which in case.passes]
    rows = [row for row in rows if not chosen.only or chosen.only in row[0].label(*row[1:])]
    if not rows:
        known = ", ".join(dict.fromkeys(case.op for case in cases))
        options.error(f"no case contains {chosen.only!r}; the ops are {known}")
    on = found_device(options, chosen.device)
    check_writable(options, chosen.json, chosen.plot)

    warnings.filterwarnings("ignore")  # of peers, about their own insides
    torch.seed()
    where, out = machine.describe(on), console()
    runs = QUICK_RUNS if chosen.quick else RUNS
    out.print(machine.sentence(where))
    out.print(
        f"median and quartiles of {runs} runs in turn{' (--quick: too few to quote)' if chosen.quick else ''}; "
        f"limit: the bytes at the speed of copy_ of {on.copied_bytes >> 20} MiB, or the FLOPs at that of a matmul, in the "
        "same runs"
    )
    done: list[Row] = []
    told: set[str] = set()
    for row in rows:
        done.append({"suite": name} | run_case(*row, runs, on) | {"machine": where})
        out.print(table(done[-1]))
        for found in done[-1]["contestants"]:
            note = f"{found['name']} is missing: {found.get('missing')}"
            if "missing" in found and note not in told:
                out.print(note, style="dim")
                told.add(note)
        out.print()
        if chosen.json:  # after every row: an interrupted run leaves what it had
            Path(chosen.json).write_text(json.dumps(done, indent=1) + "\n")
    if chosen.plot:
        for path in plots.draw(done, Path(chosen.plot), name):
            out.print(f"plot: {path}")
    ours = {row["case"]: row["contestants"][0] for row in done}
    bad = [case for case, found in ours.items() if "missing" in found or found.get("wrong")]
    if bad:
        print(f"python -m bench {name}: wrong or failed: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


def table(row: Row) -> Table:
    """One case, a line per contestant."""
    by_flops = row["limited_by"] == "matmul"
    moved = f"{row['flops'] / 1e9:.0f} GFLOP" if by_flops else f"{megabytes(row['bytes'])} MB"
    speed = f"matmul {row['matmul_gflop_per_s']:.0f} GFLOP/s" if by_flops else f"copy {row['copy_gb_per_s']:.1f} GB/s"
    title = f"{row['case']}: {moved}, limit {milliseconds(row['limit_ms'])} ms ({speed})"
    made = Table(title=Text(title, style="bold"), title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    made.add_column("", no_wrap=True, min_width=14)
    for heading, width in (
        ("median ms", 9), ("quartiles ms", 13), ("GFLOP/s" if by_flops else "GB/s", 7), ("of limit", 8),
        ("fastllm is", 12), ("extra MB", 8), ("max error", 9), ("first ms", 8),
    ):  # fmt: skip
        made.add_column(heading, justify="right", min_width=width, no_wrap=True)
    for found in (c for c in row["contestants"] if "missing" not in c):
        made.add_row(*_cells(found, "gflop_per_s" if by_flops else "gb_per_s"))
    return made


def _cells(found: dict[str, Any], rate: str) -> list[str]:
    name = found["name"]
    error = f"{found['error']:.1e}"
    if found.get("wrong"):
        return [name, "WRONG", "", "", "", "", "", error, ""]
    faster = ""
    if name != "fastllm" and "ratio" in found:
        ratio = found["ratio"]
        faster = f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"
    return [
        name,
        milliseconds(found["median_ms"]),
        "–".join(map(milliseconds, found["quartile_ms"])),
        f"{found[rate]:.1f}" if found[rate] < 100 else f"{found[rate]:.0f}",
        f"{found['share_of_limit']:.0%}",
        faster,
        megabytes(found["extra_bytes"]),
        error,
        f"{found['first_ms']:.0f}",
    ]
