"""Checkpoints are whole or not there: after a kill at any moment, after a full disk, after a failed write."""

import errno
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("transformers")

from fastllm import CheckpointError, cli
from fastllm.train import checkpoint


@pytest.fixture
def settings(folder, chats, tmp_path):
    return {
        "stage": "sft", "model": str(folder), "data": str(chats), "output_dir": str(tmp_path / "runs"), "max_length": 128,
        "max_steps": 100000, "per_device_train_batch_size": 2, "save_steps": 1, "patch": False,
    }  # fmt: skip


def test_the_newest_checkpoint_loads_after_every_kill(settings, tmp_path, write):
    """Twenty kills at random moments, every second one within a save; each time training goes on from where it was."""
    online = {
        **{key: value for key, value in settings.items() if key not in ("data", "max_length")},
        "data": str(write("prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(8)])), "max_length": 64, "max_new_tokens": 2,
        "reward": "fastllm.train.examples:share_of_digits", "rollout_batch_size": 4,
    }  # fmt: skip
    kills = {"sft": 12, "ppo": 5, "conditional": 3}
    arguments = []
    for stage, count in kills.items():
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump((settings if stage == "sft" else online) | {"stage": stage}))
        arguments += [str(path), str(count)]
    worker = Path(__file__).parent / "killed_worker.py"
    done = subprocess.run([sys.executable, str(worker), "0", *arguments], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for stage, count in kills.items():
        reports = [report for report in found if report["stage"] == stage]
        assert len(reports) == count
        assert not [problem for report in reports for problem in report["torn"]]
        steps = [report["newest"] for report in reports]
        assert steps == sorted(steps)
        assert steps[-1] > count // 2
        assert any(report["aside"] for report in reports), "no kill fell into a save, so nothing was shown"


# ---- folders -----------------------------------------------------------------------------------------------------


def fill(folder, step):
    folder.mkdir(parents=True)
    (folder / checkpoint.STATE).write_text(json.dumps({"global_step": step}))


def write_and_fail(folder, error):
    with checkpoint.written_whole(folder, writes=True) as aside:
        (aside / "part").write_text("y")
        raise error


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "checkpoint-1"
    with checkpoint.written_whole(target, writes=True) as aside:
        (aside / "part").write_text("x")
        assert not target.exists()
    assert (target / "part").read_text() == "x"
    for error, raised in (
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (ValueError("x"), ValueError),
    ):
        with pytest.raises(raised):
            write_and_fail(tmp_path / "checkpoint-2", error)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    with checkpoint.written_whole(target, writes=True) as aside:
        (aside / "part").write_text("new")
    assert (target / "part").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_find_takes_a_run_or_a_checkpoint_and_passes_over_torn_ones(tmp_path):
    for step in (2, 10, 9):
        fill(tmp_path / f"checkpoint-{step}", step)
    (tmp_path / "checkpoint-11").mkdir()
    fill(tmp_path / ".saving-checkpoint-12", 12)
    assert checkpoint.find(tmp_path).name == "checkpoint-10"
    assert checkpoint.find(tmp_path / "checkpoint-2").name == "checkpoint-2"
    checkpoint.clean(tmp_path)
    assert not (tmp_path / ".saving-checkpoint-12").exists()
    for wrong, message in (
        (tmp_path / "no", "no checkpoint or run"),
        (tmp_path / "checkpoint-11", "no complete checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.find(wrong)


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path):
    fill(tmp_path / "checkpoint-4", 4)
    renamed = []

    def killed(*paths, rename=os.rename):
        if renamed:
            raise KeyboardInterrupt  # what runs after it is undone below, as a kill would not run it
        renamed.append(paths)
        rename(*paths)

    def replace():
        with checkpoint.written_whole(tmp_path / "checkpoint-4", writes=True) as aside:
            (aside / checkpoint.STATE).write_text("{}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            replace()
    fill(tmp_path / ".saving-checkpoint-4", 4)
    assert not (tmp_path / "checkpoint-4").exists(), "the test's own premise: neither has the name"
    assert checkpoint.find(tmp_path).name == "checkpoint-4"
    checkpoint.clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-4"]


def test_checkpoints_after_the_one_a_run_goes_on_from_are_put_aside(tmp_path):
    for _ in range(2):
        for step in (2, 4, 6):
            if not (tmp_path / f"checkpoint-{step}").exists():
                fill(tmp_path / f"checkpoint-{step}", step)
        checkpoint.leave(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-2", "left-checkpoint-4", "left-checkpoint-4-1", "left-checkpoint-6", "left-checkpoint-6-1",
    ]  # fmt: skip
    assert checkpoint.find(tmp_path).name == "checkpoint-2"


def test_rotation_keeps_the_last_ones_and_the_best(tmp_path):
    for step in range(1, 7):
        fill(tmp_path / f"checkpoint-{step}", step)
    checkpoint.rotate(tmp_path, 2, tmp_path / "checkpoint-2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-5", "checkpoint-6"]
    checkpoint.rotate(tmp_path, None, None)
    assert len(checkpoint.complete(tmp_path)) == 3


def test_space_is_checked_before_a_save(tmp_path, monkeypatch, capsys):
    usage = SimpleNamespace(total=1000, used=400, free=600)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage)
    checkpoint.check_space(tmp_path, 100)
    assert capsys.readouterr().err == ""
    checkpoint.check_space(tmp_path, 500)
    assert "90% full" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="training stops; the checkpoints before it are intact"):
        checkpoint.check_space(tmp_path, 590)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("when", ["counted before", "met while writing"])
def test_a_full_disk_stops_training_and_leaves_the_earlier_checkpoints(
    settings, tmp_path, write, monkeypatch, capsys, stage, when
):
    if stage == "ppo":
        prompts = str(write("prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(8)]))
        settings |= {
            "stage": "ppo", "data": prompts, "max_new_tokens": 2, "reward": "fastllm.train.examples:share_of_digits",
            "rollout_batch_size": 4,
        }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "max_steps": 6, "save_steps": 2}))
    with full_disk(monkeypatch, when, tmp_path):
        code = cli.main(["train", str(path)])
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 1
    assert err.startswith("fastllm train: error: ")
    assert "intact" in err
    assert "free" in err
    run = next((tmp_path / "runs").iterdir())
    assert [p.name for p in checkpoint.complete(run)] == ["checkpoint-2", "checkpoint-4"]
    assert not list(run.glob(".saving*"))
    assert cli.main(["train", str(path), f"resume_from_checkpoint={run}"]) == 0
    assert checkpoint.complete(run)[-1].name == "checkpoint-6"


@contextmanager
def full_disk(monkeypatch, when, tmp_path):
    """The third save finds no room: by counting before it begins, or in its middle, where the system writes no further."""
    if when == "counted before":
        usage = checkpoint.shutil.disk_usage

        def full(folder):
            real = usage(folder)
            return SimpleNamespace(
                total=real.total, used=real.used, free=real.free if not _saved(tmp_path, 4) else 1000
            )

        with monkeypatch.context() as disk:
            disk.setattr(checkpoint.shutil, "disk_usage", full)
            yield
        return
    resource = pytest.importorskip("resource", reason="the limit on the size of a file is POSIX's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    check = checkpoint.check_space

    def last_check(folder, needed):
        check(folder, needed)
        if _saved(tmp_path, 4):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with monkeypatch.context() as disk:
            disk.setattr(checkpoint, "check_space", last_check)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_torch_says_of_a_full_disk_becomes_one_sentence(tmp_path):
    def save_too_much():
        with checkpoint.written_whole(tmp_path / "checkpoint-1", writes=True) as aside:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
            torch.save({"a": torch.zeros(100, 100)}, aside / "x.pt")  # a RuntimeError of "unexpected pos"

    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"checkpoint-1 was not written \(.* are free\)"):
            save_too_much()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def _saved(tmp_path, step):
    return any((tmp_path / "runs").glob(f"*/checkpoint-{step}"))


@pytest.mark.parametrize("zero3", [False, True])
def test_parts_of_zero_3_are_not_those_of_the_stages_below(tmp_path, zero3):
    parts = tmp_path / "global_step7"
    parts.mkdir()
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
        (parts / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
        (parts / ("zero_pp_rank_" * zero3 + f"{rank}_" * zero3 + "mp_rank_00_model_states.pt")).touch()
    checkpoint.check_same_ranks(tmp_path, 2, sharded=True, zero3=zero3)
    with pytest.raises(CheckpointError, match="under ZeRO-3, and" if zero3 else "below ZeRO-3, and"):
        checkpoint.check_same_ranks(tmp_path, 2, sharded=True, zero3=not zero3)
