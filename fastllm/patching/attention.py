"""Attention and masks in the form transformers calls them: ``_attn_implementation == "fastllm"``.

A mask is built once per forward and says no more than the kernels need to be told. Of the forms that travel from the
model to its layers, only the first two are transformers' own:

- None: what SDPA makes of None: causal where the module is (queries are the first ones if there are more keys), or all.
- bool, 4 dimensions: everything, causality included; broadcastable to (B, H, Lq, Lk).
- bool, (B, Lk) or (B, 0): causal, the last query on the last key; False where a key is padding, no padding at all.
- uint8, the same: besides, the layer's own sliding window holds.
- int32, (documents + 1,): the rows of the batch one after the other, packed; where documents begin. int64: besides, the
  layer's own sliding window holds.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastllm import ops
from fastllm.errors import ConfigError
from fastllm.patching.replacement import Replacement

NAME = "fastllm"


class View(Replacement):
    """Stands for a module's config: all that it says, but the attention implementation is ours.

    The config itself stays as it is, for it may be shared with other models.
    """

    _attn_implementation = NAME

    def __init__(self, rule: str, module: nn.Module, slot: str, settings: dict[str, Any], previous: Any) -> None:
        self.__dict__.update(rule=rule, module=module, slot=slot, settings=settings, previous=previous)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "previous" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.previous, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.previous, name, value)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of query (B, H, Lq, D) over key and value (B, K, Lk, D) to (B, Lq, H, Dv), as the interface wants it.

    Left to the model's own implementation: dropout, position biases, float masks, paged caches and, where that is the
    eager one, attention weights as output.
    """
    view = module.__dict__.get("config")
    own = view.previous if isinstance(view, View) else None
    mask = attention_mask
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    strange = (
        (dropout and module.training)
        or kwargs.get("position_bias") is not None
        or kwargs.get("cache") is not None
        or not (mask is None or (isinstance(mask, Tensor) and not mask.is_floating_point()))
        or not query.dtype == key.dtype == value.dtype
        or (
            getattr(own, "_attn_implementation", None) == "eager"
            and (kwargs.get("output_attentions") or getattr(own, "output_attentions", False))
        )
    )
    if strange:
        mask = whole_mask(mask, query, key, causal, sliding_window)
        return _by_its_own(
            module, own, query, key, value, mask, dropout=dropout, scaling=scaling, sliding_window=sliding_window,
            softcap=softcap, is_causal=is_causal, s_aux=s_aux, **kwargs,
        )  # fmt: skip
    dilated = view.settings.get("dilated") if isinstance(view, View) else None
    if dilated:
        return _dilated(query, key, value, mask, causal, scaling, sliding_window, dilated), None
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sink_logits": s_aux, "causal": causal}
    if mask is not None and mask.dim() == 1:
        window = sliding_window if mask.dtype == torch.int64 else None
        return _packed(query, key, value, mask.int(), window, options), None
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None and query.shape[0] == 1 and key.shape[2] == query.shape[2]:
        if mask is None:
            return _packed(query, key, value, starts.int(), sliding_window if causal else None, options), None
        token = torch.arange(key.shape[2], device=query.device)
        document = torch.bucketize(token, starts.to(torch.int64), right=True)
        mask = whole_mask(mask, query, key, causal, sliding_window) & (document.unsqueeze(1) == document)
    if mask is None:
        if causal and 1 < query.shape[2] < key.shape[2]:
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    elif mask.dim() == 4:
        options |= {"mask": mask, "causal": False}
    else:
        options["window"] = sliding_window if mask.dtype == torch.uint8 else None
        options["mask"] = mask.bool()[:, None, None] if mask.shape[1] else None
    return ops.attention(query, key, value, **options).transpose(1, 2), None


def _packed(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, window: int | None, options: dict[str, Any]
) -> Tensor:
    batch, length = query.shape[0], query.shape[2]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    return ops.attention(q, k, v, cu_seqlens_q=starts, window=window, **options).unflatten(0, (batch, length))


