"""Stage ppo on two CPU ranks: replicas under torchrun, ZeRO 2 and 3 under DeepSpeed; each resumes as if it had not stopped."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.ranks import run_on_two

from .conftest import timeless

transformers = pytest.importorskip("transformers")
pytest.importorskip("deepspeed", reason="the ZeRO claim needs DeepSpeed; the dev extra installs it")


@pytest.mark.slow
def test_actor_and_critic_train_alike_on_replicas_and_shards_and_resume_bit_for_bit(settings, tmp_path):
    settings |= {
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "adaptive_kl": {"target": 1.0, "horizon": 100},
        "target_kl": 1.0, "max_steps": 2, "save_steps": 1, "kl_coef": 0.01,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    worker = Path(__file__).parent / "ranks_worker.py"
    results = []
    for launcher, ways in (("deepspeed", ["3", "2"]), ("torchrun", ["ddp"])):
        found, said = run_on_two(worker, str(path), *ways, launcher=launcher)
        assert [r["way"] for r in found] == ways, said
        results += found
    plain = results[-1]["whole"]
    for result in results:
        assert timeless(result["resumed"]) == timeless(result["whole"]), result["way"]
        assert [line["step"] for line in result["whole"]] == [1, 2]
        for key in ("reward", "kl", "policy_loss", "value_loss", "entropy"):  # the first iteration: the same samples
            assert result["whole"][0][key] == pytest.approx(plain[0][key], rel=1e-3, abs=1e-5), (result["way"], key)
        final = transformers.AutoModelForCausalLM.from_pretrained(Path(result["folder"]) / "final")
        assert all(bool(torch.isfinite(p).all()) for p in final.parameters())
    sharded = results[0]["gathers"]
    assert min(sharded) > 0, "the test's own premise: weights are partitioned between uses"
    assert len(sharded) == 2 + 2 + 1  # a gathering per rollout, per checkpoint and at the end; not per token
