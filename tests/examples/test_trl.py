"""The subclasses of TRL's trainers in docs/rl.md, as the page has them: each step's loss and gradients are TRL's own."""

import re
import warnings
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")
pytest.importorskip("peft", reason="PEFT is not installed")

from datasets import Dataset
from peft import LoraConfig
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from fastllm import rl
from fastllm.train.examples import byte_tokenizer, tiny_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "rl.md"
COMMON = {
    "max_steps": 2, "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "learning_rate": 1e-2,
    "logging_steps": 100, "gradient_checkpointing": False, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def page():
    """What the page's Python defines."""
    names = {}
    for block in re.findall(r"```py\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    return names


@pytest.fixture
def folder(tmp_path):
    """A small model of a family where TRL finds it again, as the reference."""

    def save(family):
        set_seed(0)
        small = {"hidden_size": 32, "num_hidden_layers": 2}
        if family is GPT2LMHeadModel:
            config = GPT2Config(vocab_size=tiny_config().vocab_size, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
                                eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        elif family is Gemma2ForCausalLM:
            config = Gemma2Config(vocab_size=tiny_config().vocab_size, intermediate_size=48, num_attention_heads=2,
                                  num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, **small)  # fmt: skip
        else:
            config = tiny_config(intermediate_size=48, **small)
        family(config).save_pretrained(tmp_path / "tiny")
        return str(tmp_path / "tiny")

    return save


def expect_warning(train, left):
    """That the loss is TRL's own for the sake of what is named; for None: that it is not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    told = {str(w.message) for w in caught if "TRL's own loss" in str(w.message)}
    assert told == ({f"TRL's own loss is computed, with all its logits, for the sake of {left}"} if left else set())


def beside(fused, original):
    """The trainer of the page, which asserts at every step that the original method would have had its loss and gradients."""

    class Beside(fused):
        steps = 0

        def _compute_loss(self, model, inputs, *rest):
            learnt = [p for p in model.parameters() if p.requires_grad]
            expected = original(self, model, inputs, *rest)
            gradients = torch.autograd.grad(expected, learnt)
            loss = super()._compute_loss(model, inputs, *rest)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
            for a, b in zip(torch.autograd.grad(loss, learnt, retain_graph=True), gradients):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)
            Beside.steps += 1
            return loss

    return Beside


ADAPTER = LoraConfig(r=4, lora_dropout=0.0, target_modules=["q_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("family", "adapter", "how"),
    [
        (LlamaForCausalLM, ADAPTER, {"loss_type": "dapo"}),
        (GPT2LMHeadModel, None, {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 1.5}),
        (LlamaForCausalLM, None, {"use_bias_correction_kl": True}),
    ],
)
def test_grpo(page, folder, tmp_path, family, adapter, how):
    left = how.get("use_bias_correction_kl") and "use_bias_correction_kl"

    def original(self, model, inputs):
        if not left:  # as with vLLM, whose ratios are one a token or one a sequence
            like = inputs["completion_ids"][:, : 1 if self.importance_sampling_level == "sequence" else None]
            inputs["importance_sampling_ratio"] = torch.rand_like(like, dtype=torch.float32) + 0.5
            inputs["completion_mask"][0] = 0  # as mask_truncated_completions does
            self.use_vllm = self.vllm_importance_sampling_correction = True
        loss = GRPOTrainer._compute_loss(self, model, inputs)
        self.use_vllm = False
        return loss

    trainer = beside(page["FusedGRPOTrainer"], original)
    options = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=8, beta=0.04,
        gradient_accumulation_steps=2, num_iterations=2, **COMMON, **{"use_bias_correction_kl": False} | how,
    )  # fmt: skip
    run = trainer(
        folder(family),
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=options,
        train_dataset=Dataset.from_dict({"prompt": ["ab", "hello", "x", "sort me"] * 4}),
        processing_class=byte_tokenizer(),
        peft_config=adapter,
    )
    expect_warning(run.train, left)
    assert trainer.steps >= 4


@pytest.mark.parametrize(
    ("family", "adapter", "how", "left"),
    [
        (LlamaForCausalLM, ADAPTER, {}, None),
        (Gemma2ForCausalLM, None, {"loss_type": "robust", "label_smoothing": 0.1}, None),
        (LlamaForCausalLM, None, {"loss_type": ["sigmoid", "hinge"]}, "loss_type, loss_weights"),
    ],
)
def test_dpo(page, folder, tmp_path, family, adapter, how, left):
    trainer = beside(page["FusedDPOTrainer"], DPOTrainer._compute_loss)
    options = DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=3, **COMMON, **how)
    rows = {
        "prompt": ["ab", "hello", "x"] * 2,
        "chosen": ["good one", "yes", "abc"] * 2,
        "rejected": ["bad", "no", "z"] * 2,
    }
    data = {"train_dataset": Dataset.from_dict(rows), "processing_class": byte_tokenizer()}
    expect_warning(trainer(folder(family), args=options, peft_config=adapter, **data).train, left)
    assert trainer.steps == 2


def test_the_precision_is_that_of_the_trainer(page, folder, tmp_path, monkeypatch):
    def linear_dpo_loss(*args, loss=rl.linear_dpo_loss, **options):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return loss(*args, **options)

    autocast = []
    monkeypatch.setattr(rl, "linear_dpo_loss", linear_dpo_loss)
    page["FusedDPOTrainer"](
        folder(LlamaForCausalLM),
        args=DPOConfig(output_dir=str(tmp_path), **{**COMMON, "bf16": True}),
        train_dataset=Dataset.from_dict({"prompt": ["ab"] * 8, "chosen": ["yes"] * 8, "rejected": ["no"] * 8}),
        processing_class=byte_tokenizer(),
    ).train()
    assert autocast == [True, True]
