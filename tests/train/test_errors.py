"""What goes wrong with models, checkpoints and libraries is one line and exit code 2, and leaves everything as it was."""

import errno
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fastllm import cli
from fastllm.train import command, config, lock, models
from fastllm.train.run import Run
from tests.train.elsewhere import killed_inside

transformers = pytest.importorskip("transformers")


@pytest.fixture
def settings(folder, chats, tmp_path):
    return {
        "stage": "sft", "model": str(folder), "data": str(chats), "output_dir": str(tmp_path / "runs"), "max_length": 128,
        "max_steps": 2, "per_device_train_batch_size": 4, "save_steps": 1, "patch": False,
    }  # fmt: skip


@pytest.fixture
def call(tmp_path, capsys, settings):
    """call(key=value, ...) -> exit code and the last line on stderr."""

    def run(*overrides, **more):
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**settings, **more}))
        code = cli.main(["train", str(path), *overrides])
        return code, (capsys.readouterr().err.splitlines() or [""])[-1]

    return run


def everything_in(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


# ---- models ------------------------------------------------------------------------------------------------------


def test_weights_that_are_not_there_are_not_made_up(call, folder, tmp_path):
    whole = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    for change, message in (
        ({name: None}, f"{name} of LlamaForCausalLM is not in it and would be random"),
        ({name: torch.zeros(4, 4)}, f"its {name} is (4, 4), and the configuration's (32, 32)"),
    ):
        kept = {key: tensor for key, tensor in (whole | change).items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        code, said = call()
        assert code == 2
        assert message in said
        assert not (tmp_path / "runs").exists()
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    assert Run(config.parse(_values(call, tmp_path) | {"stage": "rm", "data": str(pairs)}))  # its score head is new


def _values(call, tmp_path):
    return yaml.safe_load((tmp_path / "run.yaml").read_text())


def test_a_folder_that_is_no_model_says_what_it_is(call, folder, tmp_path):
    (tmp_path / "bare").mkdir()
    assert call(model=str(tmp_path / "bare")) == (2, _error(f"the folder {tmp_path / 'bare'} has no config.json"))
    (tmp_path / "bare" / "adapter_config.json").write_text("{}")
    assert "is an adapter, not a model" in call(model=str(tmp_path / "bare"))[1]
    for path in folder.glob("*token*"):
        path.unlink()
    assert "it holds none of a tokenizer's files; give tokenizer" in call()[1]


@pytest.mark.parametrize(("name", "zero3"), [("Bert", False), ("Bert", True), ("XLNet", False)])
def test_a_model_whose_tokens_see_those_after_them_is_refused(call, tokenizer, tmp_path, monkeypatch, name, zero3):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "XLNet":
        small = {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32}
    made = getattr(transformers, f"{name}Config")(vocab_size=len(tokenizer), **small)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(tmp_path / "both-ways")
    tokenizer.save_pretrained(tmp_path / "both-ways")
    if zero3:  # whose weights are not there before training begins
        monkeypatch.setattr(models, "sharded", lambda _: True)
    code, said = call(model=str(tmp_path / "both-ways"))
    assert code == (1 if zero3 else 2)
    assert "lets a token see those after it: it is no causal language model" in said
    assert f"{name}" in said
    assert zero3 or not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_an_encoder_decoder_is_refused(call, tokenizer, tmp_path, name):
    getattr(transformers, f"{name}Config")().save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    assert call(model=str(tmp_path / "two")) == (
        2, _error(f"{tmp_path / 'two'} is an encoder-decoder ({name}Config), and what is trained here are causal language models"),
    )  # fmt: skip


def _error(text):
    return f"fastllm train: error: {text}"


def test_a_library_that_is_missing_is_named_before_a_folder_is_made(call, tmp_path, monkeypatch):
    def absent(*_):
        raise ImportError("You need to install `bitsandbytes`")

    monkeypatch.setattr(transformers.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(absent))
    assert call(optim="adamw_8bit") == (2, _error("optim adamw_8bit: You need to install `bitsandbytes`"))
    assert not (tmp_path / "runs").exists()


def test_what_fails_while_the_trainer_is_made_leaves_no_folder(call, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no such device")

    monkeypatch.setattr(transformers.Trainer, "__init__", fails)
    code, said = call()
    assert code == 1
    assert "no such device" in said
    assert not list((tmp_path / "runs").iterdir())


def test_a_loss_that_is_not_finite_stops_training(call, tmp_path):
    code, said = call(learning_rate=1e38, max_steps=6, save_steps=100, max_grad_norm=0)
    assert code == 1
    assert "the loss is nan; training stops" in said
    run = next((tmp_path / "runs").iterdir())
    logged = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert logged
    assert all(loss > 0 for loss in logged)  # none that transformers has filtered
    assert not (run / "final").exists()


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_further(call, tmp_path, settings):
    assert call()[0] == 0
    run = next((tmp_path / "runs").iterdir())
    final = load_file(run / "final" / "model.safetensors")
    metrics = (run / "metrics.jsonl").read_text()
    shutil.rmtree(run / "final")  # as a kill between the last checkpoint and the end leaves it
    for steps in (2, 1):
        result = Run(config.parse({**settings, "resume_from_checkpoint": str(run), "max_steps": steps})).go()
        assert (result.steps, result.train_loss) == (2, None)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    again = load_file(run / "final" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in final.items())
    assert [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line] == [
        line for line in metrics.splitlines() if '"loss"' in line
    ]


def test_resuming_needs_a_whole_checkpoint_of_the_same_stage(call, tmp_path, write, capsys):
    assert call()[0] == 0
    run = next((tmp_path / "runs").iterdir())
    shutil.rmtree(run / "checkpoint-1")
    newest = run / "checkpoint-2"
    pairs = str(write("pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4))
    before = everything_in(run)

    def refused(**more):
        code, said = call(resume_from_checkpoint=str(run), max_steps=3, **more)
        assert code == 2, said
        return said

    assert "is of stage sft, not dpo: to begin with its weights, give it as model" in refused(stage="dpo", data=pairs)
    assert everything_in(run) == before
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        path = newest / name
        whole = path.read_bytes()
        path.unlink()
        assert ("holds no weights" if name.startswith("model") else f"has no {name}, without which") in refused()
        path.write_bytes(whole[: len(whole) // 2])
        assert f"{name} cannot be read" in refused()
        path.write_bytes(whole)
    assert call(resume_from_checkpoint=str(run), max_steps=3)[0] == 0


@contextmanager
def training_in(folder):
    assert not lock.hold(folder)
    yield


def test_one_run_at_a_time_trains_in_a_folder_and_a_killed_one_keeps_nobody_out(call, tmp_path):
    assert call(max_steps=1)[0] == 0
    run = next((tmp_path / "runs").iterdir())
    before = everything_in(run)
    for resume in (str(run), "latest"):
        with killed_inside(training_in(run)) as process:
            code, said = call(resume_from_checkpoint=resume, max_steps=2)
            assert code == 2
            assert f"resume_from_checkpoint: process {process} on " in said
            assert f" trains in {run} since " in said
        assert (run / lock.NAME).is_file(), "the test's own premise: a kill leaves it"
        assert everything_in(run).keys() - before.keys() == {run / lock.NAME}
        assert everything_in(run).items() >= before.items()
    assert call(resume_from_checkpoint=str(run), max_steps=2)[0] == 0
    assert not (run / lock.NAME).exists()


def test_a_run_that_ends_while_another_begins_to_go_on_is_not_gone_on_from_where_it_was(call, tmp_path, monkeypatch):
    assert call(max_steps=1)[0] == 0
    run = next((tmp_path / "runs").iterdir())

    def late(folder, hold=lock.hold):
        monkeypatch.undo()
        shutil.copytree(run / "checkpoint-1", run / "checkpoint-9")
        return hold(folder)

    monkeypatch.setattr(lock, "hold", late)
    code, said = call(resume_from_checkpoint=str(run), max_steps=2)
    assert code == 2
    assert "start again" in said
    assert not (run / "left-checkpoint-9").exists()


def test_a_lock_whose_file_its_last_owner_has_taken_away_is_not_one(tmp_path, monkeypatch):
    def late(file, take=lock.take):
        monkeypatch.undo()
        (tmp_path / lock.NAME).unlink()
        return take(file)

    monkeypatch.setattr(lock, "take", late)
    assert lock.hold(tmp_path) == ""
    assert lock.is_at(lock._held[tmp_path], tmp_path / lock.NAME)
    assert lock.hold(tmp_path) == "", "the same process may"
    lock.release(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_trains_with_a_warning(settings, tmp_path, monkeypatch, capsys):
    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refused)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "max_steps": 1}))
    assert cli.main(["train", str(path)]) == 0
    assert "has no file locks: nothing keeps a second run from training there" in capsys.readouterr().err


def test_an_adapter_goes_on_as_it_was(call, tmp_path):
    pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": ["q_proj"]}
    assert call(lora=lora, max_steps=1)[0] == 0
    resume = {"resume_from_checkpoint": str(next((tmp_path / "runs").iterdir())), "max_steps": 2}
    for other, message in (
        ({"r": 8}, "lora_A.weight is (4, 32), the configuration's (8, 32)"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            "of another adapter: it has no base_model.model.model.layers.0.self_attn.v_proj",
        ),
        ({"target_modules": ["v_proj"]}, "is of another adapter"),
    ):
        code, said = call(lora=lora | other, **resume)
        assert code == 2
        assert message in said
    assert call(lora=lora, **resume)[0] == 0


# ---- the command -------------------------------------------------------------------------------------------------


def test_options_of_other_trainers_are_told_how_keys_are_written(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["train", "sft", "--learning-rate=1e-4"])
    assert left.value.code == 2
    assert "a key of a configuration is written learning_rate=1e-4" in capsys.readouterr().err
    assert cli.main(["train", "sftt"]) == 2
    said = capsys.readouterr().err
    assert "sftt is no file and no example; did you mean 'sft'?" in said
    assert all(path.stem in said for path in command.CONFIGS.glob("*.yaml"))
