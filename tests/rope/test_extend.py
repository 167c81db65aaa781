"""extend_context on real model classes: its effect, its reload, its undoing; the recommendation and its command."""

import copy
import json

import pytest
import torch

import fastllm
from fastllm import rope
from fastllm.errors import ConfigError
from tests.patching.models import llama, of, tokens

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}, "gemma": {}, "gemma2": {}, "phi": {}, "phi3": {},
    "gpt_neox": {}, "stablelm": {}, "olmo2": {}, "granite": {}, "cohere": {}, "cohere2": {}, "smollm3": {}, "helium": {},
    "starcoder2": {}, "persimmon": {}, "nemotron": {}, "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen3_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}, "glm": {}, "exaone4": {},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": ["sliding_attention", "full_attention"]},
}  # fmt: skip


LONG = {"short_factor": [1.0] * 8, "long_factor": [1.0 + n for n in range(8)]}


def model_of(family):
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    return of(config).eval()


def own_check_fails():
    """Transformers 5.0 fails to check yarn where kinds of layers have RoPE parameters of their own."""
    return transformers.__version__.startswith("5.0.")


def logits(model, length=96):
    with torch.no_grad():
        return model(tokens(1, length), use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_extends_reloads_and_restores(family, tmp_path):
    model = model_of(family)
    if family == "gemma3_text" and own_check_fails():
        with pytest.raises(ConfigError, match="does not take yarn"):
            rope.extend_context(model, 256)
        return
    before, config = logits(model), context_of(model)
    how = ("longrope", LONG) if family == "phi3" else ("yarn", {})
    done = rope.extend_context(model, 256, how[0], factor=4.0, original_length=64, **how[1])
    assert done.factor == 4.0
    assert done.modules
    after = logits(model)
    assert not torch.equal(before, after)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-5)
    rope.restore_context(model)
    assert torch.equal(logits(model), before)
    assert context_of(model) == config


def context_of(model):
    config = model.config.get_text_config()
    return copy.deepcopy((config.rope_parameters, config.max_position_embeddings))


@pytest.mark.parametrize("method", [m for m in rope.METHODS if m != "default"])
@pytest.mark.parametrize("patched", [False, True])
def test_every_method_on_a_llama_patched_or_not(method, patched, tmp_path):
    model = llama(max_position_embeddings=64).eval()
    if patched:
        fastllm.patch(model)
    before = logits(model)
    done = rope.extend_context(model, 256, method, **(LONG if method == "longrope" else {}))
    assert str(done).startswith(f"{method}: 64 -> 256 tokens")
    after = logits(model)
    assert (after - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), after, rtol=1e-4, atol=1e-4)
    expected = rope.scaling(
        method, head_dim=16, base=10000.0, original_length=64, factor=4.0, length=64 if method in ("dynamic", "longrope") else 256,
        **(LONG if method == "longrope" else {}), **({"adjusted_base": done.after[""]["rope_theta"]} if method == "abf" else {}),
    ).inv_freq  # fmt: skip
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(fresh.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=1e-7)
    rope.restore_context(model)
    assert torch.equal(logits(model), before)
    rope.restore_context(model)  # nothing to undo


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("method", ["dynamic", "longrope"])
@pytest.mark.parametrize("patched", [False, True])
def test_every_cached_step_is_the_uncached_forward_across_changes_of_frequency(method, cache, patched):
    model = llama(max_position_embeddings=64).eval()
    if patched:
        fastllm.patch(model)
    rope.extend_context(model, 512, method, **(LONG if method == "longrope" else {}))
    prompt, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0
    done = model.generate(
        prompt, attention_mask=mask, max_new_tokens=300, do_sample=False, return_dict_in_generate=True, output_logits=True,
        pad_token_id=0, eos_token_id=None, cache_implementation=cache, disable_compile=True,
    )  # fmt: skip
    assert done.sequences.shape == (2, 320)
    found = torch.stack(done.logits, 1)
    worst = 0.0
    for length in (20, 63, 64, 65, 66, 71, 72, 100, 128, 129, 135, 136, 200, 256, 257, 264, 300, 319):
        whole = torch.nn.functional.pad(mask, (0, length - 20), value=1)
        positions = (whole.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            expected = model(
                done.sequences[:, :length], attention_mask=whole, position_ids=positions, use_cache=False
            ).logits
        worst = max(worst, (found[:, length - 20] - expected[:, -1]).abs().max().item())
    assert worst < 1e-4


def test_transformers_own_dynamic_scaling_is_not_consistent_with_its_cache():
    """The control of the test above: were it otherwise, nothing of ours would be needed."""
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    model = llama(max_position_embeddings=64, rope_parameters=parameters).eval()
    done = model.generate(
        tokens(1, 20), max_new_tokens=200, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    fresh = llama(max_position_embeddings=64, rope_parameters=parameters).eval()
    assert (done.logits[-1] - fresh(done.sequences[:, :-1], use_cache=False).logits[:, -1]).abs().max() > 1e-3


def test_a_cache_is_kept_consistent_through_beams_crops_and_turns():
    model = llama(max_position_embeddings=64).eval()
    rope.extend_context(model, 512, "dynamic")
    options = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "num_beams": 3}
    found = model.generate(tokens(2, 20), **options)
    assert torch.equal(found, model.generate(tokens(2, 20), use_cache=False, **options))
    cache = transformers.DynamicCache()
    ids = tokens(1, 200)
    with torch.no_grad():
        for begin, end in ((0, 60), (60, 64), (64, 65), (65, 127), (127, 140), (140, 200)):
            step = model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
            whole = model(ids[:, :end], use_cache=False).logits[:, begin:]
            torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again, 100), logits(model, 100))
    rope.restore_context(model)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


