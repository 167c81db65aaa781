"""Makes "ntk", "ntk_mixed" and "dynamic_doubling" RoPE types of transformers, so that configs which name them build and load.

transformers is not imported for it: where it is not there yet, its table is filled as soon as it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from fastllm.rope.lengthwise import DOUBLING, doubled
from fastllm.rope.scaling import scaling

TYPES = {"ntk": "ntk", "ntk_mixed": "ntk_mixed", DOUBLING: "dynamic"}
_MODULE = "transformers.modeling_rope_utils"


def fill(module: ModuleType) -> None:
    for kind in TYPES:
        module.ROPE_INIT_FUNCTIONS.setdefault(kind, _function(kind))
        name = f"_validate_{kind}_rope_parameters"
        if not hasattr(module.RotaryEmbeddingConfigMixin, name):
            setattr(module.RotaryEmbeddingConfigMixin, name, _validate)


def _function(kind: str) -> Callable[..., tuple[torch.Tensor, float]]:
    def parameters(
        config: Any, device: Any = None, seq_len: int | None = None, layer_type: str | None = None, **_: Any
    ) -> tuple[torch.Tensor, float]:
        config.standardize_rope_params()
        rope = config.rope_parameters[layer_type] if layer_type is not None else config.rope_parameters
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        own = {"exponent": rope["exponent"]} if "exponent" in rope else {}
        original = int(rope.get("original_max_position_embeddings", config.max_position_embeddings))
        found = scaling(
            TYPES[kind], head_dim=int(head * rope.get("partial_rotary_factor", 1.0)), base=rope["rope_theta"],
            original_length=original, factor=rope["factor"], length=doubled(int(seq_len or original), original), **own,
        )  # fmt: skip
        return found.inv_freq.to(device or torch.get_default_device()), found.attention_factor

    return parameters


def _validate(self: Any, rope_parameters: Any, ignore_keys: set[str] | None = None) -> None:
    self._check_received_keys(
        rope_parameters["rope_type"], set(rope_parameters), {"rope_type", "factor"},
        {"rope_theta", "original_max_position_embeddings", "exponent"}, ignore_keys=ignore_keys,
    )  # fmt: skip


class _WhenImported(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the module as everybody does, and fills its table when it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        if found is not None and found.loader is not None:
            self.loader, found.loader = found.loader, self
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = self.loader
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        fill(module)


def register() -> None:
    if _MODULE in sys.modules:
        fill(sys.modules[_MODULE])
    else:
        sys.meta_path.insert(0, _WhenImported())
