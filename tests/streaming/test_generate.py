"""StreamingCache in plain generate()."""

import pytest
import torch
from transformers import Cache

import fastllm
from fastllm.errors import ConfigError
from fastllm.streaming import StreamingCache
from tests.patching.models import llama, tokens
from tests.streaming import reference
from tests.streaming.test_cache import fed

SINKS, WINDOW = 3, 9


@pytest.fixture
def model():
    model = llama().eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None
    return model


def greedy(model, ids, new):
    reader = reference.Reader(model, SINKS, WINDOW)
    reader.read(ids)
    for _ in range(new):
        following = reader.logits[-1][:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, following), 1)
        reader.read(following)
    return ids


@pytest.mark.parametrize("length", [1, 5, 30])
@pytest.mark.parametrize("patched", [False, True])
def test_greedy(model, length, patched):
    ids = tokens(2, length)
    expected = greedy(model, ids, 15)
    if patched:
        fastllm.patch(model)
    cache = StreamingCache(model, SINKS, WINDOW)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=15, do_sample=False)
    assert found.tolist() == expected.tolist()
    assert cache.tokens_seen == length + 14  # the last one has not been read
    chunked = StreamingCache(model, SINKS, WINDOW)
    found = model.generate(ids, past_key_values=chunked, max_new_tokens=15, do_sample=False, prefill_chunk_size=4)
    assert found.tolist() == expected.tolist()


def test_the_same_call_again_goes_on_after_an_interruption(model):
    ids, calls = tokens(1, 60), []
    expected = greedy(model, ids, 8)
    cache = StreamingCache(model, SINKS, WINDOW)

    def third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(third)
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    handle.remove()
    assert 0 < cache.tokens_seen < 60
    found = model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    assert found.tolist() == expected.tolist()


def test_several_turns_on_one_cache(model):
    cache, ids = StreamingCache(model, SINKS, WINDOW), tokens(1, 7)
    expected = ids
    for turn in range(3):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
        expected = greedy(model, expected, 6)
        assert ids.tolist() == expected.tolist()
        said = tokens(1, 4) + turn
        ids, expected = torch.cat((ids, said), 1), torch.cat((expected, said), 1)


def test_rows_of_different_lengths(model):
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :13] = 0
    found = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=StreamingCache(model, SINKS, WINDOW),
        max_new_tokens=12,
        do_sample=False,
    )
    assert found[:1].tolist() == greedy(model, ids[:1], 12).tolist()
    assert found[1:, 13:].tolist() == greedy(model, ids[1:, 13:], 12).tolist()


def test_sampling_draws_from_the_reference(model):
    ids = tokens(1, 20)
    torch.manual_seed(3)
    found = model.generate(
        ids, past_key_values=StreamingCache(model, SINKS, WINDOW), max_new_tokens=10, do_sample=True, temperature=0.7,
        num_return_sequences=3, top_k=20, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    expected = reference.logits(model, found.sequences[:, :-1], SINKS, WINDOW)[:, 19:]
    torch.testing.assert_close(torch.stack(found.logits, 1), expected, rtol=0, atol=1e-4)
    assert len({tuple(row) for row in found.sequences.tolist()}) == 3


def test_beams_are_scored_as_the_reference_scores_them(model):
    ids = tokens(2, 20)
    found = model.generate(
        ids, past_key_values=StreamingCache(model, SINKS, WINDOW), max_new_tokens=8, do_sample=False, num_beams=4,
        num_return_sequences=2, return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
    )  # fmt: skip
    logprobs = reference.logits(model, found.sequences[:, :-1], SINKS, WINDOW)[:, 19:].log_softmax(-1)
    scores = logprobs.gather(-1, found.sequences[:, 20:, None]).squeeze(-1).sum(-1)
    torch.testing.assert_close(found.sequences_scores, scores, rtol=0, atol=1e-4)
    wide = model.generate(
        ids, past_key_values=StreamingCache(model, 4, 60), max_new_tokens=8, do_sample=False, num_beams=4
    )
    assert wide.tolist() == model.generate(ids, max_new_tokens=8, do_sample=False, num_beams=4).tolist()


@pytest.mark.skipif(
    not hasattr(Cache, "activate_past_recording"), reason="Transformers 5.0 crops, which is an error, after the prompt"
)
def test_assisted_decoding_is_refused_and_the_cache_left_usable(model):
    ids = tokens(1, 20)
    cache = StreamingCache(model, SINKS, WINDOW)
    for how in ({"assistant_model": llama().eval()}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ConfigError, match="assisted decoding"):
            model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, **how)
    expected = reference.logits(model, ids, SINKS, WINDOW)
    torch.testing.assert_close(fed(model, ids, cache, 20), expected, rtol=0, atol=1e-4)


def test_inference_mode_in_one_turn_and_not_in_the_next(model):
    ids, cache = tokens(1, 20), StreamingCache(model, SINKS, WINDOW)
    with torch.inference_mode():
        first = model(ids[:, :15], past_key_values=cache).logits
    second = fed(model, ids[:, 15:], cache, 2, 1)
    expected = reference.logits(model, ids, SINKS, WINDOW)
    torch.testing.assert_close(torch.cat((first, second), 1), expected, rtol=0, atol=1e-4)
