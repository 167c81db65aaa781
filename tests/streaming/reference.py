"""StreamingLLM as the paper tells it: keys are kept as they were before rotation, and at every step all of them are rotated for
their places inside the cache by the model's own functions."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache


class PlainCache(DynamicCache):
    """For one new token at a time, the model told that it stands at the last place in the cache."""

    def __init__(self, model: Any, sinks: int, window: int) -> None:
        super().__init__(config=model.config.get_text_config())
        self.model, self.sinks, self.window = model, sinks, window
        self.base = next(m for m in model.modules() if hasattr(m, "rotary_emb"))
        self.apply = sys.modules[type(self.base).__module__].__dict__["apply_rotary_pos_emb"]
        self.local = [bool(getattr(layer, "is_sliding", False)) for layer in self.layers]
        self.mixed = any(self.local) and not all(self.local)
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.seen = 0

    def size(self) -> int:
        return self.sinks + self.window

    def place(self) -> int:
        return min(self.seen, self.size() - 1)

    def rotated(self, keys: Tensor, places: Tensor, layer: int, back: bool = False) -> Tensor:
        kinds = getattr(self.base.config, "layer_types", None)
        named = (kinds[layer],) if kinds and isinstance(getattr(self.base.rotary_emb, "rope_type", ""), dict) else ()
        cos, sin = self.base.rotary_emb(keys, places.unsqueeze(0), *named)
        dims = cos.shape[-1] * (2 if self.base.config.model_type == "gpt_oss" else 1)  # its table has each angle once
        turned, rest = keys[..., :dims], keys[..., dims:]
        factor = float((cos[0, 0] ** 2 + sin[0, 0] ** 2)[0]) if back else 1.0
        turned = self.apply(turned, turned, cos, -sin if back else sin)[1] / factor
        return torch.cat((turned, rest), -1)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        assert key_states.shape[2] == 1
        sinks, size = self.sinks, self.size()
        if self.mixed and self.local[layer_idx]:
            sinks, size = 0, self.layers[layer_idx].sliding_window
        key = self.rotated(key_states, torch.tensor([self.place()]), layer_idx, back=True)
        keys, values = key, value_states
        if layer_idx in self.kept:
            keys, values = (torch.cat(pair, 2) for pair in zip(self.kept[layer_idx], (key, value_states)))
        if keys.shape[2] > size:
            keys, values = (torch.cat((t[:, :, :sinks], t[:, :, sinks + 1 :]), 2) for t in (keys, values))
        self.kept[layer_idx] = keys, values
        places = torch.arange(keys.shape[2]) + self.place() + 1 - keys.shape[2]  # the query stands at the last one
        return self.rotated(keys, places, layer_idx), values

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_mask_sizes(1, layer_idx)[0] - 1

    def get_seq_length(self, layer_idx: int = 0) -> int:  # from which Transformers 5.0 finds the query's place in masks
        return self.get_query_offset()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        local = self.mixed and self.local[layer_idx]
        return min(self.seen + 1, self.layers[layer_idx].sliding_window if local else self.size()), 0


class Reader:
    """Reads tokens one by one; ``logits`` are those of all it has read."""

    def __init__(self, model: Any, sinks: int, window: int) -> None:
        self.model, self.cache, self.logits = model, PlainCache(model, sinks, window), []

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        for token in ids.split(1, dim=1):
            places = torch.full((len(ids), 1), self.cache.place())
            out = self.model(token, past_key_values=self.cache, position_ids=places, use_cache=True)
            self.logits.append(out.logits)
            self.cache.seen += 1
        return torch.cat(self.logits, 1)


def logits(model: Any, ids: Tensor, sinks: int, window: int) -> Tensor:
    """(B, L, V), token by token."""
    return Reader(model, sinks, window).read(ids)
