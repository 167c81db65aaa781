import copy
import inspect
import io
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.llama import modeling_llama

import fastllm
from fastllm.patching.deferred import DeferredLogits
from fastllm.patching.replacement import Replacement
from tests.patching.models import assert_same_step, llama, of, step, tokens

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
NEOX = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
FAMILIES = {
    "mistral": (MistralConfig(**SIZES), {"rms_norm": 5, "rope": 2, "glu": 2, "loss": 1}),
    "qwen3: norms of queries and keys": (Qwen3Config(**SIZES), {"rms_norm": 9, "rope": 2, "glu": 2, "loss": 1}),
    "gemma2: 1 + weight, soft-capped logits, tied head": (Gemma2Config(**SIZES), {"rms_norm": 9, "rope": 2, "glu": 2, "loss": 1}),
    "gemma3": (Gemma3TextConfig(**SIZES), {"rms_norm": 13, "rope": 2, "glu": 2, "loss": 1}),
    "phi3: one gate_up projection, partial rotation": (
        Phi3Config(**SIZES, partial_rotary_factor=0.5), {"rms_norm": 5, "rope": 2, "glu": 2, "loss": 1},
    ),
    "glm: interleaved partial rotation": (GlmConfig(**SIZES), {"rms_norm": 5, "rope": 2, "glu": 2, "loss": 1}),
    "cohere: layer norms, scaled logits": (CohereConfig(**SIZES), {"rope": 2, "glu": 2, "loss": 1}),
    "granite: divided logits": (GraniteConfig(**SIZES, logits_scaling=3.0), {"rms_norm": 5, "rope": 2, "glu": 2, "loss": 1}),
    "mixtral: experts": (MixtralConfig(**{**SIZES, **MOE}), {"rms_norm": 5, "rope": 2, "glu": 2, "loss": 1}),
    "qwen3_moe": (Qwen3MoeConfig(**{**SIZES, **MOE}), {"rms_norm": 9, "rope": 2, "glu": 2, "loss": 1}),
    "gpt_neox: partial rotation, no gate": (GPTNeoXConfig(**NEOX), {"rope": 2, "loss": 1}),
}  # fmt: skip


def attributes(model):
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_family_trains_as_the_unpatched_one(family):
    config, counts = FAMILIES[family]
    model = of(config)
    expected = step(model)
    report = fastllm.patch(model)
    counted = {op: n for op, n in report.counts.items() if op != "layer_norm"}
    assert counted == {**counts, "attention": 2}, str(report)
    assert_same_step(step(model), expected)
    fastllm.unpatch(model)
    for found, was in zip(step(model)[:2], expected[:2]):
        assert torch.equal(found, was)


def test_bf16_agrees_within_bf16():
    model = llama(torch.bfloat16)
    expected = step(llama().bfloat16().float())
    plain, found = step(model), (fastllm.patch(model), step(model))[1]
    assert (found[1] - expected[1]).abs().max() <= 2 * (plain[1] - expected[1]).abs().max() + 1e-2
    assert abs(found[0] - expected[0]) <= 2 * abs(plain[0] - expected[0]) + 1e-2


def test_nothing_but_the_instance_changes():
    model, other = llama(), llama()
    classes = {n: v for n, v in vars(modeling_llama).items() if isinstance(v, type)}
    before = {n: dict(vars(v)) for n, v in classes.items()}
    rotation, functional = modeling_llama.apply_rotary_pos_emb, dict(vars(torch.nn.functional))
    keys, config = list(model.state_dict()), model.config.to_dict()
    random_state = torch.get_rng_state()
    untouched = attributes(other)
    fastllm.patch(model)
    assert {n: dict(vars(v)) for n, v in classes.items()} == before
    assert modeling_llama.apply_rotary_pos_emb is rotation
    assert dict(vars(torch.nn.functional)) == functional
    assert attributes(other) == untouched
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())


