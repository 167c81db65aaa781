"""What a StreamingCache must know of a model, or why there can be none for it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from fastllm.errors import ConfigError
from fastllm.rope._config import config_of
from fastllm.streaming import rotation
from fastllm.streaming.ring import Reach


@dataclass(frozen=True, eq=False)
class Examined:
    """owner: the module that takes the cache and makes positions and masks; reaches, sliding: of each layer."""

    owner: nn.Module
    rotations: rotation.Rotations
    reaches: list[Reach]
    sliding: list[bool]


def examine(model: nn.Module, sinks: int, window: int) -> Examined:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value, least in (("sinks", sinks, 0), ("window", window, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a number of tokens, at least {least}, got {value!r}")
    config = config_of(model)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"{type(model).__name__} is an encoder-decoder: its cache holds more than one text")
    rotary = [(name, m) for name, m in model.named_modules() if any(b.endswith("inv_freq") for b in m._buffers)]
    rotary = [(name, m) for name, m in rotary if _own(m) is None or _own(m) is config]
    owner = _owner(model, rotary[0][0] if rotary else None)
    kinds = _kinds(config)
    if not rotary:
        _without_rope(model, config)
    reach = Reach(sinks, window)
    local = [kind.sliding_window if isinstance(kind, DynamicSlidingWindowLayer) else None for kind in kinds]
    if all(local) and reach.size > min(w for w in local if w):
        raise ConfigError(
            f"every layer of {type(model).__name__} sees {min(w for w in local if w)} tokens: sinks + window = {reach.size} must lie "
            "within that"
        )
    mixed = any(local) and not all(local)
    if mixed and "dict" not in inspect.unwrap(type(owner).forward).__code__.co_names:
        raise ConfigError(f"{type(owner).__name__} takes no masks by kind of layer, and has two kinds")
    if mixed and not hasattr(DynamicCache, "get_query_offset"):
        raise ConfigError(
            f"{type(owner).__name__} has two kinds of layers, and this Transformers takes a query to stand at one place in the caches "
            "of both: a newer one asks each (Cache.get_query_offset)"
        )
    reaches = [Reach(0, w) if mixed and w else reach for w in local]
    found = rotation.of(owner, [m for _, m in rotary], len(kinds))
    return Examined(owner, found, reaches, [bool(w) for w in local])


def _own(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return getattr(config, "previous", config)


def _owner(model: nn.Module, rotary: str | None) -> nn.Module:
    """The module closest to a rotary module that takes tokens and a cache; the innermost such where nothing is rotary."""
    found = None
    for name, module in model.named_modules():
        if rotary is not None and name and not rotary.startswith(f"{name}."):
            continue
        try:
            names = inspect.signature(type(module).forward).parameters
        except (TypeError, ValueError):
            continue
        if "past_key_values" in names and "input_ids" in names:
            found = module
    if found is None:
        raise ConfigError(f"{type(model).__name__} has no forward that takes input_ids and past_key_values")
    return found


def _kinds(config: Any) -> list[Any]:
    """What transformers would cache each layer in."""
    layers = DynamicCache(config=config).layers
    for n, layer in enumerate(layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise ConfigError(
                f"layer {n} of {type(config).__name__} keeps a {type(layer).__name__}, not keys and values of its own for every token"
            )
    return layers


def _without_rope(model: nn.Module, config: Any) -> None:
    """Without RoPE a cache can stream only where there are no positions at all, or none that are added to what is cached."""
    name = type(model).__name__
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and any(word in last for word in ("wpe", "position", "pos_emb")):
            raise ConfigError(
                f"{name} has learned positions ({path}): they are part of its keys, which cannot be moved to other ones"
            )
    if getattr(config, "alibi", False) or "build_alibi_tensor" in dir(model) or _mentions(model, "alibi"):
        raise ConfigError(
            f"{name} makes its ALiBi biases from the length of the whole text, not from places in a cache: StreamingCache is for RoPE"
        )
    raise ConfigError(f"{name} has no rotary position embedding (no inv_freq): its positions cannot be moved")


def _mentions(model: nn.Module, word: str) -> bool:
    return any(word in name for m in model.modules() for name in inspect.unwrap(type(m).forward).__code__.co_names)
