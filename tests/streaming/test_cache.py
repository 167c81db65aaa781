"""StreamingCache against the plain reference, in fp32, token by token and in one call."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, DynamicCache

import fastllm
from fastllm.errors import ConfigError
from fastllm.streaming import StreamingCache
from fastllm.streaming.step import Piece
from tests.patching.models import llama, of, tokens
from tests.streaming import reference

TIGHT = {"rtol": 0.0, "atol": 1e-4}
SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "mistral": {"sliding_window": 16},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt_neox": {"rotary_pct": 0.25},
    "cohere": {},
    "phi3": {},
    "glm": {},
    "smollm3": {},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
MIXED = ("gemma2", "gemma3_text", "gpt_oss")


def family(name):
    model = of(AutoConfig.for_model(name, **{**SMALL, **FAMILIES[name]})).eval()
    if name in MIXED and not hasattr(DynamicCache, "get_query_offset"):  # Transformers 5.0
        with pytest.raises(ConfigError, match="two kinds of layers"):
            StreamingCache(model, 3, 9)
        pytest.skip("this transformers makes no masks for two kinds of layers in one cache")
    return model


@torch.no_grad()
def fed(model, ids, cache, *pieces, **options):
    """Logits of ids fed in pieces of these lengths, the last again and again."""
    out, at, pieces = [], 0, list(pieces)
    while at < ids.shape[1]:
        length = pieces.pop(0) if len(pieces) > 1 else pieces[0]
        out.append(model(ids[:, at : at + length], past_key_values=cache, use_cache=True, **options).logits)
        at += length
    return torch.cat(out, 1)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 5), (1, 1), (3, 40)])
def test_it_is_the_reference_token_by_token_and_in_pieces_of_any_length(sinks, window, patched):
    model, ids = llama().eval(), tokens(2, 60)
    expected = reference.logits(model, ids, sinks, window)
    if patched:
        fastllm.patch(model)
    cache = fastllm.StreamingCache(model, sinks=sinks, window=window)
    for pieces in ((1,), (60,), (7,), (18, 1), (3, 30, 1)):
        cache.reset()
        torch.testing.assert_close(fed(model, ids, cache, *pieces), expected, **TIGHT)
        assert cache.tokens_seen == cache.get_seq_length() == 60
        assert cache.evicted == max(0, 60 - sinks - window)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_the_reference(name):
    model, ids = family(name), tokens(2, 32)
    expected = reference.logits(model, ids, 3, 9)
    cache = StreamingCache(model, 3, 9)
    torch.testing.assert_close(fed(model, ids, cache, 1), expected, **TIGHT)
    cache.reset()
    torch.testing.assert_close(fed(model, ids, cache, 15, 17), expected, **TIGHT)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_mixed_model_patched(implementation):
    model, ids = family("gemma3_text"), tokens(2, 32)
    model.set_attn_implementation(implementation)
    expected = reference.logits(model, ids, 3, 9)
    fastllm.patch(model)
    for pieces in ((1,), (32,)):
        torch.testing.assert_close(fed(model, ids, StreamingCache(model, 3, 9), *pieces), expected, **TIGHT)


METHODS = {
    "linear": {}, "ntk": {}, "ntk_mixed": {}, "dynamic": {}, "yarn": {}, "llama3": {}, "abf": {},
    "longrope": {"short_factor": [1.0] * 8, "long_factor": [1.0 + n for n in range(8)]},
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_every_scaling_method(method):
    model, ids = llama(max_position_embeddings=32).eval(), tokens(2, 40)
    fastllm.extend_context(model, 64, method, **METHODS[method])
    expected = reference.logits(model, ids, 4, 12)
    cache = StreamingCache(model, 4, 12)
    torch.testing.assert_close(fed(model, ids, cache, 1), expected, **TIGHT)
    cache.reset()
    torch.testing.assert_close(fed(model, ids, cache, 40), expected, **TIGHT)
    fastllm.extend_context(model, 80, "ntk")
    with pytest.raises(ConfigError, match="reset"):
        fed(model, ids, cache, 1)
    cache.reset()
    torch.testing.assert_close(fed(model, ids, cache, 40), reference.logits(model, ids, 4, 12), **TIGHT)


def test_frequencies_that_follow_the_text_are_those_of_a_full_cache():
    model, ids = llama(max_position_embeddings=32).eval(), tokens(2, 30)
    for kind in ("dynamic", "longrope"):
        fastllm.extend_context(model, 256, kind, **METHODS[kind])
        with torch.no_grad():
            long = torch.cat((tokens(2, 110), ids), 1)[:, :90]
            expected = model(long, use_cache=False).logits
        cache = StreamingCache(model, 4, 90)
        torch.testing.assert_close(fed(model, long, cache, 40, 1)[:, -1:], expected[:, -1:], **TIGHT)
        assert len(cache.layers) == 2


def test_a_window_wider_than_the_text_is_the_full_cache():
    model, ids = llama().eval(), tokens(3, 50)
    with torch.no_grad():
        expected = model(ids).logits
    for sinks in (0, 4):
        torch.testing.assert_close(fed(model, ids, StreamingCache(model, sinks, 50), 9), expected, rtol=0, atol=1e-5)


def test_rows_padded_on_the_left_have_sinks_of_their_own():
    model, ids = llama().eval(), tokens(3, 50)
    lengths, mask = (50, 37, 2), torch.ones(3, 50, dtype=torch.long)
    for row, length in enumerate(lengths):
        mask[row, : 50 - length] = 0
    expected = [reference.logits(model, ids[n : n + 1, 50 - length :], 3, 8) for n, length in enumerate(lengths)]
    for patched in (False, True):
        if patched:
            fastllm.patch(model)
        for pieces in ((50,), (20, 1), (49, 1), (9,)):
            cache, out, at = StreamingCache(model, 3, 8), [], 0
            for length in pieces + (pieces[-1],) * 50:
                end = min(50, at + length)
                if at < end:
                    with torch.no_grad():
                        out.append(model(ids[:, at:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
                at = end
            out = torch.cat(out, 1)
            for row, length in enumerate(lengths):
                torch.testing.assert_close(out[row : row + 1, 50 - length :], expected[row], **TIGHT)
            assert cache.get_seq_length() == 50
            assert cache.tokens_seen == 50
            assert not out.isnan().any()


def test_crop_reorder_select_and_repeat():
    model, ids = llama().eval(), tokens(3, 30)
    expected = reference.logits(model, ids, 3, 20)
    cache = StreamingCache(model, 3, 20)
    fed(model, ids[:, :20], cache, 20)
    cache.crop(-7)
    assert cache.tokens_seen == 13
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(fed(model, ids[[2, 0, 1], 13:], cache, 5, 1), expected[[2, 0, 1], 13:], **TIGHT)
    with pytest.raises(ConfigError, match="7 have been evicted"):
        cache.crop(-1)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 2
    more = torch.cat((ids[0:1], tokens(1, 9)), 1)
    torch.testing.assert_close(
        fed(model, more[:, 30:].expand(2, -1), cache, 1),
        reference.logits(model, more, 3, 20)[:, 30:].expand(2, -1, -1), **TIGHT,
    )  # fmt: skip
    cache.reset()
    assert cache.tokens_seen == cache.evicted == cache.get_seq_length() == 0
    torch.testing.assert_close(fed(model, ids, cache, 30), expected, **TIGHT)
    for layer in cache.layers:  # what Cache.offload does, without a GPU
        layer.offload()
        layer.prefetch()
    fork = copy.deepcopy(cache)
    more = tokens(3, 4)
    torch.testing.assert_close(fed(model, more, fork, 1), fed(model, more, cache, 4), **TIGHT)


def test_what_is_wrong_is_said_and_leaves_the_cache_usable():
    model, other, ids = llama().eval(), llama().eval(), tokens(2, 40)
    for arguments, said in (((-1, 5), "sinks"), ((4, 0), "window"), ((True, 5), "sinks"), ((4, 2.0), "window")):
        with pytest.raises(ConfigError, match=said):
            StreamingCache(model, *arguments)
    expected = reference.logits(model, ids, 4, 12)
    cache = StreamingCache(model, 4, 12)
    fed(model, ids[:, :30], cache, 30)
    with pytest.raises(ConfigError, match="another model"):
        fed(other, ids[:, 30:], cache, 1)
    StreamingCache(other, 4, 12)
    with pytest.raises(ConfigError, match="another LlamaModel"):
        fed(other, ids[:, 30:], cache, 1)
    with pytest.raises(ConfigError, match="holds 2 rows and was given 1"):
        fed(model, ids[:1, 30:], cache, 1)
    with pytest.raises(ConfigError, match="attention_mask must be"):
        fed(model, ids[:, 30:], cache, 1, attention_mask=torch.ones(2, 1, 1, 31, dtype=torch.bool))
    with pytest.raises(ConfigError, match="cannot remove 31"):
        cache.crop(-31)
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    torch.testing.assert_close(fed(model, ids[:, 30:], cache, 1), expected[:, 30:], **TIGHT)


@pytest.mark.parametrize(
    ("name", "said"),
    [("gpt2", "learned positions"), ("bloom", "ALiBi"), ("mamba", "past_key_values"), ("t5", "encoder-decoder")],
)
def test_models_without_rope_are_refused_with_the_reason(name, said):
    small = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 97, "num_attention_heads": 2}
    config = AutoConfig.for_model(name, **small)
    if name == "t5":
        from transformers import AutoModelForSeq2SeqLM

        model = AutoModelForSeq2SeqLM.from_config(config)
    else:
        model = of(config)
    with pytest.raises(ConfigError, match=said):
        StreamingCache(model)


def test_a_model_is_asked_without_a_call_of_its_train():
    model = llama()
    model.train = model.model.train = lambda *_: 1 / 0  # PEFT merges its weights there, others move theirs
    StreamingCache(model, 4, 12)
    assert all(module.training for module in model.modules())


def test_the_model_stays_what_it_was():
    model, ids = llama().eval(), tokens(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        cache = StreamingCache(model, 2, 5)
        fed(model, ids, cache, 1)
        assert torch.equal(model(ids).logits, before)
    clone = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(clone(ids).logits, before)
    torch.testing.assert_close(
        fed(clone, ids, StreamingCache(clone, 2, 5), 1), fed(model, ids, StreamingCache(model, 2, 5), 20), **TIGHT
    )


def test_attention_that_takes_no_masks_reads_what_is_over_token_by_token(monkeypatch):
    model, ids = llama().eval(), tokens(2, 40)
    expected = reference.logits(model, ids, 4, 12)
    monkeypatch.setattr("fastllm.streaming.cache._TAKE_MASKS", ())  # as flash attention does not
    torch.testing.assert_close(fed(model, ids, StreamingCache(model, 4, 12), 25, 15), expected, **TIGHT)
    cache, mask = StreamingCache(model, 4, 12), torch.ones(2, 40, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(ConfigError, match="takes no mask"):
        fed(model, ids, cache, 40, attention_mask=mask)


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("seen", [0, 2, 14, 30])  # sinks to come, then some; the ring not full; evictions
@pytest.mark.parametrize("length", [1, 5, 40])
def test_a_forward_that_was_interrupted_leaves_the_cache_as_it_was_before_it(seen, length, patched):
    model, ids, other = llama().eval(), tokens(2, 60), tokens(2, 60) + 1
    expected = reference.logits(model, ids, 4, 12)
    if patched:
        fastllm.patch(model)
    cache = StreamingCache(model, 4, 12)
    if seen:
        fed(model, ids[:, :seen], cache, seen)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fed(model, other[:, :length], cache, length)
    handle.remove()
    assert cache.tokens_seen == cache.get_seq_length() == seen
    for piece in (1, 7, 60):
        after = copy.deepcopy(cache)
        torch.testing.assert_close(fed(model, ids[:, seen:], after, piece), expected[:, seen:], **TIGHT)


def test_a_prompt_that_was_interrupted_goes_on_after_its_last_whole_piece():
    model, ids, calls = llama().eval(), tokens(2, 80), []
    expected = reference.logits(model, ids, 4, 12)
    cache = StreamingCache(model, 4, 12)

    def third(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_pre_hook(third)
    with pytest.raises(KeyboardInterrupt):
        fed(model, ids, cache, 80)
    handle.remove()
    seen = cache.tokens_seen
    assert 16 < seen < 80
    torch.testing.assert_close(fed(model, ids[:, seen:], cache, 80), expected[:, seen:], **TIGHT)
    assert cache.tokens_seen == 80


def test_what_was_interrupted_while_it_was_written_is_finished(monkeypatch):
    model, ids = llama().eval(), tokens(2, 60)
    expected = reference.logits(model, ids, 4, 12)
    cache, commits, commit = StreamingCache(model, 4, 12), [], Piece.commit

    def second(self, layer):
        commits.append(layer)
        if len(commits) == 2:
            raise KeyboardInterrupt
        commit(self, layer)

    fed(model, ids[:, :20], cache, 20)
    monkeypatch.setattr(Piece, "commit", second)
    with pytest.raises(KeyboardInterrupt):
        fed(model, ids[:, 20:30], cache, 10)
    torch.testing.assert_close(fed(model, ids[:, 30:], cache, 7), expected[:, 30:], **TIGHT)
    assert cache.tokens_seen == 60


def test_a_model_in_another_dtype_begins_anew():
    model, ids = llama().eval(), tokens(1, 30)
    cache = StreamingCache(model, 4, 12)
    fed(model, ids, cache, 30)
    model.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"holds keys in torch.float32 and was given torch.bfloat16"):
        fed(model, ids, cache, 30)
    cache.reset()
    whole = fed(model, ids, cache, 30)
    cache.reset()
    torch.testing.assert_close(fed(model, ids, cache, 1), whole, rtol=0, atol=0.05)
    assert cache.layers[0].keys.dtype == torch.bfloat16