def _dilated(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scaling: float | None,
    window: int | None, patterns: tuple[tuple[int, ...], tuple[int, ...]],
) -> Tensor:  # fmt: skip
    """Dilated attention; over a cache that is longer than the queries, by its definition."""
    queries, keys = query.shape[2], key.shape[2]
    padding = mask if mask is not None and mask.dim() == 2 and mask.shape[1] and mask.dtype == torch.bool else None
    simple = mask is None or padding is not None or (mask.dim() == 2 and not mask.shape[1])
    if simple and queries == keys and not (mask is not None and mask.dtype == torch.uint8):
        return ops.dilated_attention(
            query, key, value, *patterns, causal=causal, scale=scaling, key_mask=padding
        ).transpose(1, 2)
    seen = whole_mask(mask, query, key, causal, window)
    j = torch.arange(keys, device=query.device)
    if mask is not None and mask.dim() == 4 and causal and seen is not None:
        # A cache of fixed size: queries stand anywhere along it. The last key that one sees is its own.
        i = torch.where(seen, j, 0).amax(-1, keepdim=True)
    else:
        i = (j[-queries:] if mask is not None or queries == 1 else j[:queries]).unsqueeze(1)
    head = torch.arange(query.shape[1], device=query.device).view(-1, 1, 1)
    parts = []
    for segment, rate in zip(*patterns):
        held = (
            (i // segment == j // segment) & (i % segment % rate == head % rate) & (j % segment % rate == head % rate)
        )
        visible = held if seen is None else held & seen
        parts.append(ops.attention(query, key, value, causal=False, scale=scaling, mask=visible, return_lse=True))
    return ops.merge_attention(*zip(*parts))[0].transpose(1, 2)


def whole_mask(mask: Any, query: Tensor, key: Tensor, causal: bool, window: int | None) -> Any:
    """A mask in one of our forms as a bool mask of 4 dimensions; None where nothing is hidden; others as they are."""
    if not isinstance(mask, Tensor) and mask is not None:
        return mask
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        if not causal or queries == 1:
            return None
        return torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask.dim() == 4 or mask.is_floating_point():
        return mask
    i = torch.arange(queries, device=query.device).unsqueeze(1) + (keys - queries)
    j = torch.arange(keys, device=query.device)
    visible = ((j <= i) if causal else (j == j)).expand(queries, keys)
    if mask.dtype in (torch.uint8, torch.int64) and window is not None:
        visible = visible & (i - j < window)
    if mask.dim() == 2:
        return visible[None, None] & mask.bool()[:, None, None] if mask.shape[1] else visible[None, None]
    document = torch.bucketize(
        torch.arange(query.shape[0] * keys, device=query.device), mask.to(torch.int64), right=True
    )
    document = document.view(query.shape[0], 1, keys)
    return visible & (document.unsqueeze(-1) == document.unsqueeze(-2))


def _by_its_own(
    module: nn.Module, own: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
) -> Any:
    name = getattr(own, "_attn_implementation", None) or "sdpa"
    function = ALL_ATTENTION_FUNCTIONS.get(name)
    if name == "eager" or function is None:
        function = eager_of(type(module))
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = torch.zeros((), dtype=query.dtype, device=query.device).where(mask, torch.finfo(query.dtype).min)
    if function is None:
        raise NotImplementedError(f"{type(module).__name__} has no attention of its own for dropout or a float mask")
    return function(module, query, key, value, mask, **kwargs)


def eager_of(cls: type) -> Callable[..., Any] | None:
    """The eager attention function that a module's forward names."""
    forward: Any = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    if not isinstance(forward, types.FunctionType):
        return None
    names = [n for n in forward.__code__.co_names if "eager" in n and callable(forward.__globals__.get(n))]
    return forward.__globals__[names[0]] if len(names) == 1 else None


# ---- masks -------------------------------------------------------------------------------------------------------


def attention_mask(*args: Any, **kwargs: Any) -> Any:
    """What a forward's masks are made by; every case that the forms above do not cover is SDPA's mask."""
    if kwargs.get("kv_offset", 0) and getattr(kwargs.get("config"), "settings", {}).get("dilated"):
        raise ConfigError(
            "dilated attention needs a cache that keeps every token in its place, and this one has dropped some, as those of "
            "sliding-window layers do: give generate(past_key_values=transformers.DynamicCache()), or use_cache=False"
        )
    compact = None if args else _compact(kwargs)
    return _sdpa_mask(*args, **kwargs) if compact is None else compact[0]


def _sdpa_mask(*args: Any, **kwargs: Any) -> Any:
    return masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


def _compact(call: dict[str, Any]) -> tuple[Tensor | None] | None:
    numbers = [call.get(n) for n in ("q_length", "kv_length", "q_offset", "kv_offset")]
    positions = call.get("cache_position")  # Transformers 5.0 tells these of the queries
    if isinstance(positions, Tensor) and not torch.compiler.is_compiling():
        numbers[0], numbers[2] = len(positions), int(positions[0])
    queries, keys, ahead, first = (n if isinstance(n, int) else 0 for n in numbers)
    if not all(isinstance(n, int) for n in numbers) or call.get("use_vmap"):
        return None  # another transformers, a cache of fixed size, or a mask function of the user's
    if ahead + queries != first + keys:
        return None
    function, padding = call["mask_function"], call.get("attention_mask")
    plain = function is masking_utils.causal_mask_function and call.get("allow_is_causal_skip", True)
    if plain and padding is None and (queries == keys or queries == 1):
        return (None,)
    if torch.compiler.is_compiling():
        return None
    batch, device = call["batch_size"], call.get("device", "cpu")
    if padding is not None:
        padding = padding.bool()
        if padding.shape[1] < first + keys:
            padding = nn.functional.pad(padding, (0, first + keys - padding.shape[1]))
        padding = padding[:, first : first + keys]
        if bool(padding.all()):
            padding = None
    if function is masking_utils.bidirectional_mask_function and call.get("allow_is_bidirectional_skip"):
        return (None if padding is None else padding[:, None, None],)
    windows = getattr(call.get("config"), "settings", {}).get("windows", False)
    if documents := _matches(function, _PACKED):
        if padding is not None or queries != keys:
            return None
        return (_starts(documents["documents"], torch.int32),)
    if windows and (documents := _matches(function, _PACKED_WINDOW)):
        if padding is not None or queries != keys or documents["window"] != call.get("local_size"):
            return None
        return (_starts(documents["documents"], torch.int64),)
    if not call.get("allow_is_causal_skip", True):
        return None
    windowed = windows and (_matches(function, _WINDOW) or {}).get("window", -1) == call.get("local_size", 0)
    if function is not masking_utils.causal_mask_function and not windowed:
        return None
    if padding is None:
        whole = not windowed and (queries == keys or queries == 1)
        padding = None if whole else torch.empty(batch, 0, dtype=torch.bool, device=device)
    return (padding.to(torch.uint8) if windowed and padding is not None else padding,)


def _starts(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """Where documents begin, (documents + 1,), from the document of each token, (B, L)."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    tokens = torch.nonzero(begins.flatten()).flatten()
    return torch.cat((tokens, tokens.new_tensor([documents.numel()]))).to(dtype)


@dataclass(frozen=True)
class _Hole:
    """In a pattern of mask functions, what may be anything."""

    name: str


def _pattern(*names: str) -> Any:
    """The mask function that transformers makes of these makers, the innermost last; None where it has no such."""
    makers = {name: getattr(masking_utils, name, None) for name in names}
    function = masking_utils.causal_mask_function
    for name, maker in reversed(makers.items()):
        if maker is None:
            return None
        windowed = name == "sliding_window_causal_mask_function"
        function = maker(_Hole("window")) if windowed else maker(function, _Hole("positions"), _Hole("documents"))
    return function


_WINDOW = _pattern("sliding_window_causal_mask_function")
_PACKED = _pattern("packed_sequence_compatibility_function")
_PACKED_WINDOW = _pattern("packed_sequence_compatibility_function", "sliding_window_causal_mask_function")


def _matches(function: Any, pattern: Any) -> dict[str, Any] | None:
    """What stands in the holes of a pattern where a function is made like it; else None."""
    if isinstance(pattern, _Hole):
        return {pattern.name: function}
    if isinstance(pattern, types.FunctionType):
        if not isinstance(function, types.FunctionType) or function.__code__ is not pattern.__code__:
            return None
        parts = [[c.cell_contents for c in f.__closure__ or ()] for f in (function, pattern)]
    elif isinstance(pattern, tuple):
        if not isinstance(function, tuple):
            return None
        parts = [list(function), list(pattern)]
    else:
        return {} if function is pattern else None
    found: dict[str, Any] = {}
    if len(parts[0]) != len(parts[1]):
        return None
    for one, other in zip(*parts):
        inside = _matches(one, other)
        if inside is None:
            return None
        found |= inside
    return found


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
