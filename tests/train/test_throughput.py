"""FLOPs of a step against counts by hand and against what PyTorch's own counter sees; tokens and utilisation by arithmetic."""

import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from fastllm.train import StepFlops, Throughput, peak_flops, step_flops
from fastllm.train.throughput import StepCost

transformers = pytest.importorskip("transformers")
HIDDEN, LAYERS, HEADS, KEYS, INNER, VOCABULARY = 64, 3, 4, 2, 96, 100
SHAPE = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
    "intermediate_size": INNER, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip
HEAD = HIDDEN // HEADS
PROJECTIONS = LAYERS * HIDDEN * (2 * HIDDEN + 2 * KEYS * HEAD)
GLU = LAYERS * 3 * HIDDEN * INNER
NORMS = (2 * LAYERS + 1) * HIDDEN
TABLE = VOCABULARY * HIDDEN


def llama(**more):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **more))


def attention(*lengths, per=6):
    return per * LAYERS * HEADS * HEAD * sum(n * n for n in lengths)


def test_a_dense_model_with_grouped_heads():
    weights = PROJECTIONS + GLU + NORMS + TABLE  # the head; the embedding only looks up
    assert step_flops(llama(), [16, 7]).model == 6 * weights * 23 + attention(16, 7)
    assert step_flops(llama(), [16, 7], convention="palm").model == 6 * weights * 23 + attention(16, 7, per=12)


def test_a_tied_head_is_multiplied_with_all_the_same():
    assert step_flops(llama(tie_word_embeddings=True), [9]) == step_flops(llama(), [9])


def test_lengths_may_be_padded_empty_or_absent():
    assert step_flops(llama(), [5, 0]) == step_flops(llama(), [5])
    assert step_flops(llama(), []).model == 0


