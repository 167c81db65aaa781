"""What this machine and environment offer fastllm: versions, backends, what is missing and how to mend it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastllm import __version__, backends
from fastllm.kernels import cpp, triton

# What fastllm uses and the peers that users ask about: the name on PyPI, and what it is good for here.
PACKAGES = {
    "torch": "required",
    "triton": "GPU kernels",
    "transformers": "fastllm.patch",
    "deepspeed": "optional",
    "accelerate": "fastllm train",
    "datasets": "fastllm train",
    "peft": "optional",
    "flash-attn": "optional peer",
    "xformers": "optional peer",
    "liger-kernel": "optional peer",
}
REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps ."
Report = dict[str, Any]


def collect(*, measure: bool = True) -> Report:
    """Everything `fastllm doctor` prints, as plain values that json can hold. Measuring takes about two seconds."""
    return {
        "fastllm": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "packages": {name: {"version": version(name), "use": use} for name, use in PACKAGES.items()},
        "cpu": {
            "model": cpp.cpu_model(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "instruction_set": cpp.capability() or None,
            "memory_bytes": _memory(),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "backends": {name: _backend(name) for name in backends.NAMES},
        "forced_backend": backends.forced,
        "measured": _measure() if measure else [],
    }


def version(package: str) -> str | None:
    """What is installed of it; None: nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    """Cores this process may run on, which a container or taskset may have made fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> int | None:
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _gpu(index: int) -> Report:
    properties = torch.cuda.get_device_properties(index)
    architecture = getattr(properties, "gcnArchName", "") or f"sm_{properties.major}{properties.minor}"
    return {"name": properties.name, "architecture": architecture, "memory_bytes": properties.total_memory}


def _backend(name: str) -> Report:
    reason = backends.unavailable(name)
    return {"available": not reason, "reason": reason or None, "mend": _mend(name) if reason else None}


def _mend(name: str) -> str:
    """What to do about a backend that is missing."""
    has_driver = shutil.which("nvidia-smi") is not None or Path("/dev/kfd").exists()
    if name == "cpp":
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            return (
                f"no C++ compiler {compiler!r} on PATH; install g++ or clang++, then in fastllm's source: {REINSTALL}"
            )
        return f"in fastllm's source: FASTLLM_REQUIRE_CPP=1 {REINSTALL}  (shows what fails to build)"
    if name == "triton" and triton.unavailable():
        return "pip install 'triton>=3.6' (Linux only)"
    if not torch.cuda.is_available():
        if has_driver:
            return (
                f"torch {torch.__version__} does not use the GPU driver that is here; see pytorch.org for one that does"
            )
        return "nothing to mend without a GPU"
    return "nothing to mend: GPU tensors are served by triton"


def _measure() -> list[Report]:
    """Copy bandwidth (bytes read plus bytes written) and bf16 matrix multiplication on the CPU and on each GPU."""
    return [_measure_on(torch.device("cpu"))] + [
        _measure_on(torch.device("cuda", i)) for i in range(torch.cuda.device_count())
    ]


def _measure_on(device: torch.device) -> Report:
    on_gpu = device.type == "cuda"
    megabytes, n = (1024, 8192) if on_gpu else (256, 1024)
    source = torch.ones(megabytes << 18, device=device)
    target = torch.empty_like(source)
    a, b = (torch.ones(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    copy = _best_seconds(lambda: target.copy_(source), device)
    multiply = _best_seconds(lambda: torch.mm(a, b, out=c), device)
    return {
        "device": str(device),
        "copy_gb_per_s": round(2 * source.nbytes / copy / 1e9, 1),
        "copy_megabytes": megabytes,
        "matmul_bf16_gflop_per_s": round(2 * n**3 / multiply / 1e9, 1),
        "matmul_size": n,
    }


def _best_seconds(run: Callable[[], Any], device: torch.device, budget: float = 0.6) -> float:
    """The fastest of as many runs as fit the budget, at least three; a first one, to set things up, aside."""

    def once() -> float:
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    once()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        times.append(once())
    return min(times)


def render(report: Report) -> str:
    """The report as text for a person."""
    cpu, measured = report["cpu"], report["measured"]
    rows = [
        ("fastllm", report["fastllm"]),
        ("python", f"{report['python']['version']}  {report['python']['executable']}"),
    ]
    rows += [(n, p["version"] or f"not installed ({p['use']})") for n, p in report["packages"].items()]
    memory = f", {cpu['memory_bytes'] / 2**30:.0f} GiB memory" if cpu["memory_bytes"] else ""
    rows += [
        ("", ""),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads in torch{memory}"),
        ("kernels for", cpu["instruction_set"] or "none: the C++ extension is not there"),
    ]
    rows += [
        ("GPU", f"{g['name']}, {g['architecture']}, {g['memory_bytes'] / 2**30:.0f} GiB memory") for g in report["gpus"]
    ] or [("GPU", "none that torch can use")]
    rows.append(("", ""))
    for name, backend in report["backends"].items():
        rows.append((f"backend {name}", "ready" if backend["available"] else f"missing: {backend['reason']}"))
        if backend["mend"]:
            rows.append(("", f"  {backend['mend']}"))
    if report["forced_backend"]:
        known = report["forced_backend"] in backends.NAMES
        doubt = "" if known else f": no backend, and every op will fail; the names are {', '.join(backends.NAMES)}"
        rows.append(("forced", f"{report['forced_backend']} (by FASTLLM_BACKEND){doubt}"))
    if measured:
        rows.append(("", ""))
    for m in measured:
        rows.append(
            (
                f"{m['device']} copy",
                f"{m['copy_gb_per_s']:.0f} GB/s read and written (torch copy_ of {m['copy_megabytes']} MB)",
            )
        )
        rows.append(
            (
                f"{m['device']} matmul",
                f"{m['matmul_bf16_gflop_per_s']:.0f} GFLOP/s in bf16 ({m['matmul_size']} x {m['matmul_size']})",
            )
        )
    return "\n".join(f"{name:<16}{value}".rstrip() for name, value in rows)