def test_a_cache_from_before_is_refused():
    model = llama(max_position_embeddings=64).eval()
    cache = model(tokens(1, 8), use_cache=True).past_key_values
    rope.extend_context(model, 512, "dynamic")
    with pytest.raises(ConfigError, match="begin with a new one"):
        model(tokens(1, 1), past_key_values=cache)


def test_extending_again_starts_from_the_trained_length():
    model = llama(max_position_embeddings=64).eval()
    rope.extend_context(model, 128)
    twice = rope.extend_context(model, 512, "linear")
    assert (twice.original_length, twice.factor) == (64, 8.0)
    once = llama(max_position_embeddings=64).eval()
    rope.extend_context(once, 512, "linear")
    assert torch.equal(logits(model), logits(once))


def test_frequencies_are_fp32_and_exact_in_any_dtype_and_without_weights():
    expected = rope.scaling("yarn", head_dim=16, base=10000.0, original_length=64, factor=4.0).inv_freq
    half = llama(torch.bfloat16, max_position_embeddings=64)
    assert half.model.rotary_emb.inv_freq.dtype == torch.bfloat16  # as .to(bfloat16) leaves it
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    for model in (half, empty):
        rope.extend_context(model, 256)
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
        torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=1e-7)


def test_local_layers_keep_their_frequencies():
    model = model_of("gemma3_text")
    rotary = model.model.rotary_emb
    local, whole = rotary.sliding_attention_inv_freq.clone(), rotary.full_attention_inv_freq.clone()
    method = "linear" if own_check_fails() else "yarn"
    done = rope.extend_context(model, 256, method, factor=4.0, original_length=64)
    assert list(done.after) == ["full_attention"]
    assert torch.equal(rotary.sliding_attention_inv_freq, local)
    assert not torch.equal(rotary.full_attention_inv_freq, whole)


def test_nothing_random_and_no_mode_is_changed():
    model = llama(max_position_embeddings=64, attention_dropout=0.5).train()
    state = torch.get_rng_state()
    rope.extend_context(model, 256)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


