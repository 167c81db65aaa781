"""Perplexity of long texts, and windows that fit."""

import math

import pytest
import torch

from fastllm.errors import ConfigError
from fastllm.streaming import StreamingCache, budget, perplexity, token_nll
from tests.patching.models import llama, tokens
from tests.streaming import reference
from tests.streaming.test_cache import family, fed


def nll(logits, ids):
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_perplexity_through_a_cache_and_through_all(chunk):
    model, ids = llama().eval(), tokens(2, 50)
    streamed = nll(reference.logits(model, ids, 3, 9), ids)
    found = token_nll(model, ids, cache=StreamingCache(model, 3, 9), chunk=chunk)
    torch.testing.assert_close(found, streamed, rtol=0, atol=1e-4)
    value = perplexity(model, ids, cache=StreamingCache(model, 3, 9), chunk=chunk)
    assert math.isclose(value, streamed.mean().exp().item(), rel_tol=1e-4)
    with torch.no_grad():
        dense = nll(model(ids).logits, ids)
    torch.testing.assert_close(token_nll(model, ids, chunk=chunk), dense, rtol=0, atol=1e-4)


def test_what_is_wrong_is_said():
    model, ids = llama().eval(), tokens(2, 50)
    cache = StreamingCache(model, 3, 9)
    fed(model, ids, cache, 50)
    for arguments, said in (
        ((ids[0],), "shape"), ((ids[:, :1],), "shape"), ((ids.float(),), "shape"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            token_nll(model, *arguments)
    with pytest.raises(ConfigError, match="holds 50 tokens"):
        token_nll(model, ids, cache=cache)
    with pytest.raises(ConfigError, match="chunk"):
        token_nll(model, ids, chunk=0)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize(("memory", "batch"), [("300KiB", 1), ("1 MB", 3), (2_000_000, 8)])
def test_fit_takes_the_memory_it_is_given_and_no_more(name, memory, batch):
    model = llama().eval() if name == "llama" else family(name)
    cache = StreamingCache.fit(model, memory=memory, batch=batch)
    fed(model, tokens(batch, 3), cache, 3)
    assert cache.memory_bytes() <= budget.parsed(memory)
    wider = StreamingCache(model, cache.sinks, cache.window + 1)
    fed(model, tokens(batch, 3), wider, 3)
    assert wider.memory_bytes() > budget.parsed(memory)
    before = cache.memory_bytes()
    fed(model, tokens(batch, 3000 // batch), cache, 500)
    assert cache.memory_bytes() == before


def test_fit_within_the_reach_of_layers_that_all_slide():
    assert StreamingCache.fit(family("mistral"), memory="1GiB").window == 16 - 4


def test_what_does_not_fit_is_refused_with_the_sizes_before_anything_is_allocated():
    model = llama().eval()
    for memory, said in (
        ("1KiB", "1 KiB do not hold"),
        ("2 parsecs", "size like"),
        (0, "size like"),
        ("", "size like"),
    ):
        with pytest.raises(ConfigError, match=said):
            StreamingCache.fit(model, memory=memory)
    with pytest.raises(ConfigError, match="batch"):
        StreamingCache.fit(model, memory="1GiB", batch=0)
    cache = StreamingCache(model, 4, 10**11)
    with pytest.raises(ConfigError, match=r"takes .* GiB, and .* are free on cpu"):
        fed(model, tokens(1, 3), cache, 3)
    assert cache.memory_bytes() == cache.tokens_seen == 0