def test_unpatch_leaves_no_attribute_behind_and_patch_is_idempotent():
    model = llama()
    before = attributes(model)
    first = fastllm.patch(model)
    during = attributes(model)
    second = fastllm.patch(model)
    assert second.counts == first.counts
    assert attributes(model) == during
    fastllm.unpatch(model)
    assert attributes(model) == before
    fastllm.unpatch(model)


def test_patched_undoes_only_what_it_did():
    model = llama()
    fastllm.patch(model, "rms_norm")
    with fastllm.patched(model) as report:
        assert report.counts == {"rms_norm": 5, "rope": 2, "glu": 2, "loss": 1, "attention": 2}
    assert "forward" in vars(model.model.norm)
    assert "forward" not in vars(model.model.layers[0].self_attn)
    assert "forward" not in vars(model)
    assert vars(model.model.layers[0].self_attn)["config"] is model.config
    with pytest.raises(RuntimeError, match="inside"), fastllm.patched(model):
        raise RuntimeError("inside")
    assert "forward" not in vars(model)


@pytest.mark.parametrize("make", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_is_patched_and_independent(make):
    model = llama()
    fastllm.patch(model)
    expected = step(model)
    if make == "deepcopy":
        other = copy.deepcopy(model)
    elif make == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same_step(step(other), expected, rtol=0, atol=0)
    replacements = [r for m in other.modules() for r in vars(m).values() if isinstance(r, Replacement)]
    assert len(replacements) == 5 + 2 + 2 + 3 + 3 + 1  # the last one the rotary module
    assert all(any(r.module is m for m in other.modules()) for r in replacements)


def test_save_pretrained_and_reload(tmp_path):
    model = llama()
    expected = step(model)
    fastllm.patch(model)
    model.save_pretrained(tmp_path)
    assert_same_step(step(AutoModelForCausalLM.from_pretrained(tmp_path).train()), expected)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("targets", [["q_proj", "gate_proj"], ["lm_head", "up_proj"]], ids=["body", "head"])
def test_lora_before_and_after(patch_first, targets):
    def adapted(patched):
        model = llama()
        if patched and patch_first:
            fastllm.patch(model)
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(target_modules=targets, r=4, init_lora_weights=False))
        if patched and not patch_first:
            report = fastllm.patch(model)
            assert report.counts == {"rms_norm": 5, "rope": 2, "glu": 2, "loss": 1, "attention": 2}
            assert any("plain nn.Linear" in s.reason for s in report.skipped) == ("lm_head" in targets)
        return model.train()

    assert_same_step(step(adapted(True)), step(adapted(False)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = llama()
    expected = step(model)
    fastllm.patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same_step(step(model), expected)


def test_compiles_without_a_graph_break_in_training():
    model = llama()
    expected = step(model)
    fastllm.patch(model)
    compiled = torch.compile(model, fullgraph=True)
    found = step(compiled)
    assert_same_step((found[0], found[1], {n.removeprefix("_orig_mod."): g for n, g in found[2].items()}), expected)


def test_generate_is_the_same():
    model = llama().eval()
    prompt = tokens(2, 7)
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **arguments)
    fastllm.patch(model)
    assert torch.equal(model.generate(prompt, **arguments), expected)


def test_gradient_accumulation_divides_by_the_items_of_the_whole_batch():
    model = llama()
    items = torch.tensor(20)
    expected = step(model, num_items_in_batch=items)
    fastllm.patch(model)
    assert_same_step(step(model, num_items_in_batch=items), expected)


def test_shift_labels_and_padding_masks_are_honoured():
    model = llama()
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[0, :4] = 0
    inputs = {"attention_mask": mask, "shift_labels": tokens().roll(-1, 1)}
    expected = step(model, **inputs)
    fastllm.patch(model)
    assert_same_step(step(model, **inputs), expected)


def test_logits_stay_tensors_unless_a_training_step_has_labels():
    model = llama()
    fastllm.patch(model)
    ids = tokens()
    assert type(model(input_ids=ids).logits) is torch.Tensor
    training = model(input_ids=ids, labels=ids).logits
    assert isinstance(training, DeferredLogits)
    assert training.shape == (2, 16, 97)
    assert torch.is_tensor(training.argmax(-1))
    assert type(model.eval()(input_ids=ids, labels=ids).logits) is torch.Tensor
    plain = model.train()(input_ids=ids, labels=ids, return_dict=False)
    assert plain[0].dim() == 0


def test_a_loss_of_the_users_own_gets_real_logits():
    model = llama()
    fastllm.patch(model)
    ids = tokens()
    found = nn.functional.cross_entropy(model(input_ids=ids, labels=ids).logits.flatten(0, 1), ids.flatten())
    fastllm.unpatch(model)
    expected = nn.functional.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), ids.flatten())
    torch.testing.assert_close(found, expected)


