"""Validation on a text without end: what the model makes of it through a StreamingCache, beside rows that begin anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastllm.errors import ConfigError
from fastllm.train import keys


@dataclass(frozen=True)
class Endless:
    """`tokens` of the validation rows, one row after the other, read through a cache of `sinks` + `window` tokens."""

    sinks: int = 4
    window: int = 1020
    tokens: int = 16384


def checked(values: dict[str, Any], stage: str) -> None:
    """That the key `streaming` of a configuration has a meaning.

    Raises:
        ConfigError: it has none.
    """
    if stage not in ("pretrain", "sft", "mixed"):
        raise ConfigError(f"streaming belongs to stages pretrain, sft and mixed, not to {stage}")
    known = [option.name for option in fields(Endless)]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"streaming has no {key!r}, it takes {', '.join(known)}{keys.did_you_mean(key, known)}")
        least = {"sinks": 0, "window": 1, "tokens": 2}[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"streaming.{key} must be a whole number, at least {least}, got {value!r}")


def perplexity(model: Any, rows: Iterable[Any], how: Endless) -> float:
    """Of the first tokens of `rows` (or of bins of rows) as one text; nan where they are fewer than two."""
    from fastllm import streaming

    ids = list(itertools.islice(_tokens(rows), how.tokens))
    if len(ids) < 2:
        return float("nan")
    text = torch.tensor([ids], device=next(model.parameters()).device)
    cache = streaming.StreamingCache(model, how.sinks, how.window)
    return streaming.perplexity(model, text, cache=cache)


def _tokens(rows: Iterable[Any]) -> Iterator[int]:
    for one in rows:
        for row in one if isinstance(one, list) else [one]:
            yield from map(int, row["input_ids"])
