"""Keys and values in 8 bits: the error that is stated, and the cache around them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastllm
from fastllm.errors import ConfigError
from fastllm.streaming import StreamingCache, budget, verify_tree
from fastllm.streaming.eight import FORMATS
from tests.patching.models import llama, tokens
from tests.streaming import reference
from tests.streaming.test_cache import TIGHT, family, fed

# Of the logits of the small models here, over their largest: measured 0.005-0.007 in int8 and 0.027-0.048 in fp8.
OFF = {"int8": 0.015, "fp8": 0.06}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(seed=st.integers(0, 2**31), dim=st.integers(1, 130), scale=st.sampled_from([1e-6, 1.0, 1e3]))
def test_a_number_is_off_by_no_more_than_is_stated(dtype, seed, dim, scale):
    numbers = torch.randn(2, 3, dim, generator=torch.Generator().manual_seed(seed)).mul(scale).to(dtype)
    numbers[0, 0] = 0
    numbers[1, :, 0] *= 3
    most = numbers.float().abs().amax(-1, keepdim=True)
    rounding = numbers.float().abs() * torch.finfo(dtype).eps + torch.finfo(dtype).tiny
    for name, eight in FORMATS.items():
        off = (eight.rounded(numbers).float() - numbers.float()).abs()
        allowed = most / 254 if name == "int8" else numbers.float().abs() / 16 + most / 448 / 1024
        assert bool((off <= allowed * (1 + 1e-4) + rounding).all())
        assert torch.equal(eight.rounded(numbers)[0, 0], torch.zeros(dim, dtype=dtype))
        again = eight.rounded(numbers).float() - eight.rounded(eight.rounded(numbers)).float()
        assert bool((again.abs() <= rounding).all())  # to read and write it again changes nothing


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_become_plausible(name, bad):
    numbers = torch.tensor([[1.0, bad, 2.0], [1.0, 2.0, 3.0]])
    found = FORMATS[name].rounded(numbers)
    assert bool(found[0].isnan().all())
    assert bool(found[1].isfinite().all())


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("model_of", ["llama", "gemma3_text", "gpt_neox"])
def test_logits_are_off_by_no_more_than_is_stated(name, model_of, patched):
    model, ids = (llama().eval() if model_of == "llama" else family(model_of)), tokens(2, 48)
    expected = reference.logits(model, ids, 3, 9)
    if patched:
        fastllm.patch(model)
    found = [fed(model, ids, StreamingCache(model, 3, 9, kv_dtype=name), *pieces) for pieces in ((1,), (48,))]
    for logits in found:
        assert 0 < (logits - expected).abs().max() <= OFF[name] * expected.abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_it_does_not_grow(name):
    model, ids = llama(num_hidden_layers=1).eval(), tokens(1, 3000)
    cache = StreamingCache(model, 2, 30, kv_dtype=name)
    fed(model, ids[:, :2900], cache, 700)
    size, found = cache.memory_bytes(), fed(model, ids[:, 2900:], cache, 1)
    assert cache.memory_bytes() == size
    expected = reference.Reader(model, 2, 30).read(torch.cat((ids[:, :2], ids[:, 2870:]), 1))[:, -100:]
    assert (found - expected).abs().max() <= OFF[name] * expected.abs().max()


@pytest.mark.parametrize("name", FORMATS)
def test_it_takes_a_quarter_of_the_memory_and_is_told_so(name):
    model, ids = llama().eval(), tokens(2, 40)
    sizes = {}
    for kind in (None, name):
        cache = StreamingCache(model, 2, 500, kv_dtype=kind)
        fed(model, ids, cache, 40)
        sizes[kind] = cache.memory_bytes()
        assert sizes[kind] == sum(budget.bytes_of(r.rotation, r.reach, 2, cache.eight) for r in cache.rings)
    head = cache.rings[0].rotation.head_dim
    assert sizes[name] < sizes[None] * ((head + 4) / (4 * head) + 0.02)
    fits = StreamingCache.fit(model, memory="1MB", batch=2, kv_dtype=name)
    assert fits.window > 2 * StreamingCache.fit(model, memory="1MB", batch=2).window
    fed(model, ids, fits, 40)
    assert fits.memory_bytes() <= 1_000_000


def test_rows_are_selected_cropped_and_reset_with_their_scales():
    model, ids = llama().eval(), tokens(3, 40)
    cache = StreamingCache(model, 3, 30, kv_dtype="int8")
    whole = fed(model, ids, cache, 20, 1)
    cache.reset()
    fed(model, ids[:, :26], cache, 20, 1)
    cache.crop(-6)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(fed(model, ids[[2, 0, 1], 20:], cache, 1), whole[[2, 0, 1], 20:], **TIGHT)
    for layer in cache.rings:
        layer.offload()
        layer.prefetch()
    cache.batch_select_indices(torch.tensor([1]))
    more = tokens(1, 5)
    other = StreamingCache(model, 3, 30, kv_dtype="int8")
    fed(model, ids[:1], other, 20, 1)
    torch.testing.assert_close(fed(model, more, cache, 1), fed(model, more, other, 1), **TIGHT)


def test_trees_and_rows_padded_on_the_left():
    model, ids = llama().eval(), tokens(2, 40)
    choices, drafts = [(0,), (1,), (0, 0)], torch.tensor([5, 6, 7, 8])
    found = []
    for kind in (None, "int8"):
        cache = StreamingCache(model, 3, 20, kv_dtype=kind)
        fed(model, ids[:1], cache, 40)
        found.append(verify_tree(model, drafts, choices, cache).logits)
    assert 0 < (found[1] - found[0]).abs().max() <= OFF["int8"] * found[0].abs().max()
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :13] = 0
    expected = reference.logits(model, ids[:1, 13:], 3, 9)
    with torch.no_grad():
        cache = StreamingCache(model, 3, 9, kv_dtype="int8")
        padded = model(ids, attention_mask=mask, past_key_values=cache).logits[:1, 13:]
    assert (padded - expected).abs().max() <= OFF["int8"] * expected.abs().max()


def test_another_name_is_refused():
    model = llama().eval()
    for make in (StreamingCache, lambda m, **options: StreamingCache.fit(m, "1GiB", **options)):
        with pytest.raises(ConfigError, match="kv_dtype must be None"):
            make(model, kv_dtype="int4")
