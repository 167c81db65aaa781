"""Two processes on the CPU, as DeepSpeed's launcher or torchrun starts them: on one machine, or as on two."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "deepspeed": ("--num_accelerators", "2", "--master_port"),
    "torchrun": ("--nproc-per-node", "2", "--master-port"),
}


def compile_nothing() -> None:
    """For workers: DeepSpeed does without its all-reduce in shared memory, for which two compilers run most of a minute on a machine
    that is new to it."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_on_two(worker: Path, *arguments: str, launcher: str = "deepspeed") -> tuple[list[Any], str]:
    """What the ranks printed after RESULT, as JSON, and all that was printed, to show when that is not enough."""
    return _run([[*_command(launcher), *OPTIONS[launcher], str(_free_port()), str(worker), *arguments]])


def run_on_two_machines(worker: Path, *arguments: str) -> tuple[list[Any], str]:
    """The same by two calls of torchrun, with node ranks 0 and 1 and a process each, whose GROUP_RANK is that."""
    place = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(_free_port()))
    calls = [[*_command("torchrun"), *place, "--node-rank", str(n), str(worker), *arguments] for n in (0, 1)]
    return _run(calls)


def _command(launcher: str) -> list[str]:
    return [str(Path(sys.executable).parent / launcher)]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(commands: list[list[str]]) -> tuple[list[Any], str]:
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    files = [[tempfile.TemporaryFile("w+") for _ in "oe"] for _ in commands]  # noqa: SIM115 - closed when read
    running = [
        subprocess.Popen(command, env=environment, stdout=out, stderr=err, text=True)
        for command, (out, err) in zip(commands, files)
    ]
    try:
        for process in running:
            process.wait(500)
    finally:
        for process in running:
            process.kill()
    printed, said = ("".join(map(_read, of_kind)) for of_kind in zip(*files))
    found = [line.split("RESULT ", 1)[1] for line in printed.splitlines() if "RESULT " in line]
    return [json.loads(result) for result in found], printed + said


def _read(file: Any) -> str:
    with file:
        file.seek(0)
        return file.read()