def test_autocast():
    model = llama()
    with torch.autocast("cpu", torch.bfloat16):
        expected = step(model)
        fastllm.patch(model)
        found = step(model)
    torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2)
    assert all(g.dtype == torch.float32 for g in found[2].values())


def test_forward_keeps_its_signature():
    model = llama()
    before = inspect.signature(model.forward)
    fastllm.patch(model)
    assert inspect.signature(model.forward) == before


class WrongNorm(nn.Module):
    """An RMS norm in its forward pass, with another gradient."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.eps = 1e-6

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + self.eps)


class GatedRMSNorm(WrongNorm):
    def forward(self, x, gate=None):
        y = self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return y if gate is None else y * torch.sigmoid(gate)


def test_verification_puts_back_a_norm_that_only_looks_like_one():
    model = llama()
    model.model.norm = WrongNorm(64)
    report = fastllm.patch(model, "rms_norm")
    assert report.counts == {"rms_norm": 4}
    (skipped,) = report.skipped
    assert skipped.path == "model.norm"
    assert "verification: gradient 0 differs" in skipped.reason
    assert fastllm.patch(model, "rms_norm", verify=False).counts == {"rms_norm": 5}


def test_a_gated_norm_is_left_and_reported():
    model = llama()
    model.model.norm = GatedRMSNorm(64)
    report = fastllm.patch(model, "rms_norm")
    assert [(s.path, "more than the hidden states" in s.reason) for s in report.skipped] == [("model.norm", True)]


def test_exclude_names_and_globs():
    report = fastllm.patch(llama(), exclude=["rope", "model.layers.0.*"])
    assert report.counts == {"rms_norm": 3, "glu": 1, "loss": 1, "attention": 1}
    assert {s.reason for s in report.skipped if s.path} == {"excluded"}
    assert "left: excluded" in str(report)


def test_strict_names_each_op_that_could_not_be_applied_and_changes_nothing():
    model = of(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=97))
    before = attributes(model)
    with pytest.raises(fastllm.PatchError, match=r"rope \(.*\); glu \(.*\)"):
        fastllm.patch(model, ["rope", "glu", "loss"], strict=True)
    assert attributes(model) == before


def test_a_model_with_nothing_to_patch_warns():
    with pytest.warns(UserWarning, match=r"changed nothing in Sequential"):
        fastllm.patch(nn.Sequential(nn.Conv1d(3, 3, 1), nn.ReLU()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ops": "rmsnorm"}, ValueError, "ops must be 'auto' or any of 'rms_norm'.*got 'rmsnorm'"),
        ({"ops": ["loss", "x"]}, ValueError, "got 'x'"),
        ({"exclude": [3]}, TypeError, "exclude must hold op names and path globs"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        fastllm.patch(llama(), **arguments)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        fastllm.patch("llama")


def test_the_report_is_a_table_with_repeated_layers_folded():
    text = str(fastllm.patch(llama()))
    assert "model.layers.{0-1}.input_layernorm" in text
    assert "attention 2, glu 2, loss 1, rms_norm 5, rope 2" in text


def test_a_sharded_head_is_called_as_ever():
    model = llama()
    expected = step(model)
    fastllm.patch(model)
    model.lm_head.weight.ds_id = 7  # the mark of ZeRO-3 on a parameter that may be a shard
    found = step(model)
    assert_same_step(found, expected)


def test_meta_device_models_can_be_patched_before_they_have_weights():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(MistralConfig(**SIZES))
    report = fastllm.patch(model)
    assert report.counts == {"rms_norm": 5, "rope": 2, "glu": 2, "loss": 1, "attention": 2}


def test_forced_definition_serves_a_patched_model():
    model = llama()
    expected = step(model)
    fastllm.patch(model)
    with fastllm.use_backend("torch"):
        assert_same_step(step(model), expected)


def test_import_of_fastllm_does_not_import_transformers():
    code = "import sys, fastllm; sys.exit('transformers' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_strict_with_auto_asks_for_what_the_model_has():
    report = fastllm.patch(llama(), strict=True)
    assert "layer_norm" not in report.counts
    assert "not in this model: layer_norm" in str(report)
    model = llama()
    model.model.norm.forward = lambda x: x
    model.model.layers.requires_grad_(False)
    for layer in model.model.layers:
        layer.input_layernorm.forward = layer.post_attention_layernorm.forward = lambda x: x
    with pytest.raises(fastllm.PatchError, match="rms_norm"):
        fastllm.patch(model, strict=True)


def test_logits_read_after_the_head_has_changed_are_an_error_and_not_others():
    model = llama()
    fastllm.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    before = model(tokens(), labels=tokens())
    kept = before.logits.detach()
    late = model(tokens(), labels=tokens())
    late.loss.backward()
    optimizer.step()
    assert torch.equal(before.logits.detach(), kept)  # computed while it could be
    with pytest.raises(fastllm.FastLLMError, match="changed since the forward pass"):
        late.logits.argmax(-1)


@pytest.mark.parametrize(
    "context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), torch.no_grad]
)
def test_what_is_patched_does_not_depend_on_where_patch_is_called(context):
    expected = fastllm.patch(llama()).counts
    with context():
        assert fastllm.patch(llama()).counts == expected


def test_what_is_excluded_is_told_and_what_matches_nothing_warns():
    with pytest.warns(UserWarning, match="'rmsnorm' is no op .* matches no module of LlamaForCausalLM"):
        report = fastllm.patch(llama(), exclude=["rmsnorm", "loss"])
    assert ("", "loss", "excluded") in [(s.path, s.op, s.reason) for s in report.skipped]
    with pytest.warns(UserWarning, match="changed nothing in LlamaForCausalLM: no op was asked for"):
        fastllm.patch(llama(), ops=[])
    for wrong in ({"ops": 3}, {"ops": None}, {"exclude": 3}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must hold"):
            fastllm.patch(llama(), **wrong)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got int"):
        fastllm.unpatch(3)


def test_a_patched_model_exports_and_runs_on_the_meta_device():
    model = llama().eval()
    fastllm.patch(model)
    exported = torch.export.export(model, (tokens(),), {"use_cache": False}, strict=False)
    torch.testing.assert_close(exported.module()(tokens(), use_cache=False).logits, model(tokens()).logits)
    report = fastllm.patch(llama().double())
    assert {p.backend for p in report.patched} == {"torch"}  # the glu's activation has no parameters of its own
    assert model.to("meta")(tokens().to("meta")).logits.shape == (2, 16, 97)


def test_torchs_own_norm_is_patched_when_its_epsilon_is_a_number():
    assert fastllm.patch(torch.nn.Sequential(torch.nn.RMSNorm(8, eps=1e-6)), "rms_norm").counts == {"rms_norm": 1}
    with pytest.warns(UserWarning, match="none of its attributes is an epsilon"):
        fastllm.patch(torch.nn.Sequential(torch.nn.RMSNorm(8)), "rms_norm")
