"""A StreamingCache beside others, in threads, after failures and in models that change."""

import gc
import sys
import threading
import weakref

import pytest
import torch

import fastllm
from fastllm.errors import ConfigError
from fastllm.streaming import StreamingCache
from tests.patching.models import llama, tokens


@torch.no_grad()
def fed(model, ids, cache, length):
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(length, 1)], 1)


def test_a_cache_whose_forward_failed_is_not_kept():
    model = llama().eval()
    cache = StreamingCache(model, 2, 6)
    fed(model, tokens(1, 12), cache, 12)
    handle = model.get_input_embeddings().register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fed(model, tokens(1, 1), cache, 1)
    handle.remove()
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_threads_with_caches_of_their_own_on_one_model():
    model, before = llama().eval(), sys.getswitchinterval()
    texts = [tokens(1, 60), tokens(1, 60).flip(1)]
    expected = [fed(model, ids, StreamingCache(model, 2, 6), 1) for ids in texts]
    found = [None, None]

    def read(n):
        found[n] = fed(model, texts[n], StreamingCache(model, 2, 6), 1)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(2)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    for logits, wanted in zip(found, expected):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-5)


def test_tokens_whose_keys_the_model_kept_to_itself_are_not_counted():
    model, ids = llama().eval(), tokens(1, 30)
    expected = fed(model, ids, StreamingCache(model, 2, 40), 30)
    cache = StreamingCache(model, 2, 40)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ConfigError, match="gradient checkpointing"):
        model(ids, past_key_values=cache)
    model.eval()
    assert cache.tokens_seen == 0
    torch.testing.assert_close(fed(model, ids, cache, 30), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_under_autocast_values_have_a_dtype_of_their_own(kv_dtype):
    model, ids = llama().eval(), tokens(1, 30)
    with torch.autocast("cpu", torch.bfloat16):
        whole = fed(model, ids, StreamingCache(model, 2, 40, kv_dtype=kv_dtype), 30)
        single = fed(model, ids, StreamingCache(model, 2, 40, kv_dtype=kv_dtype), 1)
        dense = model(ids).logits
    for logits in (whole, single):
        torch.testing.assert_close(logits.float(), dense.float(), rtol=0, atol=0.02 * float(dense.abs().max()) + 0.02)


def test_all_keys_have_the_frequencies_that_the_cache_was_made_with():
    model, ids = llama().eval(), tokens(1, 40)
    fastllm.patch(model)
    far = StreamingCache(model, 3, 9)
    rotary = next(m for m in model.modules() if hasattr(m, "rotary_emb")).rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16()  # as model.to(torch.bfloat16) does
    far.stream.origin = 50_000
    found = fed(model, ids, far, 1)
    plain = llama().eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(found, fed(plain, ids, StreamingCache(plain, 3, 9), 1), rtol=0, atol=1e-4)


def test_offloading_without_an_accelerator_is_refused():
    with pytest.raises(ConfigError, match="this model is on the CPU"):
        StreamingCache(llama(), 2, 6, offloading=True)


def test_a_row_that_is_not_there_leaves_the_cache_as_it_was():
    model, ids = llama().eval(), tokens(2, 20)
    cache = StreamingCache(model, 2, 6)
    fed(model, ids, cache, 20)
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([-1]))
    assert cache.batch_size == 2
    fed(model, ids, cache, 1)