def test_a_config_with_ntk_loads_where_fastllm_is_imported():
    config = LlamaConfig(**SIZES, rope_parameters={"rope_type": "ntk", "rope_theta": 10000.0, "factor": 4.0})
    model = AutoModelForCausalLM.from_config(config)
    expected = rope.scaling("ntk", head_dim=16, base=10000.0, original_length=64, factor=4.0).inv_freq
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_a_bad_call_leaves_an_extended_model_extended():
    model = llama(max_position_embeddings=64).eval()
    rope.extend_context(model, 512, "dynamic")
    extended = logits(model, 100)
    for wrong in ({"method": "yarn", "beta": 1}, {"method": "linear", "factor": 0.5}):
        with pytest.raises(ConfigError):
            rope.extend_context(model, 512, **wrong)
    assert torch.equal(logits(model, 100), extended)
    assert model.model._forward_hooks


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "max_length must be a number of tokens, at least 1, got 0"),
        ((128.5,), {}, "max_length must be"),
        ((64,), {}, "max_length must lie beyond the 64 tokens that the model reads"),
        ((128,), {"factor": 0}, "factor must be at least 1, got 0"),
        ((128,), {"factor": 1}, "factor must be greater than 1 for yarn to change anything, got 1"),
        ((128, "dynamic"), {"factor": 1.0}, "factor must be greater than 1 for dynamic"),
        ((128, "ntk"), {"factor": 1}, "factor must be greater than 1 for ntk"),
        ((32,), {"factor": 2.0}, "max_length must lie beyond the 64 tokens of the training, got 32"),
        ((128, "default"), {}, "default did not change any frequency of LlamaForCausalLM"),
        ((128, "abf"), {"adjusted_base": "1e6"}, "adjusted_base must be a number, got '1e6'"),
        ((128,), {"truncate": "no"}, "truncate must be True or False, got 'no'"),
        ((128,), {"original_length": True}, "original_length must be a number of tokens, at least 1, got True"),
        (
            (128, "longrope"),
            {"short_factor": 3},
            "short_factor must be a list of numbers, one for each of 8 pairs, got 3",
        ),
        (
            (128, "longrope"),
            {"short_factor": [1.0] * 8, "long_factor": torch.ones(8)},
            "long_factor must be a list of numbers",
        ),
        ((128, "alibi"), {}, "method must be one of default, linear"),
        ((128,), {"beta": 1}, "yarn has no parameter 'beta'"),
        ((128,), {"original_length": -4}, "original_length must be"),
    ],
)
def test_bad_input_is_one_clear_error_and_changes_nothing(arguments, options, message):
    model = llama(max_position_embeddings=64).eval()
    before, config = logits(model), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ConfigError, match=message):
        rope.extend_context(model, *arguments, **options)
    assert model.config.to_dict() == config
    assert torch.equal(logits(model), before)


def test_a_family_that_takes_one_method_only_says_so():
    model = model_of("phi3")
    config = context_of(model)
    with pytest.raises(ConfigError, match="Phi3Config does not take yarn"):
        rope.extend_context(model, 8192)
    assert context_of(model) == config


@pytest.mark.parametrize("method", ["yarn", "dynamic", "abf"])
def test_a_model_all_of_whose_layers_have_a_fixed_reach_says_so(method):
    kinds = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 16}
    model = of(transformers.AutoConfig.for_model("gemma3_text", **{**SIZES, **kinds})).eval()
    config, before = context_of(model), logits(model)
    said = "every layer with RoPE of Gemma3TextConfig attends within a fixed reach"
    said = "the config tells no rope_theta" if own_check_fails() else said  # there it has no parameters by kind then
    with pytest.raises(ConfigError, match=said):
        rope.extend_context(model, 256, method)
    assert context_of(model) == config
    assert torch.equal(logits(model), before)
    with pytest.raises(ConfigError, match=said):
        rope.laws.recommend(model, 256)


@pytest.mark.parametrize("method", ["yarn", "longrope", "abf", "dynamic"])
def test_a_rotary_module_that_does_not_read_its_frequencies_is_refused(method):
    if own_check_fails():
        pytest.skip("PhiMoE of Transformers 5.0 does not run with these parameters")
    scaled = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64, "short_mscale": 1.2,
        "long_mscale": 1.2, **LONG,
    }  # fmt: skip
    kinds = {
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 256,
        "rope_parameters": scaled,
    }
    model = of(transformers.AutoConfig.for_model("phimoe", **{**SIZES, **kinds})).eval()
    config, before = context_of(model), logits(model)
    with pytest.raises(ConfigError, match="rotary_emb of PhimoeForCausalLM does not have the frequencies"):
        rope.extend_context(model, 512, method)
    assert context_of(model) == config
    assert torch.equal(logits(model), before)


