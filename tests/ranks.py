"""Two processes on the CPU, as DeepSpeed's launcher or torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
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
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "PATH": f"{scripts}:{os.environ['PATH']}",
    }  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(scripts / launcher), *OPTIONS[launcher], str(port), str(worker), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    found = [line.split("RESULT ", 1)[1] for line in done.stdout.splitlines() if "RESULT " in line]
    return [json.loads(result) for result in found], done.stdout + done.stderr
