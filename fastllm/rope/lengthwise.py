"""Frequencies that follow the length of the text, the same with a cache as without.

Keys in a cache were rotated, and the layers above them computed, under the frequencies of their time. So the frequencies change
rarely, when the text has doubled (for longrope: once), and when they do the cache is filled again from its tokens. All in all that
is at most twice the work of a forward pass over the text, and every step gives what an uncached one over the same prefix does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.errors import ConfigError
from fastllm.patching.replacement import Replacement
from fastllm.rope import angles

# The type in a config: transformers' own "dynamic" changes its frequencies with every token.
DOUBLING = "dynamic_doubling"
KINDS = (DOUBLING, "longrope")
_COVERED = "_fastllm_covered_forward"  # a patch of the rotary module, while frequencies follow the text


def level_of(tokens: int, original: int) -> int:
    """How often the original length must double to hold `tokens`."""
    return max(0, (-(-tokens // original) - 1).bit_length()) if tokens > original else 0


def doubled(tokens: int, original: int) -> int:
    """The length that stands for `tokens`: original, twice that, four times, ..."""
    return original << level_of(tokens, original)


class Frequencies:
    """Stands in the forward of a rotary module: the frequencies of the longest position at hand, then what the class's own
    forward gives, from exact angles where it is of the usual kind.

    Unlike transformers' own update it keeps nothing from one call to the next.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.known: dict[tuple[str, int], Tensor] = {}
        self.table = angles.found_table(module)

    @torch.no_grad()
    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        kind = args[0] if args else kwargs.get("layer_type")
        rope_type = module.rope_type if kind is None else module.rope_type[kind]
        if rope_type in KINDS:
            level = self.level(int(position_ids.max()) + 1)
            name = "inv_freq" if kind is None else f"{kind}_inv_freq"
            module._buffers[name] = self.frequencies(rope_type, kind, level).to(x.device)
        if self.table is not None:
            return self.table(x, position_ids, *args, **kwargs)
        return inspect.unwrap(type(module).forward)(module, x, position_ids, *args, **kwargs)

    def level(self, tokens: int) -> int:
        levels = [level_of(tokens, original) for original in self._originals().values()]
        return max(levels, default=0)

    def frequencies(self, rope_type: str, kind: str | None, level: int) -> Tensor:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        if rope_type == "longrope":
            level = min(level, 1)
        key = (kind or "", level)
        if key not in self.known:
            length = self._originals()[kind or ""] << level
            config = self.module.config
            self.known[key], _ = ROPE_INIT_FUNCTIONS[rope_type](
                config, torch.device("cpu"), seq_len=length, layer_type=kind
            )
        return self.known[key]

    def _originals(self) -> dict[str, int]:
        """The trained length of each kind of layer whose frequencies follow the text."""
        parameters = self.module.config.rope_parameters
        by_kind = parameters if "rope_type" not in parameters else {"": parameters}
        return {
            kind: int(of_kind["original_max_position_embeddings"])
            for kind, of_kind in by_kind.items()
            if of_kind and of_kind["rope_type"] in KINDS
        }


class Recorder:
    """A pre-hook and a hook of the module that owns the layers: keeps the tokens of a cache in the cache itself, and fills it
    again when they have grown into other frequencies."""

    def __init__(self, frequencies: Frequencies) -> None:
        self.frequencies = frequencies
        self.new: tuple[Tensor, Tensor, Tensor] | None = None  # of the call under way: tokens, positions, real
        self.wanted = 0  # its queries

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        kwargs = {**dict(zip(names, args)), **kwargs}
        self.new, ids, cache = None, kwargs.get("input_ids"), kwargs.get("past_key_values")
        if getattr(cache, "own_frequencies", False):  # a StreamingCache: one set of frequencies, that of its size
            return None
        if ids is None:
            if cache is not None:
                raise ConfigError("frequencies that follow the text need input_ids beside a cache, not inputs_embeds")
            return None
        if not _refillable(cache):
            raise ConfigError(
                f"{type(cache).__name__} keeps states beside its layers and cannot be filled again when the frequencies of this "
                "text change: give use_cache=False, or the model a method whose frequencies stay"
            )
        past = _tokens_of(cache)
        held = 0 if cache is None else int(cache.get_seq_length())
        if past is None and held:
            raise ConfigError(
                "this cache was filled before the frequencies of the model followed its text: begin with a new one"
            )
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(held, held + ids.shape[1], device=ids.device).unsqueeze(0)
        positions = positions.expand(ids.shape)
        new = (ids, positions, _real(kwargs.get("attention_mask"), ids))
        self.new, self.wanted = new, ids.shape[1]
        if past is None or cache is None:
            return (), kwargs
        if past.of is not self.frequencies:
            raise ConfigError("this cache was filled under other frequencies: begin with a new one")
        mask = kwargs.get("attention_mask")
        level = self.frequencies.level(int(positions.max()) + 1)
        if level == past.level:
            return (), kwargs
        if isinstance(mask, Tensor) and mask.dim() == 4 and not _is_causal(mask):
            raise ConfigError(
                "the frequencies of this text change now, and the cache cannot be filled again under a mask of 4 "
                "dimensions that is not the causal one: give a mask of 2"
            )
        whole = [torch.cat(pair, 1) for pair in zip(past.history(), new)]
        for layer in cache.layers:
            _empty(layer)
        self.new = (whole[0], whole[1], whole[2])
        kwargs |= {"input_ids": whole[0], "position_ids": whole[1], "attention_mask": whole[2].long()}
        if "cache_position" in kwargs:
            kwargs["cache_position"] = torch.arange(whole[0].shape[1], device=ids.device)
        return (), kwargs

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if self.new is None:
            return output
        (ids, positions, real), self.new = self.new, None
        cache = getattr(output, "past_key_values", None)
        if cache is not None and _refillable(cache):
            layer = _tokens_of(cache)
            if layer is None:
                layer = _tokens_layer()()
                cache.layers.append(layer)
            layer.add(ids, positions, real)
            layer.of = self.frequencies
            layer.level = self.frequencies.level(int(positions.max()) + 1)
        if ids.shape[1] > self.wanted:
            for name in ("last_hidden_state", "hidden_states"):
                value = getattr(output, name, None)
                if isinstance(value, Tensor):
                    setattr(output, name, value[:, -self.wanted :])
                elif value is not None:
                    setattr(output, name, tuple(t[:, -self.wanted :] for t in value))
        return output


