"""All that a machine with a GPU can tell, in minutes, by the Python it is called with: `python -m bench gpu`, or `make gpu`.

Builds the extensions, CUDA included, runs the tests of the ops on the GPU, then the suites at full size against every peer that
is there, and tries other tiles for attention. Each stage is a process of its own with a time of its own; what it measured is on
the disk when the next begins, and stays there when the time is up or someone presses Ctrl-C.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import device, machine
from bench.arguments import Parser

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """A command and the seconds it may take."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Done:
    """status: "ok", "failed", "out of time", "interrupted" or "no time left"."""

    name: str
    status: str
    seconds: float
    command: str


def stages(on: str, out: Path, quick: bool) -> list[Stage]:
    python = [sys.executable]
    bench = [*python, "-m", "bench"]
    cuda = on == "cuda"

    def suite(name: str, seconds: float, *more: str) -> Stage:
        how = ["--device", on, "--json", str(out / f"{name}.json"), *(["--quick"] if quick else []), *more]
        return Stage(name, [*bench, name, *how], seconds)

    # Of the ops' tests those of the backends that are the GPU's; the others need none and were run without one.
    tests = ["tests/ops", "-q", "--maxfail=20", "-p", "no:cacheprovider", "-k", "triton or cuda"]
    return [
        Stage("build", [*python, "setup.py", "build_ext", "--inplace"], 100, {"FASTLLM_BUILD_CUDA": "1"} if cuda else {}),
        Stage("tests", [*python, "-m", "pytest", *tests], 100),
        suite("attention", 85),
        suite("train", 80, *(["--shape", "1b", "--checkpointing", "both"] if cuda else [])),
        suite("kernels", 50),
        suite("loss", 45),
        suite("rl", 40),
        Stage("stream", [*bench, "stream", "--device", on, "--only", "cost", "--quick"], 40),  # that it works: 200,000 tokens take minutes
        Stage("tiles", [*bench, "tiles", "--json", str(out / "tiles.json"), *(["--quick"] if quick else [])], 40),
    ]  # fmt: skip


def run(plan: Sequence[Stage], out: Path, seconds: float) -> list[Done]:
    """Runs the stages in order; what is running when the time is up, or at SIGINT or SIGTERM, is ended with its children."""
    end, done = time.monotonic() + seconds, []
    stopped: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        for process in running:
            _end(process)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for stage in plan:
            left = end - time.monotonic()
            if stopped or left <= 1:
                done.append(
                    Done(stage.name, "interrupted" if stopped else "no time left", 0.0, " ".join(stage.command))
                )
                _write(out / "gpu.json", {"machine": _machine(), "stages": [asdict(d) for d in done]})
                continue
            print(f"== {stage.name}: {' '.join(stage.command)}", flush=True)
            begin, status = time.monotonic(), ""
            process = subprocess.Popen(
                stage.command, cwd=ROOT, env={**os.environ, **stage.environment}, start_new_session=True
            )
            running[:] = [process]
            if stopped:
                _end(process)
            try:
                code = process.wait(min(stage.seconds, left))
                status = "interrupted" if stopped else "ok" if code == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "out of time"
            finally:
                _end(process)
                running.clear()
            done.append(Done(stage.name, status, round(time.monotonic() - begin, 1), " ".join(stage.command)))
            _write(out / "gpu.json", {"machine": _machine(), "stages": [asdict(d) for d in done]})
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return done


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue


def _machine() -> dict[str, Any]:
    try:
        return machine.describe(device.find("cuda"))
    except device.Absent:
        return machine.describe()


def _write(file: Path, record: Any) -> None:
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(file)


def main(arguments: Sequence[str], plan: Sequence[Stage] | None = None) -> int:
    parser = Parser(prog="python -m bench gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default 9)")
    parser.add_argument("--out", type=Path, help="folder for the results (default bench/results/NAME-OF-THE-GPU)")
    parser.add_argument("--quick", action="store_true", help="few runs of each case: does all of it work?")
    parser.add_argument("--device", choices=device.NAMES, default="cuda", help="cpu: the same stages without a GPU")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be greater than 0, got {options.minutes:g}")
    try:
        device.find(options.device)
    except device.Absent as absent:
        print(f"python -m bench gpu: error: {absent}", file=sys.stderr)
        return 2
    where = _machine() if options.device == "cuda" else machine.describe()
    name = re.sub(r"[^a-z0-9]+", "-", str(where.get("gpu") or where["cpu"]).lower()).strip("-")
    out = options.out or ROOT / "bench" / "results" / name
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out / "gpu.json", {"machine": where, "stages": []})
    except OSError as error:
        print(f"python -m bench gpu: error: cannot write to {out}: {error.strerror}", file=sys.stderr)
        return 2
    chosen = stages(options.device, out, options.quick) if plan is None else plan
    done = run(chosen, out, 60 * options.minutes)
    print(f"\n{machine.sentence(where)}\nresults: {out}")
    for stage in done:
        print(f"{stage.name:<10} {stage.status:<13} {stage.seconds:6.1f} s")
    if any(stage.status == "interrupted" for stage in done):
        return 130
    return 0 if all(stage.status == "ok" for stage in done) else 1