def test_a_mixture_counts_the_experts_that_a_token_visits():
    config = transformers.MixtralConfig(**SHAPE, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    weights = PROJECTIONS + 2 * GLU + LAYERS * HIDDEN * 8 + NORMS + TABLE
    assert step_flops(transformers.MixtralForCausalLM(config), [10]).model == 6 * weights * 10 + attention(10)


def test_frozen_weights_take_no_weight_gradient():
    peft = pytest.importorskip("peft")
    rank = 4
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=rank, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    frozen = PROJECTIONS + GLU + NORMS + TABLE
    adapters = LAYERS * rank * (HIDDEN + HIDDEN)
    first = HIDDEN * HIDDEN  # the first query projection: nothing below it is trained
    assert step_flops(model, [12]).model == (4 * frozen - 2 * first + 6 * adapters) * 12 + attention(12)


def test_adapters_that_are_not_in_use_and_originals_of_trained_modules_count_nothing():
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    plain = peft.get_peft_model(llama(), peft.LoraConfig(r=4, **settings))
    other = peft.get_peft_model(llama(), peft.LoraConfig(r=4, **settings))
    other.add_adapter("idle", peft.LoraConfig(r=16, **settings))
    other.set_adapter("default")
    assert step_flops(other, [12]) == step_flops(plain, [12])
    head = peft.get_peft_model(llama(), peft.LoraConfig(r=4, modules_to_save=["lm_head"], **settings))
    assert step_flops(head, [12]).model == step_flops(plain, [12]).model + 2 * TABLE * 12  # its weight learns


def test_frozen_layers_below_the_first_that_learns_have_no_backward_pass():
    model = llama()
    model.requires_grad_(False)
    model.model.layers[2].requires_grad_(True)
    layer = (PROJECTIONS + GLU) // LAYERS + 2 * HIDDEN
    expected = (2 * 2 * layer + 6 * layer + 4 * (HIDDEN + TABLE)) * 10 + (2 * 2 + 6) * HEADS * HEAD * 100
    assert step_flops(model, [10]).model == expected


def test_chunked_attention_sees_its_chunk():
    config = transformers.Llama4TextConfig(
        **SHAPE, intermediate_size_mlp=INNER, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=8,
        layer_types=["chunked_attention"] * LAYERS, moe_layers=[], head_dim=HEAD,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config)
    pairs = step_flops(model, [20]).model - 20 * step_flops(model, [1]).model
    assert pairs == 12 * LAYERS * HEADS * HEAD * ((2 * 64 + 16) / 2 - 20 / 2)


def test_a_window_hides_work():
    config = transformers.MistralConfig(**SHAPE, sliding_window=8)
    weights = PROJECTIONS + GLU + NORMS + TABLE
    pairs = 8 * 8 / 2 + (32 - 8) * 8
    found = step_flops(transformers.MistralForCausalLM(config), [32]).model
    assert found == 6 * weights * 32 + 12 * LAYERS * HEADS * HEAD * pairs


def test_layers_that_are_checkpointed_run_twice_in_hardware():
    model = llama()
    plain = step_flops(model, [16])
    assert plain.hardware == plain.model
    model.gradient_checkpointing_enable()
    again = 2 * (PROJECTIONS + GLU + NORMS - HIDDEN) * 16 + attention(16, per=2)  # not the last norm, nor the head
    assert step_flops(model, [16]) == StepFlops(plain.model, plain.model + again)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pytorchs_counter_sees_the_same(checkpointing):
    """Eager attention multiplies with the hidden half as well: PaLM's convention. Norms are no matrix products."""
    model = llama(attn_implementation="eager", use_cache=False).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    tokens = torch.randint(VOCABULARY, (2, 16))
    # PyTorch may leave out a repeated layer's last product, of which nothing but shapes is needed.
    with set_checkpoint_early_stop(False), FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    ours = step_flops(model, [16, 16], convention="palm").hardware
    assert counter.get_total_flops() == pytest.approx(ours, rel=0.02)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt_oss", "mamba"])
def test_families(family):
    config = transformers.AutoConfig.for_model(family)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    if family == "mamba":
        with pytest.raises(ValueError, match="MambaConfig"):
            step_flops(model, [8])
        return
    active = step_flops(model, [8]).model / 8 / 6
    published = {
        "gpt2": 124e6, "bloom": None, "gemma3_text": None, "qwen3_moe": None, "deepseek_v3": 37e9, "gpt_oss": 5.1e9
    }[family]  # fmt: skip
    assert active < sum(p.numel() for p in model.parameters()) * 1.05
    if published:
        assert active == pytest.approx(published, rel=0.05)


def test_arithmetic():
    done = Throughput(2.0, 100, 80, 60, StepFlops(4e12, 6e12), devices=2, peak=4e12)
    assert (done.tokens_per_s, done.real_tokens_per_s, done.trainable_tokens_per_s) == (25, 20, 15)
    assert (done.tflops, done.hardware_tflops, done.mfu, done.hfu) == (1.0, 1.5, 0.25, 0.375)
    unknown = Throughput(2.0, 100, 80, 60, StepFlops(4e12, 6e12))
    assert unknown.mfu is None
    assert unknown.hfu is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA A10", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_peaks(name, peak):
    assert peak_flops(name, torch.bfloat16) == peak
    assert peak_flops(name, torch.float32) is None


def test_no_peak_is_guessed_for_a_cpu():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_bad_input():
    with pytest.raises(ValueError, match="causal, palm, got 'chinchilla'"):
        step_flops(llama(), [3], convention="chinchilla")
    with pytest.raises(ValueError, match="negative, got -1"):
        step_flops(llama(), [3, -1])
    with pytest.raises(ValueError, match="Linear has no config"):
        step_flops(torch.nn.Linear(2, 2), [3])


def test_gradients_of_prompts_go_down_to_them_and_a_head_alone_needs_none_below():
    peft = pytest.importorskip("peft")
    prompts = peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    frozen = PROJECTIONS + GLU + NORMS + TABLE
    assert step_flops(prompts, [12]).model == 4 * frozen * 12 + attention(12)
    head = llama().requires_grad_(False)
    head.lm_head.requires_grad_(True)
    below = PROJECTIONS + GLU + NORMS
    assert step_flops(head, [12]).model == (2 * below + 6 * TABLE) * 12 + attention(12, per=2)


def test_wrappers_and_kinds_of_layers():
    assert step_flops(torch.nn.DataParallel(llama()), [9]) == step_flops(llama(), [9])
    config = transformers.LlamaConfig(**SHAPE)
    config.layer_types = ["full_attention", "indexed_attention", "linear_attention"]
    model = llama()
    model.config.layer_types = config.layer_types
    assert step_flops(llama(), [9]).model - step_flops(model, [9]).model == 6 * HEADS * HEAD * 81


def test_a_cost_that_is_kept_is_known_to_hold_no_longer_when_the_model_trains_otherwise():
    model = llama()
    cost = StepCost(model)
    assert cost.holds
    assert cost([16, 7]) == step_flops(model, [16, 7])
    model.model.layers[0].requires_grad_(False)
    assert not cost.holds
    assert StepCost(model)([16, 7]) == step_flops(model, [16, 7]) != cost([16, 7])
    cost = StepCost(model)
    model.gradient_checkpointing_enable()
    assert not cost.holds
