"""What `report_to` names gets every figure through transformers' own integrations: TensorBoard's files are read back, W&B's offline
run too where wandb is installed, and else what its callback hands to a stand-in."""

import importlib
import json
import struct
import sys
from pathlib import Path

import pytest
import yaml

from fastllm import cli
from fastllm.train import config
from fastllm.train.online.run import Run as OnlineRun
from fastllm.train.run import Run

pytest.importorskip("transformers")
FIGURES = {
    "loss",
    "perplexity",
    "learning_rate",
    "tgs",
    "tgs_real",
    "samples_per_s",
    "step_s",
    "tflops",
    "peak_memory_gb",
}
AT_THE_END = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
REWARDS = {"reward", "kl", "policy_loss", "samples_per_s", "rollout_s", "train_s", "tgs"}


@pytest.fixture
def sft(folder, chats, tmp_path):
    return {
        "stage": "sft", "model": str(folder), "data": str(chats), "eval_data": str(chats), "eval_steps": 2, "max_length": 128,
        "output_dir": str(tmp_path / "runs"), "max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no",
    }  # fmt: skip


@pytest.fixture
def ppo(folder, write, tmp_path):
    return {
        "stage": "ppo", "model": str(folder), "data": str(write("prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(8)])),
        "reward": "fastllm.train.examples:share_of_digits", "output_dir": str(tmp_path / "runs"), "max_length": 64,
        "max_new_tokens": 4, "rollout_batch_size": 8, "per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no",
    }  # fmt: skip


def told(run):
    """What metrics.jsonl has, as the integrations name it, by step; without what Trainer says of a run at its end."""
    found = {}
    for line in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines()):
        step = line.pop("step")
        for name, value in line.items():
            if name not in AT_THE_END:
                key = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                found[key, step] = pytest.approx(value, rel=1e-6)
    return found


def gone(settings, **more):
    run = (OnlineRun if settings["stage"] == "ppo" else Run)(config.parse({**settings, **more}))
    run.go()
    return run


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_tensorboard_has_what_metrics_jsonl_has(request, stage):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = gone(request.getfixturevalue(stage), report_to="tensorboard")
    (events,) = run.folder.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events.parent)).Reload()
    found = {(tag, e.step): e.value for tag in read.Tags()["scalars"] for e in read.Scalars(tag)}
    expected = told(run)
    assert {key: found.get(key) for key in expected} == expected
    assert {f"train/{name}" for name in (FIGURES if stage == "sft" else REWARDS)} <= {tag for tag, _ in expected}
    assert stage == "ppo" or ("eval/perplexity", 2) in found


STAND_IN = """
import sys
logged, started = [], []
class _Run:
    summary = {}
    def _label(self, **_): pass
run = None
config = {}
class _Config(dict):
    def update(self, values, allow_val_change=False): super().update(values)
config = _Config()
def init(**arguments):
    started.append(arguments)
    sys.modules[__name__].run = _Run()
def log(values): logged.append(values)
def define_metric(*_, **__): pass
def termwarn(*_, **__): pass
"""


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_weights_and_biases_gets_what_metrics_jsonl_has(request, tmp_path, monkeypatch, stage):
    """By a stand-in for wandb that keeps what transformers' callback hands to it."""
    package = tmp_path / "standin" / "wandb"
    (package / "sdk" / "lib").mkdir(parents=True)
    for folder in (package / "sdk", package / "sdk" / "lib"):
        (folder / "__init__.py").write_text("")
    (package / "__init__.py").write_text(STAND_IN)
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(package.parent))
    try:
        run = gone(request.getfixturevalue(stage), report_to=["wandb"])
        wandb = sys.modules["wandb"]
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
            del sys.modules[name]
        importlib.invalidate_caches()
    found = {(key, one["train/global_step"]): value for one in wandb.logged for key, value in one.items()}
    expected = told(run)
    assert {key: found.get(key) for key in expected} == expected
    assert {f"train/{name}" for name in (FIGURES if stage == "sft" else REWARDS)} <= {key for key, _ in expected}
    assert wandb.started[0]["name"] == run.folder.name


def test_weights_and_biases_writes_an_offline_run(sft, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    run = gone(sft, report_to="wandb")
    wandb.finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found, name = {}, ""
    for record in map(Record.FromString, records(path)):
        if record.HasField("run"):
            name = record.run.display_name
        if record.HasField("history"):
            one = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found |= {(key, one["train/global_step"]): value for key, value in one.items()}
    expected = told(run)
    assert {key: found.get(key) for key in expected} == expected
    assert name == run.folder.name


def records(path: Path):
    """A .wandb file is a log of LevelDB behind a header of seven bytes."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            yield whole
            whole = b""


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("mlflow", "report_to: mlflow needs the package mlflow, which is not installed: pip install mlflow"),
        (["comet_ml"], "report_to: comet_ml needs the package comet-ml"),
        ("tensorbord", "report_to: unknown 'tensorbord'; did you mean 'tensorboard'?"),
    ],
)
def test_a_logger_that_is_not_there_is_one_line_before_any_work(request, capsys, tmp_path, stage, report_to, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**request.getfixturevalue(stage), "report_to": report_to}))
    capsys.readouterr()
    assert cli.main(["train", str(path)]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "cache").exists()
