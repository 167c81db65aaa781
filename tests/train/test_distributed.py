"""The same configuration on two CPU ranks: plain, and ZeRO 1 to 3 under DeepSpeed; each resumes as if it had not stopped."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from fastllm.train import PaddingCollator, config
from fastllm.train.run import Run
from tests.ranks import run_on_two

transformers = pytest.importorskip("transformers")
pytest.importorskip("deepspeed", reason="the ZeRO claim needs DeepSpeed; the dev extra installs it")


@pytest.mark.slow
def test_zero_stages_and_plain_ranks_train_alike_and_resume_bit_for_bit(folder, chats, tmp_path):
    settings = {
        "stage": "sft", "model": str(folder), "data": str(chats), "eval_data": str(chats), "eval_steps": 4, "max_length": 128,
        "output_dir": str(tmp_path / "runs"), "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2, "save_steps": 2, "lr_scheduler_type": "linear",
        "packing": True, "num_train_epochs": 4, "profile": True,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    worker = Path(__file__).parent / "distributed_worker.py"
    results = []
    for launcher, stages in (("deepspeed", [3, 1, 2]), ("torchrun", [None])):
        cases = [{"zero_stage": stage} if stage else {} for stage in stages]
        found, said = run_on_two(worker, str(path), *map(json.dumps, cases), launcher=launcher)
        assert [r["case"] for r in found] == cases, said
        assert said.count("step 4/4 loss") == said.count("profile of steps") == 2 * len(cases), said  # one rank tells
        results += found
    plain = list(results[-1]["whole"].values())
    # One process with the batch of both has the same losses, whatever the lengths of the rows.
    alone = Run(config.parse({**settings, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "alone")}))
    alone.go()
    assert plain == pytest.approx(
        [line["loss"] for line in alone.trainer.state.log_history if "loss" in line], rel=1e-4
    )
    assert len(alone.trainer.eval_dataset) % (2 * 8), "the premise: validation does not divide among the processes"
    rows = PaddingCollator()(list(alone.trainer.eval_dataset.rows))
    for result in results:
        assert result["resumed"] == result["whole"], result["case"]
        assert list(result["whole"].values()) == pytest.approx(plain, rel=1e-4), result["case"]
        run = Path(result["folder"])
        model = transformers.AutoModelForCausalLM.from_pretrained(run / "final")
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        with torch.no_grad():
            perplexity = model(**rows).loss.exp().item()
        sharded = any(name.startswith("global_step") for name in result["files"])
        assert sharded == bool(result["case"]), result["files"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (validated,) = [line["eval_perplexity"] for line in lines if "eval_perplexity" in line]
        assert validated == pytest.approx(perplexity, rel=1e-5)
        steps = [line["step"] for line in lines if "tgs" in line]
        assert steps == [1, 2, 3, 4]  # one rank writes
        for rank in (0, 1):
            profile = json.loads((run / "profile" / f"rank-{rank}.json").read_text())
            assert profile["shares"]["communication"] > 0, result["case"]
            assert (run / "profile" / profile["trace"]).is_file()
        both = 2 * lines[0]["step_s"]
        assert lines[0]["samples_per_s"] * both == pytest.approx(round(lines[0]["samples_per_s"] * both), abs=0.01)
        assert 2 * 2 * 2 * 128 * 0.8 < lines[0]["tgs_real"] * both <= 2 * 2 * 2 * 128  # bins of both ranks, nearly full


@pytest.mark.slow
def test_preferences_on_two_ranks_are_one_batch_and_resume_bit_for_bit(folder, write, tmp_path):
    pairs = [{"prompt": f"say {n}", "chosen": str(n), "rejected": "no " * (1 + n % 5)} for n in range(16)]
    settings = {
        "stage": "dpo", "model": str(folder), "data": str(write("pairs.jsonl", pairs)), "max_length": 64, "max_steps": 4,
        "output_dir": str(tmp_path / "runs"), "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2,
        "lr_scheduler_type": "constant", "num_train_epochs": 4,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    worker = Path(__file__).parent / "distributed_worker.py"
    lora = {"lora": {"r": 4, "target_modules": ["q_proj"]}}
    cases = [
        {"zero_stage": 3, "stage": "dpo"}, {"zero_stage": 2, "stage": "dpo"}, {"zero_stage": 3, "stage": "rm"},
        {"zero_stage": 3, "stage": "dpo", **lora},
    ]  # fmt: skip
    found, said = run_on_two(worker, str(path), *map(json.dumps, cases))
    assert [r["case"] for r in found] == cases, said
    plain = [{"stage": "dpo"}, {"stage": "rm"}, {"stage": "dpo", **lora}]
    there, said = run_on_two(worker, str(path), *map(json.dumps, plain), launcher="torchrun")
    assert [r["case"] for r in there] == plain, said
    for result in found + there:
        assert result["resumed"] == result["whole"], result["case"]
        case = {key: value for key, value in result["case"].items() if key != "zero_stage"}
        same = next(r for r in there if r["case"] == case)
        assert list(result["whole"].values()) == pytest.approx(list(same["whole"].values()), rel=1e-3), result["case"]
        losses = list(result["whole"].values())
        assert losses[-1] < losses[0], result["case"]