def test_a_hybrid_model_follows_its_text_or_says_that_its_cache_cannot():
    kinds = {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
    model = of(transformers.AutoConfig.for_model("minimax", **{**SIZES, **kinds})).eval()
    rope.extend_context(model, 256, "dynamic")
    ids = tokens(1, 80)
    with torch.no_grad():
        cache = model(ids[:, :40], use_cache=True).past_key_values
        with pytest.raises(ConfigError, match="MiniMaxCache keeps states beside its layers"):
            model(ids[:, 40:41], past_key_values=cache)
    if own_check_fails():  # its hybrid models have caches of their own
        return
    model = of(transformers.AutoConfig.for_model("lfm2", **{**SIZES, "layer_types": ["conv", "full_attention"]})).eval()
    rope.extend_context(model, 256, "dynamic")
    with torch.no_grad():
        cache = model(ids[:, :40], use_cache=True).past_key_values
        for n in range(40, 80):
            step = model(ids[:, n : n + 1], past_key_values=cache).logits
        torch.testing.assert_close(step, model(ids, use_cache=False).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_a_given_factor_is_not_told_as_the_ratio_of_lengths():
    done = rope.extend_context(llama(max_position_embeddings=64).eval(), 512, "dynamic", factor=2.0)
    assert str(done).startswith("dynamic: 64 -> 512 tokens by a factor of 2; trained for 64; in model.rotary_emb")


def test_a_model_without_rope_is_an_error():
    model = of(transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=97))
    with pytest.raises(ConfigError, match="no rotary position embedding"):
        rope.extend_context(model, 4096)
    with pytest.raises(TypeError, match="got str"):
        rope.extend_context("llama", 4096)


def test_frequencies_that_do_not_reach_the_logits_are_an_error(monkeypatch):
    model = llama(max_position_embeddings=64).eval()
    fixed = [t.clone() for t in model.model.rotary_emb(torch.zeros(1), torch.arange(4).unsqueeze(0))]
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda x, position_ids: fixed)
    with pytest.raises(ConfigError, match="but not its logits past 64 tokens"):
        rope.extend_context(model, 256)


def test_recommendations_follow_the_laws():
    config = LlamaConfig(max_position_embeddings=4096, head_dim=128, rope_theta=10000.0)
    near, far = rope.laws.recommend(config, 16384), rope.laws.recommend(config, 128 * 1024)
    assert (near.method, near.needs_tuning, near.factor) == ("yarn", False, 4.0)
    assert (far.method, far.needs_tuning) == ("abf", True)
    assert 128 * 1024 <= far.bound < 256 * 1024
    assert far.critical_dimension == 92
    assert rope.laws.recommend(config, 4000).method == "default"
    model = llama(max_position_embeddings=64).eval()
    found = rope.laws.recommend(model, 256)
    exec(found.command, {"fastllm": fastllm, "model": model})
    assert model.config.max_position_embeddings == 256
    for wrong in (0, 1.5, True):
        with pytest.raises(ConfigError, match="target_length"):
            rope.laws.recommend(config, wrong)


def test_a_target_beyond_the_bound_warns():
    with pytest.warns(UserWarning, match="beyond the .* that the scaling laws predict"):
        rope.extend_context(llama(max_position_embeddings=64).eval(), 4096, "ntk", factor=2.0)


def test_the_command_says_what_the_laws_say(capsys):
    from fastllm import cli

    assert cli.main(["context", "llama", "--target", "32768"]) == 0
    said = capsys.readouterr().out
    assert "fastllm.extend_context(model, 32768" in said
    assert "T target, B predicted bound" in said
    assert cli.main(["context", "llama", "--target", "32768", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["target_length"] == 32768
    assert cli.main(["context", "gpt2", "--target", "32768"]) == 1
    assert "no RoPE parameters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("deepseek_v3", {"qk_rope_head_dim": 16}, "finds its scale from RoPE parameters"),
    ],
)
def test_a_command_that_extend_context_would_refuse_is_not_recommended_in_silence(
    family, sizes, message, tmp_path, capsys
):
    from fastllm import cli

    config = transformers.AutoConfig.for_model(family, **{**SIZES, **sizes})
    config.save_pretrained(tmp_path)
    assert cli.main(["context", str(tmp_path), "--target", "32768"]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize("scaled", [False, True])
def test_what_a_config_does_not_take_is_not_recommended(scaled, tmp_path):
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    more = {"rope_scaling": factors} if scaled else {}
    config = transformers.AutoConfig.for_model("phi3", **SIZES, **more, original_max_position_embeddings=64)
    length = 256
    found = rope.laws.recommend(config, length)
    assert found.method == "abf"
    assert "does not take yarn" in found.reason
    model = AutoModelForCausalLM.from_config(config)
    rope.extend_context(model, length, found.method, **found.params)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, length), logits(model, length))


