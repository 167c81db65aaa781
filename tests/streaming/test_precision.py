"""A long text loses nothing: neither by evictions nor by large positions."""

import pytest
import torch

from fastllm.streaming import StreamingCache
from tests.patching.models import llama, tokens
from tests.streaming import reference
from tests.streaming.test_cache import TIGHT, fed

FAR = 4_000_000


@pytest.mark.parametrize("pieces", [(1,), (60,)])
def test_at_position_four_million_it_is_the_reference(pieces):
    model, ids = llama().eval(), tokens(2, 60)
    cache = StreamingCache(model, 4, 12)
    cache.stream.origin = FAR
    torch.testing.assert_close(fed(model, ids, cache, *pieces), reference.logits(model, ids, 4, 12), **TIGHT)


def exact_sinks(model, ids, sinks, turn):
    """Keys of the first layer for the first tokens, as the model makes them in its dtype, rotated in fp64 as they would be
    `turn` places further on."""
    with torch.no_grad():
        layer = model.model.layers[0]
        hidden = layer.input_layernorm(model.model.embed_tokens(ids[:, :sinks]))
        keys = layer.self_attn.k_proj(hidden).view(1, sinks, -1, layer.self_attn.head_dim).transpose(1, 2).double()
    angles = torch.outer(torch.arange(sinks).double() + turn, model.model.rotary_emb.inv_freq.double())
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    first, second = keys.chunk(2, -1)
    return keys * cos + torch.cat((-second, first), -1) * sin


def off(found, exact):
    return ((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()


def test_after_a_hundred_thousand_evictions_in_bf16_sinks_are_within_half_a_percent():
    model, sinks, window = llama(torch.bfloat16, num_hidden_layers=1).eval(), 2, 1022
    ids = torch.randint(3, 97, (1, 101_200), generator=torch.Generator().manual_seed(1))
    cache = StreamingCache(model, sinks, window)
    fed(model, ids[:, :1026], cache, 1026)
    early = off(cache.layers[0].keys[:, :, :sinks], exact_sinks(model, ids, sinks, cache.evicted))
    fed(model, ids[:, 1026:-20], cache, 20_000)
    fed(model, ids[:, -20:], cache, 1)
    assert cache.evicted == 101_200 - 1024
    late = off(cache.layers[0].keys[:, :, :sinks], exact_sinks(model, ids, sinks, cache.evicted))
    assert late < 0.005
    assert late < 1.5 * early + 1e-3


def test_sinks_turned_one_by_one_do_not_drift():
    model, ids = llama(torch.bfloat16, num_hidden_layers=1).eval(), tokens(1, 800)
    cache = StreamingCache(model, 2, 8)
    worst = []
    for token in ids.split(1, 1):
        fed(model, token, cache, 1)
        if cache.evicted % 100 == 99:
            worst.append(off(cache.layers[0].keys[:, :, :2], exact_sinks(model, ids, 2, cache.evicted)))
    assert max(worst) < 0.005


def test_a_stream_of_two_hundred_thousand_tokens_ends_as_the_reference():
    # In a model of one layer keys and values are those of their tokens alone, so that the reference may skip what is evicted.
    model, sinks, window = llama(num_hidden_layers=1).eval(), 2, 1022
    ids = torch.randint(3, 97, (1, 200_000), generator=torch.Generator().manual_seed(2))
    cache = StreamingCache(model, sinks, window)
    fed(model, ids[:, :-30], cache, 20_000)
    size, read = cache.memory_bytes(), fed(model, ids[:, -30:], cache, 1)
    reader = reference.Reader(model, sinks, window)
    expected = reader.read(torch.cat((ids[:, :sinks], ids[:, -30 - window :]), 1))[:, -30:]
    torch.testing.assert_close(read, expected, **TIGHT)
    assert cache.memory_bytes() == size
    assert cache.tokens_seen == 200_000
