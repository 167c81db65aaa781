"""The keys and values of one layer, in a ring that never grows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fastllm.errors import ConfigError
from fastllm.streaming.eight import EightBits
from fastllm.streaming.rotation import Keys

if TYPE_CHECKING:
    from fastllm.streaming.step import Place, Step


@dataclass(frozen=True)
class Reach:
    """What a query sees: itself, the `window` - 1 tokens before it and the first `sinks` tokens."""

    sinks: int
    window: int

    @property
    def size(self) -> int:
        return self.sinks + self.window

    def slot(self, token: int) -> int:
        """Where in the ring a row's `token`-th token lies."""
        return token if token < self.sinks else self.sinks + (token - self.sinks) % self.window


@dataclass(eq=False)
class Stream:
    """What the layers of a cache share: how far the text has come, and the forward pass under way."""

    counts: list[int] | None = None  # real tokens seen of each row; None before the first
    columns: int = 0  # tokens seen, padding counted
    origin: int = 0  # the place of the first token: any is the same, and a test may begin far out
    step: Step | None = None


class RingLayer(CacheLayerMixin):
    """Slots 0 .. sinks - 1 hold the first tokens, the others a ring of the last `window`, in keys and values (B, K, slots, D).

    Keys of the window stay as they came, rotated for their place in the text; those of the sinks are turned forward with the
    query, from fp32 masters that are not rotated, so that every key is as far from the query as it would be inside the cache.

    With `eight`, keys and values lie in 8 bits, with a scale (B, K, slots, 1) for each.
    """

    is_compileable = False
    is_croppable = False  # not always: what has been evicted does not come back
    supports_early_init = False

    def __init__(
        self, stream: Stream, reach: Reach, rotation: Keys, is_sliding: bool, eight: EightBits | None = None
    ) -> None:
        super().__init__()
        self.stream, self.reach, self.rotation, self.is_sliding = stream, reach, rotation, is_sliding
        self.eight = eight
        self.key_scales: Tensor | None = None
        self.value_scales: Tensor | None = None
        # Of the forward pass under way: where its tokens go, and the sinks' cosines and sines, (B, 1, S, D) or of one query (S, D)
        self.place: Place | None = None
        self.turn: tuple[Tensor, Tensor] | None = None
        self.fed = False  # whether the forward pass under way has given this layer its keys
        # (2, B, K, S, D) fp32: the sinks as they were before rotation, and those a quarter turn on
        self.masters: Tensor | None = None
        # Keys and values of this forward pass that wait for its end, as they take the slots of what it still reads; of a tree, for
        # what of it is accepted
        self.pending: tuple[Tensor, Tensor] | None = None

    # ---- what a forward pass calls -----------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps what is new and gives what this forward pass attends to, in the order of its mask."""
        step, place = self.stream.step, self.place
        if step is None or place is None:
            raise ConfigError(
                "this StreamingCache was made for another model, or for this model under another wrapper: "
                "make one with fastllm.StreamingCache(model)"
            )
        if not step.given and self.rotation.table is not None:
            raise ConfigError("the keys given to this StreamingCache were not rotated by its tables")
        if key_states.device != self.rotation.device:
            raise ConfigError(
                f"the model was on {self.rotation.device} when this StreamingCache was made: make a new one"
            )
        if self.is_initialized and (key_states.dtype, value_states.dtype) != (self.dtype, self.value_dtype):
            if self.stream.counts is not None:
                which, held, given = "keys", self.dtype, key_states.dtype
                if held == given:
                    which, held, given = "values", self.value_dtype, value_states.dtype
                raise ConfigError(f"this StreamingCache holds {which} in {held} and was given {given}: reset() it")
            self.drop()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.fed = True
        return place.store(self, key_states.detach(), value_states.detach())

    @property
    def batch(self) -> int:
        return 0 if self.keys is None else self.keys.shape[0]

    @torch.compiler.disable
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        (batch, heads, _, head_dim), value_dim = key_states.shape, value_states.shape[-1]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.value_dtype = value_states.dtype  # under autocast not that of the keys
        stored = None if self.eight is None else torch.int8
        # Plain tensors even under inference_mode, so that the cache goes on outside of it; zeros, as slots not yet
        # written lie under a mask, which a NaN would pass.
        with torch.inference_mode(False):
            slots = (batch, heads, self.reach.size)
            self.keys = key_states.new_zeros((*slots, head_dim), dtype=stored)
            self.values = value_states.new_zeros((*slots, value_dim), dtype=stored)
            if self.eight is not None:
                self.key_scales, self.value_scales = (
                    key_states.new_zeros((*slots, 1), dtype=torch.float32) for _ in range(2)
                )
            if self.reach.sinks:
                shape = (2, batch, heads, self.reach.sinks, head_dim)
                self.masters = torch.zeros(shape, dtype=torch.float32, device=self.device)
        self.is_initialized = True

    # ---- slots -------------------------------------------------------------------------------------------------------

    def put(self, index: Any, keys: Tensor, values: Tensor) -> None:
        """Writes what `index` of (B, K, slots) takes."""
        assert self.keys is not None
        assert self.values is not None
        if self.eight is None:
            self.keys[index], self.values[index] = keys.to(self.keys.device), values.to(self.values.device)
            return
        assert self.key_scales is not None
        assert self.value_scales is not None
        for ring, scales, new in ((self.keys, self.key_scales, keys), (self.values, self.value_scales, values)):
            ring[index], scales[index] = (t.to(ring.device) for t in self.eight.packed(new))

    def held(self, slots: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, K, slots, D) in the model's dtype: the ring's own where it holds that, else copies."""
        assert self.keys is not None
        assert self.values is not None
        keys, values = self.keys, self.values
        if slots != self.reach.size:
            keys, values = keys[:, :, :slots], values[:, :, :slots]
        if self.eight is None:
            return keys, values
        assert self.key_scales is not None
        assert self.value_scales is not None
        return (
            self.eight.unpacked(keys, self.key_scales[:, :, :slots], self.dtype),
            self.eight.unpacked(values, self.value_scales[:, :, :slots], self.value_dtype),
        )

    def rounded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values as they will come back from the ring."""
        return (keys, values) if self.eight is None else (self.eight.rounded(keys), self.eight.rounded(values))

    # ---- sinks -------------------------------------------------------------------------------------------------------

    def quarter(self, keys: Tensor) -> Tensor:
        """Keys turned by a quarter, (..., D); 0 where a dimension is not rotated."""
        return keys[..., self.rotation.partner] * self.rotation.sign

    def unrotated(self, keys: Tensor, cos: Tensor, sin: Tensor, factor: float) -> Tensor:
        """(2, ...): fp32 masters of keys that were rotated by these very cosines and sines, (..., D) each in key order.

        K = k0·c + J(k0)·s with J² = -1 is undone by (K·c - J(K)·s) / (c² + s²), whatever rounding did to c and s. Masters
        hold the attention factor, as the keys they came from do.
        """
        keys = keys.float()
        turned = (keys * cos - self.quarter(keys) * sin) / (cos * cos + sin * sin)
        turned = torch.where(self.rotation.sign != 0, turned * factor, keys)
        return torch.stack((turned, self.quarter(turned)))

    def rotated(self, cos: Tensor, sin: Tensor) -> Tensor:
        """The sinks rotated by (..., S, D) cosines and sines, in fp32."""
        assert self.masters is not None
        return (self.masters[0] * cos).addcmul_(self.masters[1], sin)

    # ---- the rest of what transformers asks of a layer -------------------------------------------------------------------

    def get_seq_length(self) -> int:
        return self.stream.columns

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in Transformers 5.0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        if self.stream.step is None or self.place is None:
            queries = query_length if isinstance(query_length, int) else len(query_length)
            return min(self.stream.columns, self.reach.size) + queries, 0
        return self.place.seen, 0

    def _tensors(self) -> list[tuple[str, int, Tensor]]:
        """Name, dimension of the batch and tensor."""
        named = (
            ("keys", 0, self.keys), ("values", 0, self.values), ("masters", 1, self.masters),
            ("key_scales", 0, self.key_scales), ("value_scales", 0, self.value_scales),
        )  # fmt: skip
        return [(name, dim, t) for name, dim, t in named if t is not None]

    def offload(self) -> None:
        for name, _, tensor in self._tensors():
            setattr(self, name, tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        for name, _, tensor in self._tensors():
            setattr(self, name, tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forgets. Buffers are kept for the next text; their shape is that of the batch that comes."""
        for _, _, tensor in self._tensors():
            tensor.zero_()

    def select(self, rows: Tensor) -> None:
        """Rows of the batch, in this order."""
        with torch.inference_mode(False):
            for name, dim, tensor in self._tensors():
                setattr(self, name, tensor.index_select(dim, rows.to(tensor.device)))

    def drop(self) -> None:
        """Frees the buffers."""
        self.keys = self.values = self.masters = self.key_scales = self.value_scales = None
        self.is_initialized = False

    def bytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for _, _, t in self._tensors())
