"""StreamingCache: StreamingLLM's attention sinks (arXiv 2309.17453) as a cache of Transformers."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from fastllm.errors import ConfigError
from fastllm.rope.angles import Angles
from fastllm.streaming import budget, rotation
from fastllm.streaming.eight import named
from fastllm.streaming.model import examine
from fastllm.streaming.ring import Reach, RingLayer, Stream
from fastllm.streaming.step import Frequencies, Piece, Step

_SLICED = ("input_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids")
_TAKE_MASKS = ("eager", "sdpa", "fastllm")


class StreamingCache(Cache):
    """A key/value cache of constant size: a query sees itself, the `window` - 1 tokens before it and the first `sinks` tokens.

    Positions are those inside the cache: sinks 0 .. sinks - 1, then the window in order, the query last. Keys of the window stay
    rotated for their place in the text, from angles reduced in fp64; sinks are turned forward from fp32 masters that are not
    rotated, by the number of tokens evicted. Scores depend on differences of positions alone, so that this is the same, at the cost
    of a ring-buffer write, and nothing drifts however long the text.

    ``model.generate(ids, past_key_values=cache)``: greedy, sampling, beams; several turns on one cache; batches padded on the
    left, each row with sinks of its own; prompts longer than the cache, which are then run in pieces. Layers that slide on their
    own beside others that do not (Gemma 3) keep their reach; where all of them slide, `sinks` + `window` must lie within it.

    Args:
        model: a Transformers decoder with RoPE, or with no positions at all; patched or not, or a wrapper around one.
            The cache hangs three hooks on it, which do nothing for other caches.
        sinks: first tokens that stay visible, S >= 0. With 0 the plain window.
        window: tokens, W >= 1; the query counts.
        offloading: keep keys and values on the CPU, and each layer's on its GPU only while it runs.
        kv_dtype: "int8" or "fp8" (e4m3) keeps keys and values in 8 bits, with an fp32 scale for every token of a head: a quarter of
            the memory of fp32, half of that of 16 bits. A number is then off by at most 1/254 of its head's largest, or in fp8
            by 1/16 of itself; attention reads copies in the model's dtype, one layer's at a time. None: the model's dtype.

    Memory: (S + W) keys and values of every row, allocated with the first tokens, and fp32 masters of the sinks. While a prompt runs
    past the window, those of at most 512 of its tokens more.
    A forward pass that is interrupted leaves the cache as it was before it; a prompt that ran in pieces, as it was after the
    last whole one, which `tokens_seen` tells.
    Under "dynamic" and "longrope" scaling the frequencies are those of a text of S + W tokens from the first token on.
    Gradients do not flow into the cache.

    Raises:
        ConfigError: sinks < 0, window < 1, a model whose positions cannot be moved (learned, ALiBi, RoPE of an unusual kind), with
            recurrent or shared layers, or an encoder-decoder. Later, with the cache left as it was: another batch size, another
            model, a crop to what has been evicted, assisted decoding, memory that is not there.
    """

    step_of = Step  # what a forward pass does; another one shows what goes wrong without
    own_frequencies = True  # for rope.lengthwise: this cache never needs to be filled again

    def __init__(
        self,
        model: nn.Module,
        sinks: int = 4,
        window: int = 1020,
        *,
        offloading: bool = False,
        kv_dtype: str | None = None,
    ) -> None:
        found, self.eight = examine(model, sinks, window), named(kv_dtype)
        if offloading and all(keys.device.type == "cpu" for keys in found.rotations.layers):
            raise ConfigError(
                "offloading moves keys and values from an accelerator to the CPU, and this model is on the CPU"
            )
        self.stream = Stream()
        self.reach = Reach(sinks, window)
        self.rotations = found.rotations
        self.angles = Frequencies(found.rotations.tables, self.reach.size)
        self._owner = weakref.ref(found.owner)
        self._scaling = copy.deepcopy(_scaling_of(found.owner))
        self._pieces: list[Any] = []
        self._tree: tuple[Tensor, Tensor] | None = None
        self._tried: Step | None = None
        layers = zip(found.reaches, found.rotations.first, found.sliding)
        self.rings = [
            RingLayer(self.stream, reach, found.rotations.layers[first], slides, self.eight)
            for reach, first, slides in layers
        ]
        self.reaches = set(found.reaches)
        super().__init__(layers=list(self.rings), offloading=offloading, offload_only_non_sliding=False)
        _install(found.owner, [table.module for table in found.rotations.tables])

    @classmethod
    def fit(cls, model: nn.Module, memory: str | int, batch: int = 1, sinks: int = 4, **options: Any) -> StreamingCache:
        """The cache with the largest window whose keys and values for `batch` rows take at most `memory` ("2GiB", or bytes).

        Raises:
            ConfigError: not even a window of 1 fits, with the sizes.
        """
        eight = named(options.get("kv_dtype"))
        return cls(model, sinks, budget.window_for(model, memory, batch, sinks, eight), **options)

    # ---- what has passed ---------------------------------------------------------------------------------------------

    @property
    def sinks(self) -> int:
        return self.reach.sinks

    @property
    def window(self) -> int:
        return self.reach.window

    @property
    def tokens_seen(self) -> int:
        """Tokens of the longest row, padding not counted."""
        return max(self.stream.counts or [0])

    @property
    def evicted(self) -> int:
        """Tokens of the longest row that no query sees any more."""
        return max(0, self.tokens_seen - self.reach.size)

    def memory_bytes(self) -> int:
        """Bytes of the tensors that the cache holds now."""
        return sum(layer.bytes() for layer in self.rings)

    def __repr__(self) -> str:
        return f"StreamingCache(sinks={self.sinks}, window={self.window}, tokens_seen={self.tokens_seen})"

    # ---- transformers' side ------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return -1 if self.stream.counts is None else len(self.stream.counts)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """For masks, whose keys are counted from the first one in the cache."""
        step, place = self.stream.step, self.rings[layer_idx].place
        if step is None or place is None:
            return self.get_seq_length(layer_idx)
        return place.seen - step.length

    def reset(self) -> None:
        self._pieces = []
        self.stream.counts, self.stream.columns, self.stream.step = None, 0, None
        self._tree = self._tried = None
        for layer in self.rings:
            layer.pending = None
            layer.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens; their number is given below 0, as for transformers' own caches.

        Raises:
            ConfigError: the tokens that would be seen then have been evicted; the cache is as before.
        """
        if isinstance(tokens_to_remove, bool) or not isinstance(tokens_to_remove, int):
            raise TypeError(f"tokens_to_remove must be an int, got {tokens_to_remove!r}")
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative integer, got {tokens_to_remove}")
        counts, remove = self.stream.counts, -tokens_to_remove
        if not remove:
            return
        if counts is None or remove > min(counts):
            raise ConfigError(f"cannot remove {remove} tokens of a cache that holds {min(counts or [0])}")
        for reach in self.reaches:
            if max(counts) > reach.size:
                raise ConfigError(
                    f"cannot remove {remove} tokens: {max(counts) - reach.size} have been evicted, and those that would be seen "
                    "again are among them"
                )
        self.stream.counts = [n - remove for n in counts]
        self.stream.columns -= remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.stream.counts is not None:
            self._select(torch.arange(len(self.stream.counts)).repeat_interleave(repeats))

    def _select(self, rows: Tensor) -> None:
        counts = self.stream.counts
        if counts is None:
            return
        rows = torch.as_tensor(rows)
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows.long()
        for layer in self.rings:  # before the counts, as it fails where there is no such row
            layer.select(rows)
        if len(set(counts)) > 1 or len(rows) != len(counts):
            self.stream.counts = [counts[b] for b in rows.tolist()]

    def activate_past_recording(self) -> None:
        raise ConfigError(
            "assisted decoding takes back tokens that it tried, and a StreamingCache has overwritten what they evicted: generate "
            "without assistant_model and prompt_lookup_num_tokens, or with transformers.DynamicCache()"
        )

    # ---- trees of candidates -----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def trying(self, mask: Tensor, depths: Tensor) -> Iterator[None]:
        """Inside, one forward pass over a tree (``tree_mask``) that leaves the cache as it is, until ``accept``."""
        self._tree = (depths, mask)
        try:
            yield
        finally:
            self._tree = None

    def accept(self, path: list[int]) -> None:
        """Takes these nodes of the tree just tried, root first, into the cache."""
        step, self._tried = self._tried, None
        if step is None:
            raise ConfigError("no tree has been tried on this StreamingCache")
        for layer in self.rings:
            place = step.places[layer.reach]
            assert isinstance(place, Piece)
            place.keep(path)
            place.commit(layer)
            layer.pending = None
        self.stream.counts = [n + len(path) for n in step.counts]
        self.stream.columns += len(path)

    # ---- one forward pass --------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Makes ready for the tokens of a forward, after running all of them but the last piece; returns its arguments."""
        if module is not self._owner():
            raise ConfigError(
                f"this StreamingCache was made for another {type(module).__name__}: make one for each model"
            )
        ids = kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        if not isinstance(ids, Tensor):
            raise ConfigError("a StreamingCache needs input_ids or inputs_embeds")
        batch, length = ids.shape[:2]
        stream = self.stream
        if stream.counts is not None and len(stream.counts) != batch:
            raise ConfigError(
                f"this StreamingCache holds {len(stream.counts)} rows and was given {batch}: reset() it, or "
                "batch_select_indices or batch_repeat_interleave first"
            )
        if (
            stream.step is not None and stream.step.read
        ):  # interrupted while it was writing: everything it needs is there
            self._write(stream.step)
        stream.step = self._tried = None
        self._check_scaling(module)
        if self._tree is not None and (batch != 1 or length != len(self._tree[0])):
            raise ConfigError(f"a tree of {len(self._tree[0])} nodes was given ids of shape {(batch, length)}")
        if length == 0:
            raise ConfigError("a forward pass on a StreamingCache needs at least one token")
        real = self._real(kwargs.get("attention_mask"), batch, length)
        if stream.counts is None:
            budget.check(self, batch, ids.device)
            for layer in self.rings:
                if layer.is_initialized and layer.batch != batch:
                    layer.drop()
        pieces = self._lengths(module, real, batch, length)
        if len(pieces) > 1 and kwargs.get("output_attentions"):
            raise ConfigError(
                f"a text of {length} tokens runs through this cache in {len(pieces)} pieces, whose attention weights "
                "do not make one matrix: leave out output_attentions"
            )
        outputs, at = [], 0
        for piece in pieces[:-1]:
            outputs.append(module(**_cut(kwargs, at, at + piece, length)))
            at += piece
        self._pieces = outputs
        kwargs = _cut(kwargs, at, length, length)
        real = real if real is None else real[:, at:]
        new = [length - at] * batch if real is None else real.sum(1).tolist()
        if real is not None and all(n == length - at for n in new):
            real = None
        stream.step = step = self.step_of(
            self.stream, self.angles, length - at, real, new, self.reaches, ids.device, self._tree
        )
        step.ready(self.rings)
        return self._told(module, kwargs, step)

    def _told(self, module: nn.Module, kwargs: dict[str, Any], step: Step) -> dict[str, Any]:
        """The arguments by which the model itself does what this step needs."""
        names = _parameters(_class(module))
        places = step.positions.clamp(0, self.reach.size - 1)
        if "position_ids" in names:
            kwargs["position_ids"] = places
        if "cache_position" in names or "cache_position" in kwargs:  # transformers before 5.3
            seen = max(p.seen for p in step.places.values())
            kwargs["cache_position"] = torch.arange(seen - step.length, seen, device=step.device)
        masked = any(p.mask is not None for p in step.places.values())
        if not masked:
            kwargs["attention_mask"] = None
            return kwargs
        implementation = _implementation(module)
        if implementation not in _TAKE_MASKS:
            self.stream.step = None
            raise ConfigError(
                f"attention {implementation!r} takes no mask for this batch: give the model attn_implementation='sdpa'"
            )
        batch = len(step.new)
        masks = {
            reach: as_given(module, place.whole_mask()).expand(batch, -1, -1, -1)
            for reach, place in step.places.items()
        }
        if len(masks) == 1:
            kwargs["attention_mask"] = next(iter(masks.values()))
        else:
            config: Any = module.config
            kinds = config.layer_types
            kwargs["attention_mask"] = {kind: masks[layer.reach] for kind, layer in zip(kinds, self.rings)}
        return kwargs

    def _end(self, output: Any) -> Any:
        """After the last piece: the cache has grown, and the outputs of all pieces become one."""
        step = self.stream.step
        assert step is not None
        if not all(layer.fed for layer in self.rings):  # counted as read, these tokens would be missing for ever
            self.stream.step = None
            raise ConfigError(
                "the model gave this StreamingCache no keys and values: in training mode under gradient checkpointing layers "
                "use no cache; model.eval() first"
            )
        if step.tree is None:
            self._write(step)
        else:
            self.stream.step, self._tried = None, step
        pieces, self._pieces = self._pieces, []
        return _joined([*pieces, output]) if pieces else output

    def _write(self, step: Step) -> None:
        """What every layer has read and is now to remember."""
        step.read = True
        for layer in self.rings:
            if layer.pending is not None:
                place = layer.place
                assert isinstance(place, Piece)
                place.commit(layer)
                layer.pending = None
        counts = [n + m for n, m in zip(step.counts, step.new)]
        self.stream.counts, self.stream.columns, self.stream.step = counts, step.columns + step.length, None

    def _lengths(self, module: nn.Module, real: Tensor | None, batch: int, length: int) -> list[int]:
        """How many tokens go at once. While nothing is evicted: all. Then so few that their sinks, of which every query needs its
        own, are not more keys than the window's; and one by one where attention takes no mask."""
        if length == 1 or self._tree is not None:
            return [length]
        counts = self.stream.counts or [0] * batch
        room = min(reach.size for reach in self.reaches) - max(counts)
        if length <= room:
            return [length]
        masks = _implementation(module) in _TAKE_MASKS
        at_once = max(16, min(512, self.window // max(1, self.sinks)))
        at_once = at_once if masks else 1
        first = [room] if room > 0 else []
        rest = length - sum(first)
        return first + [at_once] * (rest // at_once) + ([rest % at_once] if rest % at_once else [])

    def _real(self, mask: Any, batch: int, length: int) -> Tensor | None:
        """(B, length) bool: which new tokens are no padding; None: all."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < length:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(
                f"with a StreamingCache attention_mask must be (B, tokens so far) of 0 and 1, {batch} rows of at least {length}, "
                f"got {shape}"
            )
        new = mask[:, -length:].bool()
        return None if bool(new.all()) else new

    def _check_scaling(self, owner: nn.Module) -> None:
        now = _scaling_of(owner)
        if now == self._scaling:
            return
        if self.stream.counts is not None:
            raise ConfigError("the RoPE scaling of the model changed after this StreamingCache was filled: reset() it")
        self._scaling = copy.deepcopy(now)
        self.angles.refresh()


# ---- the hooks --------------------------------------------------------------------------------------------------------


class _Active(threading.local):
    """By rotary module, the cache whose forward pass is under way in this thread: its tables are for the places in that cache's
    text. Weak, as a forward pass that failed leaves its cache here until the next one."""

    def __init__(self) -> None:
        self.caches: weakref.WeakKeyDictionary[nn.Module, weakref.ref[StreamingCache]] = weakref.WeakKeyDictionary()

    def of(self, rotary: nn.Module) -> StreamingCache | None:
        found = self.caches.get(rotary)
        return None if found is None else found()


_ACTIVE = _Active()


def _install(owner: nn.Module, rotary: list[nn.Module]) -> None:
    if _before not in owner._forward_pre_hooks.values():
        owner.register_forward_pre_hook(_before, with_kwargs=True)
        owner.register_forward_hook(_after, with_kwargs=True)
    for module in rotary:
        if _table not in module._forward_hooks.values():
            module.register_forward_pre_hook(_at_zero, with_kwargs=True)
            module.register_forward_hook(_table, with_kwargs=True)


@torch.compiler.disable
def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    kwargs = {**dict(zip(_parameters(_class(module)), args)), **kwargs}
    cache = kwargs.get("past_key_values")
    _forget(module)
    if not isinstance(cache, StreamingCache):
        return None
    kwargs = cache._begin(module, kwargs)
    for table in cache.rotations.tables:
        _ACTIVE.caches[table.module] = weakref.ref(cache)
    return (), kwargs


@torch.compiler.disable
def _after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, StreamingCache):
        return None
    _forget(module)
    return cache._end(output)


def _forget(owner: nn.Module) -> None:
    """A forward pass that failed may have left its cache behind."""
    for rotary, found in list(_ACTIVE.caches.items()):
        cache = found()
        if cache is None or cache._owner() is owner:
            _ACTIVE.caches.pop(rotary, None)


@torch.compiler.disable
def _at_zero(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Its own table will not be used: one position is enough, and one at which nothing is rescaled."""
    return (
        rotation.with_positions(args, kwargs, lambda ids: ids[..., :1] * 0) if _ACTIVE.of(module) is not None else None
    )


@torch.compiler.disable
def _table(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    cache = _ACTIVE.of(module)
    if cache is None or cache.stream.step is None:
        return None
    kind = args[2] if len(args) > 2 else kwargs.get("layer_type")
    step, number = cache.stream.step, cache.rotations.number(module, kind)
    step.given = True
    if isinstance(output[0], Angles):  # a patched model's, whose kernel takes cosines of what it is given, unrounded
        factor, inv_freq = cache.angles.factor(number), cache.angles.single(number, output[0].positions.device)
        return tuple(Angles(step.tokens, inv_freq, factor, a.which, a.layout, a.of_table) for a in output)
    step.rounded[number] = output[0].dtype
    return cache.angles.columns(number, step.tokens, output[0])


# ---- small things -----------------------------------------------------------------------------------------------------


def as_given(module: nn.Module, mask: Tensor) -> Tensor:
    """A bool mask of 4 dimensions as the model's attention takes it: as it is, or by eager attention, to be added."""
    if _implementation(module) != "eager":
        return mask
    dtype = next(module.parameters()).dtype
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, torch.finfo(dtype).min)


def _class(module: nn.Module) -> Any:
    return type(module)


@functools.cache
def _parameters(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _scaling_of(owner: nn.Module) -> Any:
    return getattr(getattr(owner, "config", None), "rope_parameters", None)


def _implementation(module: nn.Module) -> str:
    return getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager"


def _cut(kwargs: dict[str, Any], start: int, stop: int, length: int) -> dict[str, Any]:
    """The arguments of a forward for its columns start .. stop - 1 of `length`."""
    cut = dict(kwargs)
    if stop - start < length:
        cut |= {n: cut[n][:, start:stop] for n in _SLICED if isinstance(cut.get(n), Tensor)}
        if isinstance(mask := cut.get("attention_mask"), Tensor):
            cut["attention_mask"] = mask[:, : mask.shape[1] - (length - stop)]
        cut.pop("position_ids", None)
        cut.pop("cache_position", None)
    return cut


def _joined(outputs: list[Any]) -> Any:
    """Outputs of the pieces of one text as one."""
    last = outputs[-1]
    if isinstance(last, tuple):
        return (torch.cat([o[0] for o in outputs], 1), *last[1:])
    last.last_hidden_state = torch.cat([o.last_hidden_state for o in outputs], 1)
    if getattr(last, "hidden_states", None) is not None:
        last.hidden_states = tuple(torch.cat(layer, 1) for layer in zip(*(o.hidden_states for o in outputs)))
    return last
