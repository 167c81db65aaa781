"""Bytes of a StreamingCache, before any is allocated."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastllm.errors import ConfigError

if TYPE_CHECKING:
    from fastllm.streaming.cache import StreamingCache
    from fastllm.streaming.eight import EightBits
    from fastllm.streaming.ring import Reach
    from fastllm.streaming.rotation import Keys

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


def bytes_of(keys: Keys, reach: Reach, batch: int, eight: EightBits | None) -> int:
    """Bytes of one layer's ring and masters."""
    return batch * keys.heads * (reach.size * _of_token(keys, eight) + 2 * reach.sinks * keys.head_dim * 4)


def _of_token(keys: Keys, eight: EightBits | None) -> int:
    """Bytes of one token's key and value in one head."""
    numbers = keys.head_dim + keys.value_dim
    return numbers * keys.dtype.itemsize if eight is None else numbers + 2 * 4  # two fp32 scales


def parsed(memory: str | int) -> int:
    """Bytes of "2GiB", "500 MB" or a number."""
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", memory)
        if match and match[2].upper() in _UNITS:
            memory = int(float(match[1]) * _UNITS[match[2].upper()])
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ConfigError(f'memory must be a number of bytes or a size like "2GiB", got {memory!r}')
    return memory


def window_for(model: nn.Module, memory: str | int, batch: int, sinks: int, eight: EightBits | None = None) -> int:
    """The largest window of a StreamingCache for `batch` rows in `memory`."""
    from fastllm.streaming.model import examine

    allowed = parsed(memory)
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch must be a number of rows, at least 1, got {batch!r}")
    found = examine(model, sinks, 1)
    pairs = list(zip(found.rotations.layers, found.reaches))
    least = sum(bytes_of(keys, reach, batch, eight) for keys, reach in pairs)
    wide = [keys for keys, reach in pairs if reach.sinks == sinks and reach.window == 1]
    each = sum(batch * keys.heads * _of_token(keys, eight) for keys in wide)
    if least > allowed:
        raise ConfigError(
            f"{readable(allowed)} do not hold a StreamingCache of {sinks} sinks and a window of 1 for {batch} rows: that takes "
            f"{readable(least)}, and {readable(each)} more for every token of window"
        )
    window = 1 + (allowed - least) // each
    if all(found.sliding):
        from transformers.cache_utils import DynamicCache

        from fastllm.rope._config import config_of

        reaches: list[Any] = DynamicCache(config=config_of(model)).layers
        window = min(window, min(layer.sliding_window for layer in reaches) - sinks)
    return window


def check(cache: StreamingCache, batch: int, device: torch.device) -> None:
    """Raises a ConfigError where a cache for `batch` rows would not fit into the memory that is free."""
    needed: dict[torch.device, int] = {}
    for layer, keys in zip(cache.rings, cache.rotations.layers):
        if layer.is_initialized and layer.batch == batch:
            continue
        where = torch.device("cpu") if cache.offloading else keys.device
        needed[where] = needed.get(where, 0) + bytes_of(keys, layer.reach, batch, cache.eight)
    for where, size in needed.items():
        free = _free(where)
        if free is not None and size > free:
            raise ConfigError(
                f"a StreamingCache of {cache.sinks} sinks and a window of {cache.window} for {batch} rows takes {readable(size)}, and "
                f"{readable(free)} are free on {where}: StreamingCache.fit(model, memory, batch) finds a window that fits"
            )


def _free(device: torch.device) -> int | None:
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as lines:
                found = {line.split(":")[0]: int(line.split()[1]) for line in lines}
            return found["MemAvailable"] * 1024
        except (OSError, KeyError, ValueError, IndexError):
            try:
                return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            except (ValueError, OSError, AttributeError):
                return None
    return None


def readable(size: int) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.4g} {unit}" if unit != "B" else f"{size} B"
        size /= 1024  # type: ignore[assignment]
    raise AssertionError
