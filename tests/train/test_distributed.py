"""The same configuration on two CPU ranks, of one machine or of two: plain, and ZeRO 1 to 3; each resumes as if it had not stopped."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from fastllm.train import PaddingCollator, config
from fastllm.train.run import Run
from tests.ranks import run_on_two, run_on_two_machines

transformers = pytest.importorskip("transformers")
pytest.importorskip("deepspeed", reason="the ZeRO claim needs DeepSpeed; the dev extra installs it")


@pytest.mark.slow
def test_zero_stages_and_replicas_on_two_machines_train_alike_and_resume_bit_for_bit(folder, chats, tmp_path):
    settings = {
        "stage": "sft", "model": str(folder), "data": str(chats), "eval_data": str(chats), "eval_steps": 4, "max_length": 128,
        "output_dir": str(tmp_path / "machine-MACHINE"), "save_on_each_node": True, "max_steps": 4,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": 2, "save_steps": 2,
        "lr_scheduler_type": "linear", "packing": True, "num_train_epochs": 4, "profile": True,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    cases = [{}, {"zero_stage": 3}, {"zero_stage": 1}, {"zero_stage": 2}]
    worker = Path(__file__).parent / "distributed_worker.py"
    results, said = run_on_two_machines(worker, str(path), *map(json.dumps, cases))
    assert [r.get("case") for r in results] == [*cases, None], said
    assert said.count("step 4/4 loss") == said.count("profile of steps") == 2 * len(cases), said  # one rank tells
    told = results.pop()["machines"]
    plain = list(results[0]["whole"].values())
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
        other = Path(str(run).replace("machine-0", "machine-1"))
        sharded = result["case"].get("zero_stage") == 3
        for place in [run] if sharded else [run, other]:
            model = transformers.AutoModelForCausalLM.from_pretrained(place / "final")
            assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
        assert not (sharded and (other / "final").exists())  # DeepSpeed gathers the weights in the first process
        with torch.no_grad():
            perplexity = model(**rows).loss.exp().item()
        for machine, names in enumerate(result["files"]):
            assert f"rng_state_{machine}.pth" in names
            assert f"rng_state_{1 - machine}.pth" not in names
            assert any(name.startswith("global_step") for name in names) == bool(result["case"]), names
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (validated,) = [line["eval_perplexity"] for line in lines if "eval_perplexity" in line]
        assert validated == pytest.approx(perplexity, rel=1e-5)
        steps = [line["step"] for line in lines if "tgs" in line]
        assert steps == [1, 2, 3, 4]  # one rank writes
        for rank, place in enumerate((run, other)):
            profile = json.loads((place / "profile" / f"rank-{rank}.json").read_text())
            assert profile["shares"]["communication"] > 0, result["case"]
            assert (place / "profile" / profile["trace"]).is_file()
        assert not (other / "metrics.jsonl").exists()
        assert (other / "run.json").is_file()
        both = 2 * lines[0]["step_s"]
        assert lines[0]["samples_per_s"] * both == pytest.approx(round(lines[0]["samples_per_s"] * both), abs=0.01)
        assert 2 * 2 * 2 * 128 * 0.8 < lines[0]["tgs_real"] * both <= 2 * 2 * 2 * 128  # bins of both ranks, nearly full
    (first, again), (second, once_more) = told["names"]
    assert first == again != second == once_more
    for name, message in {
        "not shared": "output_dir: process 1 does not see what the first wrote to",
        "shared": "save_on_each_node: true is for machines that each have an output_dir of their own, and process 1 sees",
        "other settings": "all processes must have one configuration and the same data: learning_rate is 0.1 in process 0",
        "nothing to resume": "there is no checkpoint or run nowhere",
    }.items():
        assert [message in error for error in told[name]] == [True, True], (name, told.get(name))
    for wanted in ("run", "latest"):  # not checkpoint-4, which one machine has lost
        assert [path[-len("/checkpoint-2") :] for path in told[f"resumed from {wanted}"]] == ["/checkpoint-2"] * 2
        assert told[f"resumed from {wanted}"] == [f"{run}/checkpoint-2", f"{other}/checkpoint-2"]


@pytest.mark.slow
def test_preferences_on_two_ranks_are_one_batch_and_resume_bit_for_bit(folder, write, tmp_path):
    pairs = [{"prompt": f"say {n}", "chosen": "yes " * (1 + n % 5), "rejected": str(n)} for n in range(16)]
    # Both answers like the chosen ones, so that KL is above 0; so few that the second process has nothing to validate but filler.
    held_out = [{"prompt": f"say {n}", "chosen": "yes " * 4, "rejected": "yes " * 5} for n in range(20, 28)]
    settings = {
        "stage": "dpo", "model": str(folder), "data": str(write("pairs.jsonl", pairs)), "max_length": 64, "max_steps": 4,
        "output_dir": str(tmp_path / "runs"), "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2,
        "lr_scheduler_type": "constant", "num_train_epochs": 4,
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    worker = Path(__file__).parent / "distributed_worker.py"
    lora = {"lora": {"r": 4, "target_modules": ["q_proj"]}}
    kto = {"stage": "dpo", "loss_type": "kto", "eval_data": str(write("held-out.jsonl", held_out)), "eval_steps": 4}
    cases = [
        {"zero_stage": 3, **kto}, {"zero_stage": 2, **kto}, {"zero_stage": 3, "stage": "rm"},
        {"zero_stage": 3, "stage": "dpo", **lora},
    ]  # fmt: skip
    plain = [kto, {"stage": "rm"}, {"stage": "dpo", **lora}]
    found, said = run_on_two(worker, str(path), *map(json.dumps, plain + cases))
    assert [r["case"] for r in found] == plain + cases, said
    there = found[: len(plain)]
    for result in found:
        assert result["resumed"] == result["whole"], result["case"]
        case = {key: value for key, value in result["case"].items() if key != "zero_stage"}
        same = next(r for r in there if r["case"] == case)
        assert list(result["whole"].values()) == pytest.approx(list(same["whole"].values()), rel=1e-3), result["case"]
        losses = list(result["whole"].values())
        assert losses[-1] < losses[0], result["case"]
    # KTO's KL, in validation too, is that of one process with the batch of both.
    alone = {**settings, **kto, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "alone")}
    logs = [Path(run) / "metrics.jsonl" for run in (Run(config.parse(alone)).go().run, there[0]["folder"])]
    wanted, told = (
        next(filter(lambda line: "eval_kl" in line, map(json.loads, log.read_text().splitlines()))) for log in logs
    )
    assert wanted["eval_kl"] > 0.01, "the test's own premise"
    for key in ("eval_kl", "eval_loss", "eval_margin"):
        assert told[key] == pytest.approx(wanted[key], rel=1e-3), key
