import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    StaticCache,
    masking_utils,
)

import fastllm
from fastllm import ops
from fastllm.patching.attention import View, whole_mask
from tests.patching.models import LLAMA, llama, of, tokens

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_local_experts": 2, "num_experts_per_tok": 2}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES, sliding_window=5),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=5, **LAYERS),
    "mixtral": MixtralConfig(**{**SIZES, **MOE}),
    "gpt_oss": GptOssConfig(**{**SIZES, **MOE}, sliding_window=5, **LAYERS),
}
LEFT = torch.ones(3, 20, dtype=torch.long)
LEFT[0, :4] = 0
RIGHT = torch.ones(3, 20, dtype=torch.long)
RIGHT[1, -3:] = 0
PACKED = torch.tensor([[*range(3), *range(11), 0, *range(5)]]).expand(3, -1)
INPUTS = {
    "plain": {},
    "left padding": {"attention_mask": LEFT},
    "right padding": {"attention_mask": RIGHT},
    "packed": {"position_ids": PACKED, "use_cache": False},
}


def pair(name):
    """A model whose attention is ours, and the eager one."""
    eager = of(CONFIGS[name]).eval()
    model = copy.deepcopy(eager)
    if name not in ("gemma2", "gpt_oss"):
        model.set_attn_implementation("sdpa")
    report = fastllm.patch(model, "attention")
    assert report.counts == {"attention": 2}, str(report)
    return model, eager


def run(model, inputs):
    ids = tokens(3, 20)
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    model.zero_grad()
    logits = model(ids, **inputs).logits[real]
    logits.square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_eager_attention_under_every_mask(name):
    model, eager = pair(name)
    for what, inputs in INPUTS.items():
        found, expected = run(model, inputs), run(eager, inputs)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5, msg=lambda m: f"{what}: {m}")  # noqa: B023
        scale = max(g.abs().max() for g in expected[1].values())
        for parameter, gradient in expected[1].items():
            assert (found[1][parameter] - gradient).abs().max() <= 1e-4 * scale, f"{what}: {parameter}"


@pytest.mark.parametrize("name", CONFIGS)
def test_generates_what_eager_attention_does(name):
    model, eager = pair(name)
    ids = tokens(3, 20)
    options = {"max_new_tokens": 8, "disable_compile": True, "pad_token_id": 0}
    ways = [
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ]
    for way in [*ways, {"num_beams": 3, "do_sample": False}, {"do_sample": True}]:
        for mask in (LEFT, torch.ones_like(LEFT)):
            found = []
            for one in (model, eager):
                torch.manual_seed(0)
                found.append(one.generate(ids, attention_mask=mask, **options, **way))
            assert torch.equal(*found), f"{way}, padded: {not mask.all()}"
    alone = model.generate(ids[:1, 4:], attention_mask=LEFT[:1, 4:], do_sample=False, **options)
    batched = model.generate(ids, attention_mask=LEFT, do_sample=False, **options)[:1, 4:]
    length = min(alone.shape[1], batched.shape[1])
    assert torch.equal(alone[:, :length], batched[:, :length])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_prompt_in_pieces_and_a_static_cache_agree_with_the_whole(name):
    model, _ = pair(name)
    ids = tokens(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        for cache in (None, StaticCache(config=model.config, max_cache_len=32)):
            first = model(ids[:, :13], past_key_values=cache, use_cache=True)
            rest = model(ids[:, 13:], past_key_values=first.past_key_values, use_cache=True)
            torch.testing.assert_close(torch.cat((first.logits, rest.logits), 1), expected, rtol=1e-4, atol=1e-5)


def test_masks_are_as_small_as_what_they_say(monkeypatch):
    seen = []
    own = ops.attention

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(ops, "attention", spy)
    model, _ = pair("mistral")
    seen.clear()
    for inputs in INPUTS.values():
        model(tokens(3, 20), **inputs)
    plain, left, right, packed = seen[::2]
    assert plain["mask"] is None
    assert plain["window"] == left["window"] == right["window"] == 5
    assert left["mask"].shape == (3, 1, 1, 20)
    if hasattr(masking_utils, "packed_sequence_compatibility_function"):  # else packed rows get a whole mask
        assert packed["window"] == 5
        assert packed["cu_seqlens_q"].tolist() == [b + 20 * row for row in range(3) for b in (0, 3, 14, 15)] + [60]


def test_only_this_model_is_switched():
    config = LlamaConfig(**LLAMA)
    one, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    said = config.to_dict()
    fastllm.patch(one)
    assert config._attn_implementation == other.model.layers[0].self_attn.config._attn_implementation == "sdpa"
    assert one.config is config
    assert config.to_dict() == said
    assert isinstance(one.model.layers[0].self_attn.config, View)
    one.config.use_cache = False
    assert one.model.config.use_cache is False
    fastllm.unpatch(one)
    assert one.model.config is one.model.layers[0].self_attn.config is config


def test_what_the_kernel_has_not_is_left_to_the_model(monkeypatch):
    model = llama(attention_dropout=0.5)
    torch.manual_seed(1)
    expected = model(tokens()).logits
    fastllm.patch(model, "attention")
    torch.manual_seed(1)
    assert torch.equal(model(tokens()).logits, expected)  # dropout, by the same random numbers
    torch.testing.assert_close(model.eval()(tokens()).logits, llama().eval()(tokens()).logits)

    model = llama(attn_implementation="eager").eval()
    fastllm.patch(model, "attention")
    weights = model(tokens(), output_attentions=True).attentions
    assert [w.shape for w in weights] == [(2, 4, 16, 16)] * 2

    bias = torch.zeros(2, 1, 16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), torch.finfo(torch.float32).min)
    bias[..., 3] -= 1.5
    expected = llama(attn_implementation="eager").eval()(tokens(), attention_mask=bias).logits
    torch.testing.assert_close(model(tokens(), attention_mask=bias).logits, expected)


