"""torch.compile of a decoding step: compiled while the cache fills, then never again."""

import pytest
import torch
from torch._dynamo.utils import counters

import fastllm
from fastllm.streaming import StreamingCache
from tests.patching.models import llama, tokens
from tests.streaming import reference
from tests.streaming.test_cache import TIGHT, fed


@pytest.mark.parametrize(("patched", "kv_dtype"), [(False, None), (True, "int8")])
def test_a_compiled_step_is_not_compiled_again_for_every_token(patched, kv_dtype):
    torch._dynamo.reset()
    model, ids = llama(num_hidden_layers=1).eval(), tokens(2, 60)
    expected = reference.logits(model, ids, 4, 12)
    if patched:
        fastllm.patch(model)
    compiled, cache = torch.compile(model, backend="eager"), StreamingCache(model, 4, 12, kv_dtype=kv_dtype)
    plain = fed(model, ids, StreamingCache(model, 4, 12, kv_dtype=kv_dtype), 13, 1)
    fed(model, ids[:, :13], cache, 13)
    found = fed(compiled, ids[:, 13:20], cache, 1)  # the ring is full after 16
    compiles = dict(counters["frames"]), dict(counters["stats"])
    assert compiles[1]["unique_graphs"] > 0
    with torch.compiler.set_stance("fail_on_recompile"):
        found = torch.cat((found, fed(compiled, ids[:, 20:], cache, 1)), 1)
    assert (dict(counters["frames"]), dict(counters["stats"])) == compiles
    torch.testing.assert_close(found, plain[:, 13:], **TIGHT)
    if kv_dtype is None:
        torch.testing.assert_close(found, expected[:, 13:], **TIGHT)
    assert cache.evicted == 60 - 16


def test_prompts_and_generate_work_on_a_compiled_model():
    torch._dynamo.reset()
    model, ids = llama(num_hidden_layers=1).eval(), tokens(1, 40)
    expected = model.generate(ids, past_key_values=StreamingCache(model, 4, 12), max_new_tokens=12, do_sample=False)
    model.forward = torch.compile(model.forward, backend="eager")
    found = model.generate(ids, past_key_values=StreamingCache(model, 4, 12), max_new_tokens=12, do_sample=False)
    assert torch.equal(found, expected)