@functools.cache
def _tokens_layer() -> type:
    from transformers.cache_utils import DynamicLayer

    class TokensLayer(DynamicLayer):
        """The tokens of a cache as one more layer of it, so that whatever reorders, crops or repeats the cache does so to them.
        keys: (B, 1, L, 1) tokens; values: (B, 1, L, 2) positions, and 1 where a token is real."""

        level = 0
        of: Any = None  # the frequencies under which the cache was filled
        is_compileable = True  # whether a cache is, the other layers decide

        def add(self, ids: Tensor, positions: Tensor, real: Tensor) -> None:
            self.update(ids[:, None, :, None], torch.stack((positions.to(ids), real.to(ids)), -1)[:, None])

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.is_initialized = True

        def history(self) -> tuple[Tensor, Tensor, Tensor]:
            assert self.keys is not None
            assert self.values is not None
            values = self.values[:, 0]
            return self.keys[:, 0, :, 0], values[..., 0], values[..., 1].bool()

    return TokensLayer


def _tokens_of(cache: Any) -> Any:
    """The layer of tokens of a cache that has one, with something in it."""
    for layer in reversed(getattr(cache, "layers", None) or []):
        if hasattr(layer, "history"):
            return layer if layer.is_initialized and layer.get_seq_length() else None
    return None


def _refillable(cache: Any) -> bool:
    """Whether emptying its layers empties a cache: some hybrid models keep recurrent states in lists of its own."""
    if cache is None:
        return True
    own = [value for name, value in vars(cache).items() if name != "layers"]
    listed = [item for value in own if isinstance(value, (list, dict)) for item in _items(value)]
    return hasattr(cache, "layers") and not any(isinstance(value, Tensor) for value in (*own, *listed))


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _empty(layer: Any) -> None:
    """Forgets what a layer of a cache holds, in place where its size is fixed."""
    layer.reset()
    if hasattr(layer, "max_cache_len") or not hasattr(layer, "keys"):
        return
    layer.keys = layer.values = None
    layer.is_initialized = False
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = 0


def _is_causal(mask: Tensor) -> bool:
    """Whether every real query of a mask (B, H, Lq, Lk) sees a run of keys up to itself, as padding on the left leaves it."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    steps = (seen[..., 1:] != seen[..., :-1]).sum(-1)
    return bool((steps <= 2).all())


def _real(mask: Any, ids: Tensor) -> Tensor:
    """(B, Lq) bool: which of the new tokens are no padding, from whatever mask a forward was given."""
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    queries = ids.shape[1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= queries:
        return mask[:, -queries:].bool()
    if isinstance(mask, Tensor) and mask.dim() == 4:  # a real query sees itself at least
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return seen.any(-1).any(1)[:, -queries:].expand(ids.shape)
    return torch.ones_like(ids, dtype=torch.bool)


def install(owner: nn.Module, rotary: nn.Module) -> None:
    """Makes a rotary module's frequencies follow the text, and the module that owns it keep its caches consistent."""
    remove(owner, rotary)
    frequencies = Frequencies(rotary)
    if isinstance(there := rotary.__dict__.get("forward"), Replacement):
        rotary.__dict__[_COVERED] = there  # where unpatch finds it
    rotary.__dict__["forward"] = frequencies
    recorder = Recorder(frequencies)
    owner.register_forward_pre_hook(recorder.before, with_kwargs=True)
    owner.register_forward_hook(recorder.after, with_kwargs=True)


def remove(owner: nn.Module, rotary: nn.Module) -> None:
    if isinstance(rotary.__dict__.get("forward"), Frequencies):
        del rotary.__dict__["forward"]
        if covered := rotary.__dict__.pop(_COVERED, None):
            rotary.__dict__["forward"] = covered
    for hooks, flags in (
        (owner._forward_pre_hooks, owner._forward_pre_hooks_with_kwargs),
        (owner._forward_hooks, owner._forward_hooks_with_kwargs),
    ):
        for number in [n for n, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Recorder)]:
            del hooks[number]
            flags.pop(number, None)
