"""What a suite runs on: how its clock, its memory, its caches and its own limits are read. One class per kind."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

NAMES = ("cpu", "cuda")


class Absent(Exception):
    """This machine, or this torch, has no such device."""


def find(name: str) -> Cpu | Cuda:
    if name == "cpu":
        return Cpu()
    if not torch.version.cuda:
        raise Absent(f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        raise Absent("torch finds no GPU")
    return Cuda()


def last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0; 64 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
    return max(sizes, default=64 << 20)


@dataclass(frozen=True)
class Cpu:
    cache_bytes: int = field(default_factory=last_level_cache)
    copied_bytes: int = 256 << 20
    matmul_size: int = 2048
    name: str = "cpu"

    def describe(self) -> dict[str, Any]:
        return {"device": self.name, "gpu": None, "driver": None, "cuda": None}

    def wait(self) -> None:
        """Returns when all that was asked of the device is done."""

    def seconds(self, run: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    def memory(self) -> int:
        """Bytes of memory there are."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def reset_peak(self) -> int | None:
        """Hands freed memory back to the system, begins a new high-water mark and returns the bytes now held: the
        process's resident set, as Linux counts it. None on other systems."""
        gc.collect()
        if (path := ctypes.util.find_library("c")) and hasattr(library := ctypes.CDLL(path), "malloc_trim"):
            library.malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return _status("VmRSS")
        except OSError:
            return None

    def peak(self) -> int:
        """The most bytes held since reset_peak."""
        return _status("VmHWM")

    def peak_extra(self, run: Callable[[], Any]) -> int | None:
        """Bytes of memory that `run` needs at its peak beyond what is in use before it, its results included. None
        where the system does not tell."""
        return _peak_extra(self, run)


def _second_level_cache() -> int:
    return torch.cuda.get_device_properties().L2_cache_size


@dataclass(frozen=True)
class Cuda:
    """The current CUDA device."""

    cache_bytes: int = field(default_factory=_second_level_cache)
    copied_bytes: int = 1 << 30
    matmul_size: int = 8192
    name: str = "cuda"

    def describe(self) -> dict[str, Any]:
        return {
            "device": self.name,
            "gpu": torch.cuda.get_device_name(),
            "driver": _driver(),
            "cuda": torch.version.cuda,
        }

    def wait(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any]) -> float:
        """Time on the GPU between two events. The GPU is first kept busy for about a millisecond, in which the host
        gets ahead of it: otherwise a kernel shorter than its launch would be charged for the launch."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(2_000_000)  # clock cycles
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def memory(self) -> int:
        return torch.cuda.get_device_properties().total_memory

    def reset_peak(self) -> int | None:
        """As on the CPU, by the count of torch's allocator."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def peak_extra(self, run: Callable[[], Any]) -> int | None:
        return _peak_extra(self, run)


def _driver() -> str | None:
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return found[0] if found else None


def _peak_extra(device: Cpu | Cuda, run: Callable[[], Any]) -> int | None:
    before = device.reset_peak()
    if before is None:
        return None
    result = run()
    peak = device.peak()
    del result
    return max(0, peak - before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {key}")
