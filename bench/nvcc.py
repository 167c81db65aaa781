"""The CUDA C++ kernels of csrc/cuda through nvcc, with the flags of setup.py, for a chip that need not be present."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench import disassembly
from fastllm.kernels.triton import _static

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
_REPORT = re.compile(
    r"Function properties for (\w+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers(.*)"
)


@dataclass(frozen=True)
class Kernel:
    """threads: the largest block that its launch bounds allow, 0 if it has none. Shared memory is the static part."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    threads: int
    assembly: str = field(repr=False)


def missing(target: str) -> str | None:
    """Why nothing can be compiled for this chip here, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc missing"
    known = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    return None if target in known else f"nvcc {version()} does not know {target}"


def version() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"\bV([\d.]+)", said)
    return found[1] if found else "of unknown version"


def compile_for(source: Path, target: str) -> Iterator[Kernel]:
    """Every kernel of one .cu file; RuntimeError with nvcc's first error where it does not compile."""
    flags = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["nvcc_flags"](Path(torch.__file__).parent)
    chip = target.removeprefix("sm_")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = ["nvcc", f"-gencode=arch=compute_{chip},code={target}", *flags, "-Xptxas=-v", "-cubin"]
        done = subprocess.run([*command, str(source), "-o", str(cubin)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line or "fatal" in line]
            raise RuntimeError((errors or done.stderr.splitlines() or [f"nvcc ended with {done.returncode}"])[0])
        listing = _static.tool("nvdisasm", "-ndf", str(cubin))
    code, threads = dict(disassembly.kernels(listing)), disassembly.most_threads(listing)
    for name, stores, loads, registers, rest in _REPORT.findall(done.stderr):
        if name in code:  # a device function that was not inlined is reported too
            shared = re.search(r"(\d+) bytes smem", rest)
            yield Kernel(
                name=_readable(name),
                registers=int(registers),
                spilled_bytes=max(int(stores), int(loads)),
                shared_bytes=int(shared[1]) if shared else 0,
                threads=threads.get(name, 0),
                assembly=code[name],
            )


def _readable(mangled: str) -> str:
    """forward_kernel<bf16, 8, 1>, or the mangled name where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return mangled
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ").split("(", 1)[0]
    for long, short in (("__nv_bfloat16", "bf16"), ("__half", "fp16"), ("float", "fp32")):
        name = re.sub(rf"\b{long}\b", short, name)
    return name
