"""Stage ppo on two machines of one process each: replicas, ZeRO 2 and 3; each resumes as if it had not stopped."""

from pathlib import Path

import pytest
import torch
import yaml

from tests.ranks import run_on_two_machines

from .conftest import timeless

transformers = pytest.importorskip("transformers")
pytest.importorskip("deepspeed", reason="the ZeRO claim needs DeepSpeed; the dev extra installs it")


@pytest.mark.slow
def test_actor_and_critic_train_alike_on_replicas_and_shards_and_resume_bit_for_bit(settings, tmp_path):
    settings |= {
        "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "adaptive_kl": {"target": 1.0, "horizon": 100},
        "target_kl": 1.0, "max_steps": 2, "save_steps": 1, "kl_coef": 0.01, "output_dir": str(tmp_path / "machine-MACHINE"),
        "save_on_each_node": True,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    ways = ["3", "2", "ddp"]
    results, said = run_on_two_machines(Path(__file__).parent / "ranks_worker.py", str(path), *ways)
    assert [r["way"] for r in results] == ways, said
    plain = results[-1]["whole"]
    for result in results:
        assert timeless(result["resumed"]) == timeless(result["whole"]), result["way"]
        assert [line["step"] for line in result["whole"]] == [1, 2]
        for key in ("reward", "kl", "policy_loss", "value_loss", "entropy"):  # the first iteration: the same samples
            assert result["whole"][0][key] == pytest.approx(plain[0][key], rel=1e-3, abs=1e-5), (result["way"], key)
        for name in ("final", "checkpoint-2"):
            both = [Path(result["folder"].replace("machine-0", f"machine-{n}")) / name for n in (0, 1)]
            one, other = (transformers.AutoModelForCausalLM.from_pretrained(path).state_dict() for path in both)
            assert all(bool(torch.isfinite(one[key]).all()) and torch.equal(one[key], other[key]) for key in one)
        assert not (both[1].parent / "metrics.jsonl").exists()
    sharded = results[0]["gathers"]
    assert min(sharded) > 0, "the test's own premise: weights are partitioned between uses"
    assert len(sharded) == 2 + 2 + 1  # a gathering per rollout, per checkpoint and at the end; not per token
