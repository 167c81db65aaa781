"""Negative log-likelihood of texts longer than a model's context, through a cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.errors import ConfigError
from fastllm.ops import token_logprobs


@torch.no_grad()
def token_nll(model: nn.Module, tokens: Tensor, *, cache: Any = None, chunk: int = 1024) -> Tensor:
    """-log p(tokens[:, i + 1] | what the cache still holds of tokens[:, : i + 1]), in nats.

    Args:
        model: a causal LM of Transformers, in the mode it shall be measured in (``model.eval()``).
        tokens: (B, L) ids, L >= 2, no padding.
        cache: an empty cache of Transformers, such as ``StreamingCache(model)``; None: a ``DynamicCache``, which keeps all.
        chunk: tokens per forward pass; no more logits than of so many exist at once.

    Returns:
        (B, L - 1) fp32.

    Raises:
        ConfigError: tokens of another shape, a cache that is not empty, a chunk below 1.
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ConfigError(f"tokens must be ids of shape (B, L) with L >= 2, got {shape}")
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ConfigError(f"chunk must be a number of tokens, at least 1, got {chunk!r}")
    if cache is None:
        from transformers import DynamicCache

        config: Any = model.config
        cache = DynamicCache(config=config)
    if cache.get_seq_length():
        raise ConfigError(f"the cache holds {cache.get_seq_length()} tokens already: reset() it")
    found = []
    for start in range(0, tokens.shape[1] - 1, chunk):
        ids = tokens[:, start : min(start + chunk, tokens.shape[1] - 1)]
        logits = model(ids, past_key_values=cache, use_cache=True).logits
        found.append(-token_logprobs(logits, tokens[:, start + 1 : start + 1 + ids.shape[1]].to(logits.device)))
    return torch.cat(found, 1)


def perplexity(model: nn.Module, tokens: Tensor, *, cache: Any = None, chunk: int = 1024) -> float:
    """exp of the mean of ``token_nll``, whose arguments these are."""
    return math.exp(token_nll(model, tokens, cache=cache, chunk=chunk).double().mean().item())