@pytest.mark.parametrize("method", ["dynamic", "longrope"])
def test_a_model_loaded_again_follows_its_text_after_extending_it_again(method, tmp_path):
    model = llama(max_position_embeddings=64).eval()
    rope.extend_context(model, 512, method, **(LONG if method == "longrope" else {}))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    rope.extend_context(again, 512, method)
    for length in (200, 60, 100):  # whatever was read before
        torch.testing.assert_close(logits(again, length), logits(model, length), rtol=1e-4, atol=1e-4)
    ids = tokens(1, 80)
    cache = transformers.StaticCache(config=again.config, max_cache_len=128)
    with torch.no_grad():
        found = [again(ids[:, :20], past_key_values=cache).logits]
        found += [again(ids[:, n : n + 1], past_key_values=cache).logits for n in range(20, 80)]
        for length in (21, 40, 64, 65, 80):
            expected = again(ids[:, :length], use_cache=False).logits[:, -1]
            torch.testing.assert_close(torch.cat(found, 1)[:, length - 1], expected, rtol=1e-4, atol=1e-4)


def test_a_trained_length_survives_saving_and_wrapping(tmp_path):
    peft = pytest.importorskip("peft")
    model = llama(max_position_embeddings=64).eval()
    before = logits(model)
    rope.extend_context(model, 256, "linear")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert rope.extend_context(again, 512, "linear").original_length == 64
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert rope.extend_context(wrapped, 512, "ntk").original_length == 64
    rope.restore_context(wrapped)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile], ids=["parallel", "compiled"])
@pytest.mark.parametrize("method", ["yarn", "dynamic"])
def test_wrappers_of_parallel_training_and_compilation_are_seen_through(wrap, method):
    model = llama(max_position_embeddings=64).eval()
    before = logits(model)
    assert rope.extend_context(wrap(model), 256, method).length == 256
    assert not torch.equal(logits(model), before)
    rope.restore_context(torch.nn.DataParallel(wrap(model)))
    assert torch.equal(logits(model), before)


def test_what_a_family_keeps_beside_a_method_stays():
    model = llama(max_position_embeddings=64).eval()
    model.config.rope_parameters["mrope_section"] = [4, 2, 2]
    done = rope.extend_context(model, 256)
    assert done.after[""]["mrope_section"] == [4, 2, 2]
    again = rope.extend_context(model, 512, beta_fast=16.0)
    assert again.after[""]["beta_fast"] == 16.0


def test_models_that_their_makers_scaled_read_what_they_read():
    config = LlamaConfig(
        **{**SIZES, "max_position_embeddings": 512},
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    assert rope.laws.recommend(config, 400).method == "default"
    with pytest.raises(ConfigError, match="beyond the 512 tokens that the model reads"):
        rope.extend_context(AutoModelForCausalLM.from_config(config), 128)


@pytest.mark.parametrize(
    "how",
    [{"factor": "4"}, {"factor": float("inf")}, {"beta_fast": "32"}, {"attention_factor": float("nan")}, {"base": 3}],
)
def test_parameters_of_no_meaning_are_config_errors(how):
    with pytest.raises(ConfigError):
        rope.extend_context(llama(max_position_embeddings=64).eval(), 256, **how)


def test_an_attention_that_took_its_scale_from_rope_is_refused():
    config = transformers.DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=2, num_experts_per_tok=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
        v_head_dim=8, qk_nope_head_dim=8, n_group=1, topk_group=1, max_position_embeddings=64,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="finds its scale from RoPE parameters"):
        rope.extend_context(of(config), 256)
