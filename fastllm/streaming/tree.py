"""Tree attention, as Medusa decodes (arXiv 2401.10774, 3.1): all candidate continuations in one forward pass on a cache."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.errors import ConfigError


def tree_mask(choices: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Who sees whom in a tree of candidates.

    Args:
        choices: one path per node below the root: ``(0,)`` is the first child of the root, ``(0, 1)`` the second child of
            that. Any order; every path's parent must be among them.

    Returns:
        mask (N + 1, N + 1) bool: row i sees column j where j is i or an ancestor of it; node 0 is the root and node n + 1 is
        ``choices[n]``. positions (N + 1,) int64: depths, 0 of the root.

    Raises:
        ConfigError: a path that is empty, occurs twice, has a negative step or no parent.
    """
    paths: list[tuple[int, ...]] = [()]
    for choice in choices:
        whole = isinstance(choice, Sequence) and all(isinstance(s, Integral) and s >= 0 for s in choice)
        if not whole or not choice:
            raise ConfigError(f"a path of choices must be a tuple of whole numbers of 0 or more, got {choice!r}")
        path = tuple(int(step) for step in choice)
        paths.append(path)
    number = {path: n for n, path in enumerate(paths)}
    if len(number) < len(paths):
        twice = next(path for n, path in enumerate(paths) if number[path] != n)
        raise ConfigError(f"the path {twice} occurs twice in choices")
    mask = torch.zeros(len(paths), len(paths), dtype=torch.bool)
    for n, path in enumerate(paths):
        for length in range(len(path) + 1):
            if path[:length] not in number:
                raise ConfigError(f"the path {path} of choices has no parent {path[:length]}")
            mask[n, number[path[:length]]] = True
    return mask, torch.tensor([len(path) for path in paths])


@dataclass(frozen=True)
class Verified:
    """What ``verify_tree`` accepted.

    path: nodes of the tree, the root, 0, first. tokens: those of the accepted candidates, (accepted,). next_token: what the
    model says after the last of them; the root of the next tree. logits: of every node, (N + 1, V).
    """

    path: list[int]
    tokens: Tensor
    next_token: int
    logits: Tensor


@torch.no_grad()
def verify_tree(model: nn.Module, tokens: Tensor, choices: Sequence[Sequence[int]], cache: Any) -> Verified:
    """Runs a tree of candidates through the model at once and keeps the longest path that greedy decoding would have taken.

    A candidate is accepted where its parent is and it is the parent's most likely next token. The cache then holds what it held,
    the root and the accepted candidates, as if these had been decoded one by one.

    Args:
        model: a causal LM of Transformers.
        tokens: (N + 1,) ids: the root, which is the last token decoded and not yet in the cache, then one per choice.
        choices: as for ``tree_mask``.
        cache: a ``StreamingCache``, or a ``DynamicCache`` whose layers keep every token; one row.

    Raises:
        ConfigError: tokens that do not match the choices, another cache, a batch. The cache is then as it was.
    """
    from transformers.cache_utils import DynamicLayer

    from fastllm.streaming.cache import StreamingCache

    mask, depths = tree_mask(choices)
    if not isinstance(tokens, Tensor) or tokens.shape != (len(depths),) or tokens.is_floating_point():
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ConfigError(
            f"tokens must be {len(depths)} ids, one for the root and one for each of {len(depths) - 1} choices, got {shape}"
        )
    if isinstance(cache, StreamingCache):
        with cache.trying(mask, depths):
            logits = model(tokens.unsqueeze(0), past_key_values=cache, use_cache=True).logits[0]
        path = _accepted(tokens, logits, mask, depths)
        cache.accept(path)
    else:
        layers = getattr(cache, "layers", [])
        if any(type(layer) is not DynamicLayer for layer in layers) or not hasattr(cache, "layers"):
            raise ConfigError(
                f"verify_tree needs a StreamingCache, or a DynamicCache whose layers keep every token, got {cache!r}"
            )
        past = cache.get_seq_length()
        logits = _dense(model, tokens, mask, depths, cache, past)
        path = _accepted(tokens, logits, mask, depths)
        for layer in cache.layers:
            kept = torch.tensor([*range(past), *(past + node for node in path)], device=layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(2, kept), layer.values.index_select(2, kept)
    return Verified(path, tokens[path[1:]], int(logits[path[-1]].argmax()), logits)


def _dense(model: nn.Module, tokens: Tensor, mask: Tensor, depths: Tensor, cache: Any, past: int) -> Tensor:
    from fastllm.streaming.cache import as_given

    whole = torch.cat((mask.new_ones(len(depths), past), mask), 1).to(tokens.device)[None, None]
    places = (past + depths).to(tokens.device).unsqueeze(0)
    given = as_given(model, whole)
    return model(
        tokens.unsqueeze(0), attention_mask=given, position_ids=places, past_key_values=cache, use_cache=True
    ).logits[0]


def _accepted(tokens: Tensor, logits: Tensor, mask: Tensor, depths: Tensor) -> list[int]:
    """Nodes of the longest path along which every token is the most likely one after its parent; of several, the first."""
    likely, ids = logits.argmax(-1).tolist(), tokens.tolist()
    ancestors, depth = mask.tolist(), depths.tolist()
    best = [0]
    for node in range(1, len(ids)):
        path = sorted((n for n in range(len(ids)) if ancestors[node][n]), key=depth.__getitem__)
        right = all(ids[child] == likely[parent] for parent, child in itertools.pairwise(path))
        if right and len(path) > len(best):
            best = path
    return best
