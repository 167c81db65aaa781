"""The same configuration on two CPU ranks: plain, and ZeRO 1 to 3 under DeepSpeed; each resumes as if it had not stopped."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests.ranks import run_on_two

transformers = pytest.importorskip("transformers")
pytest.importorskip("deepspeed", reason="the ZeRO claim needs DeepSpeed; the dev extra installs it")


@pytest.mark.slow
def test_zero_stages_and_plain_ranks_train_alike_and_resume_bit_for_bit(folder, chats, tmp_path):
    settings = {
        "stage": "sft", "model": str(folder), "data": str(chats), "eval_data": str(chats), "eval_steps": 4, "max_length": 128,
        "output_dir": str(tmp_path / "runs"), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2, "save_steps": 2, "lr_scheduler_type": "linear",
        "packing": True, "num_train_epochs": 4,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    worker = Path(__file__).parent / "distributed_worker.py"
    results = []
    for launcher, stages in (("deepspeed", ["3", "1", "2"]), ("torchrun", ["ddp"])):
        found, said = run_on_two(worker, str(path), *stages, launcher=launcher)
        assert [r["stage"] for r in found] == stages, said
        results += found
    plain = list(results[-1]["whole"].values())
    for result in results:
        assert result["resumed"] == result["whole"], result["stage"]
        assert list(result["whole"].values()) == pytest.approx(plain, rel=1e-4), result["stage"]
        run = Path(result["folder"])
        model = transformers.AutoModelForCausalLM.from_pretrained(run / "final")
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        sharded = any(name.startswith("global_step") for name in result["files"])
        assert sharded == (result["stage"] != "ddp"), result["files"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines if "tgs" in line]
        assert steps == [1, 2, 3, 4]  # one rank writes
        both = 2 * lines[0]["step_s"]
        assert lines[0]["samples_per_s"] * both == pytest.approx(round(lines[0]["samples_per_s"] * both), abs=0.01)
        assert 2 * 2 * 2 * 128 * 0.8 < lines[0]["tgs_real"] * both <= 2 * 2 * 2 * 128  # bins of both ranks, nearly full
