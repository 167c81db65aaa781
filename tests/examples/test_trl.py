"""The subclasses of TRL's trainers in docs/rl.md, as the page has them: each step's loss and gradients are TRL's own."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed")

from datasets import Dataset
from transformers import LlamaForCausalLM, set_seed
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

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
    """A small Llama where TRL finds it again, as the reference."""
    set_seed(0)
    LlamaForCausalLM(tiny_config(hidden_size=32, intermediate_size=48, num_hidden_layers=2)).save_pretrained(
        tmp_path / "tiny"
    )
    return str(tmp_path / "tiny")


def beside(fused, original):
    """The trainer of the page, which asserts at every step that the original would have had its loss and gradients."""

    class Beside(fused):
        steps = 0

        def _compute_loss(self, model, inputs, *rest):
            learnt = [p for p in model.parameters() if p.requires_grad]
            expected = original._compute_loss(self, model, inputs, *rest)
            gradients = torch.autograd.grad(expected, learnt)
            loss = super()._compute_loss(model, inputs, *rest)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
            for a, b in zip(torch.autograd.grad(loss, learnt, retain_graph=True), gradients):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6)
            Beside.steps += 1
            return loss

    return Beside


@pytest.mark.parametrize(
    "how",
    [{"loss_type": "dapo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence", "delta": 1.5}],
    ids=str,
)
def test_grpo(page, folder, tmp_path, how):
    trainer = beside(page["FusedGRPOTrainer"], GRPOTrainer)
    options = GRPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4, max_completion_length=8, beta=0.04,
        gradient_accumulation_steps=2, num_iterations=2, use_bias_correction_kl=False, **COMMON, **how,
    )  # fmt: skip
    trainer(
        folder,
        reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        args=options,
        train_dataset=Dataset.from_dict({"prompt": ["ab", "hello", "x", "sort me"] * 4}),
        processing_class=byte_tokenizer(),
    ).train()
    assert trainer.steps >= 4


@pytest.mark.parametrize("how", [{}, {"loss_type": "robust", "label_smoothing": 0.1}], ids=str)
def test_dpo(page, folder, tmp_path, how):
    trainer = beside(page["FusedDPOTrainer"], DPOTrainer)
    options = DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=3, **COMMON, **how)
    rows = {
        "prompt": ["ab", "hello", "x"] * 2,
        "chosen": ["good one", "yes", "abc"] * 2,
        "rejected": ["bad", "no", "z"] * 2,
    }
    trainer(folder, args=options, train_dataset=Dataset.from_dict(rows), processing_class=byte_tokenizer()).train()
    assert trainer.steps == 2