def test_an_encoder():
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96)
    ).eval()
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, 12:] = 0
    expected = [model(tokens(), attention_mask=m).last_hidden_state for m in (None, mask)]
    assert fastllm.patch(model, "attention").counts == {"attention": 2}
    torch.testing.assert_close(model(tokens()).last_hidden_state, expected[0], rtol=1e-4, atol=1e-5)
    found = model(tokens(), attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[1][mask.bool()], rtol=1e-4, atol=1e-5)


def test_compiles_whole():
    model, eager = pair("llama")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for inputs in ({}, {"attention_mask": LEFT}):
        real = inputs.get("attention_mask", torch.ones(3, 20)).bool()
        found, expected = compiled(tokens(3, 20), use_cache=False, **inputs), eager(tokens(3, 20), **inputs)
        torch.testing.assert_close(found.logits[real], expected.logits[real], rtol=1e-4, atol=1e-5)


def test_every_form_of_a_mask_says_what_it_should():
    q, k = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 6, 8)
    i, j = torch.arange(4).unsqueeze(1) + 2, torch.arange(6)
    padding = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert whole_mask(None, q, k, False, None) is None
    assert torch.equal(whole_mask(padding.new_empty(2, 0), q, k, True, 3)[0, 0], j <= i)
    assert torch.equal(whole_mask(padding, q, k, True, 3), (j <= i) & padding[:, None, None])
    near = (j <= i) & (i - j < 3)
    assert torch.equal(whole_mask(padding.to(torch.uint8), q, k, True, 3), near & padding[:, None, None])
    starts = torch.tensor([0, 2, 4, 8], dtype=torch.int32)
    q = torch.randn(2, 1, 4, 8)
    expected = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    expected[0, 0, :2, :2] = expected[0, 0, 2:, 2:] = torch.ones(2, 2).tril().bool()
    expected[1, 0] = torch.ones(4, 4).tril().bool()
    assert torch.equal(whole_mask(starts, q, q, True, None), expected)


def test_a_longnet_trains_and_generates_as_its_whole_forward():
    model = llama()
    report = fastllm.patch(model, ops={"attention": fastllm.DilatedConfig([4, 16], [1, 2])})
    assert report.counts == {"attention": 2}
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.no_grad():
        expected = model(tokens()).logits
        assert (expected - llama().eval()(tokens()).logits).abs().max() > 1e-3
        first = model(tokens()[:, :9], use_cache=True)
        logits = [first.logits]
        for at in range(9, 16):
            logits.append(model(tokens()[:, at : at + 1], past_key_values=first.past_key_values, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="must pair up"):
        fastllm.DilatedConfig([4], [1, 2])
    with pytest.raises(TypeError, match="DilatedConfig"):
        fastllm.patch(model, ops={"attention": 3})


def test_a_longnet_generates_over_a_cache_of_fixed_size_and_refuses_one_that_forgets():
    model = llama().eval()
    fastllm.patch(model, ops={"attention": fastllm.DilatedConfig([4, 16], [1, 2])})
    options = {
        "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip
    padded = torch.ones(2, 9, dtype=torch.long)
    padded[1, :3] = 0
    for mask in (torch.ones_like(padded), padded):
        found = [
            model.generate(
                tokens(2, 9), attention_mask=mask, cache_implementation=kind, disable_compile=True, **options
            )
            for kind in ("dynamic", "static")
        ]
        torch.testing.assert_close(*(torch.stack(f.logits) for f in found), rtol=1e-4, atol=1e-5)
    model = of(CONFIGS["mistral"]).eval()
    fastllm.patch(model, ops={"attention": fastllm.DilatedConfig([4, 16], [1, 2])})
    with pytest.raises(fastllm.ConfigError, match="keeps every token in its place"):
        model.generate(tokens(2, 9), **options)
    kept = model.generate(tokens(2, 9), past_key_values=DynamicCache(), **options)
    whole = model(kept.sequences, use_cache=False).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(kept.logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_documents_and_a_mask_given_together_both_hold():
    model, _ = pair("llama")
    ids, bounds = tokens(1, 10), torch.tensor([0, 4, 10], dtype=torch.int32)
    i = torch.arange(10)
    document = (i >= 4).long()
    hidden = torch.ones(10, 10, dtype=torch.bool)
    hidden[7:, 5] = False
    whole = ((i <= i.unsqueeze(1)) & (document == document.unsqueeze(1)) & hidden)[None, None]
    with torch.no_grad():
        expected = model(ids, attention_mask=whole, use_cache=False).logits
        for mask in (whole, ((i <= i.unsqueeze(1)) & hidden)[None, None]):
            options = {"attention_mask": mask, "use_cache": False, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            torch.testing.assert_close(model(ids, **options).logits, expected, rtol=1e-5, atol=1e-5)
