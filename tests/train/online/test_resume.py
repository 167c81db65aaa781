"""A resumed run goes on as if it had not stopped, to the last bit."""

import shutil

import pytest
import torch

from fastllm import CheckpointError
from fastllm.train import checkpoint

from .conftest import timeless, trained

transformers = pytest.importorskip("transformers")

LORA = {"lora": {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "learning_rate": 0.02}
CASES = {
    "gae": {"adaptive_kl": {"target": 1.0, "horizon": 100}, "normalize_rewards": True, "lr_scheduler_type": "cosine"},
    "ptx": {"preset": "ppo_max", "critic_warmup_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "grpo": {"advantage": "grpo", "target_kl": 0.02, "rollout_chunk_size": 5, "num_train_epochs": 3},
    "lora": {**LORA},
    "conditional with lora": {"stage": "conditional", "pool_iterations": 3, **LORA},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(settings, write, case):
    if "lora" in case:
        pytest.importorskip("peft")
    more = CASES[case]
    if "conditional" in case:
        settings.pop("kl_coef")
    if case == "ptx":
        more = {**more, "pretrain_data": str(write("texts.jsonl", [{"text": f"{n} abc" * 5} for n in range(9)]))}
    run, _, whole = trained(settings, **more)
    weights = {name: p.clone() for name, p in run.course.engine.models.named_parameters()}
    shutil.rmtree(run.folder / "final")
    shutil.rmtree(run.folder / "checkpoint-4")
    again, _, resumed = trained(settings, resume_from_checkpoint=str(run.folder), **more)
    assert again.folder == run.folder
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    assert case != "conditional with lora" or any(
        p.requires_grad and "lora" in n for n, p in run.course.engine.models.named_parameters()
    )
    assert timeless(resumed) == timeless(whole)
    for name, parameter in again.course.engine.models.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert again.course.state_dict() == run.course.state_dict()


def test_a_checkpoint_loads_with_plain_transformers_and_so_does_the_end(settings):
    run, result, _ = trained(settings)
    for path in (run.folder / "checkpoint-4", result.final):
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path)
        for name, tensor in run.course.engine.models.actor.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
    assert [p.name for p in checkpoint.complete(run.folder)] == ["checkpoint-2", "checkpoint-4"]


def test_checkpoints_of_other_stages_models_and_kinds_are_refused(settings, chats):
    run, _, _ = trained(settings, max_steps=2)
    with pytest.raises(CheckpointError, match=r"critic.* is in it|is not in it"):
        trained(settings, resume_from_checkpoint=str(run.folder), advantage="rloo")
    with pytest.raises(CheckpointError, match="asks for lora"):
        trained(settings, resume_from_checkpoint=str(run.folder), **LORA)
    (run.folder / "checkpoint-2" / "course.pt").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint of this stage"):
        trained(settings, resume_from_checkpoint=str(run.folder))
