"""What a number was measured on: hardware, versions, commit and command, as every JSON row carries them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import fastllm
from bench.device import Cpu, Cuda
from fastllm import backends
from fastllm.doctor import version
from fastllm.kernels import cpp

PACKAGES = ("torch", "triton", "transformers", "liger-kernel")


def describe(device: Cpu | Cuda | None = None) -> dict[str, Any]:
    return {
        **(device or Cpu()).describe(),
        "cpu": cpp.cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "fastllm": fastllm.__version__,
        "instruction_set": cpp.capability() or None,
        "forced_backend": backends.forced,
        "commit": _commit(),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def sentence(machine: dict[str, Any]) -> str:
    """The same in one line for people. Rows written before there was a --device lack its keys: they are of a CPU."""
    if gpu := machine.get("gpu"):
        what = f"{gpu}, driver {machine['driver'] or 'unknown'}, CUDA {machine['cuda']}, host {machine['cpu']}"
    else:
        what = machine["cpu"]
    versions = ", ".join(f"{name} {machine[name]}" for name in PACKAGES if machine[name])
    kernels = f"kernels for {machine['instruction_set']}" if machine["instruction_set"] else "no C++ kernels"
    forced = f", backend {machine['forced_backend']} forced" if machine["forced_backend"] else ""
    head, changes, _ = (machine["commit"] or "unknown").partition("+changes")
    commit = head[:12] + (" with changes" if changes else "")
    return f"{what}, {machine['threads']} threads, {versions}, {kernels}{forced}, commit {commit}"


def _module() -> str:
    name = Path(sys.argv[0]).stem
    return "bench" if name == "__main__" else f"bench.{name}"


def _commit() -> str | None:
    """The commit of this repository, with "+changes" where files differ from it; None outside a clone."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes.stdout.strip() else "")
