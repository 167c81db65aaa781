"""What one of several processes meets, all act upon: each test plays the second process by what it would have told the first."""

import shutil

import pytest
import torch

from fastllm import CheckpointError, ConfigError, DataError, cli
from fastllm.train import checkpoint, command, config, folder, together
from fastllm.train.online import reward, state
from fastllm.train.online.update import _Stats

from .conftest import trained

pytest.importorskip("transformers")


@pytest.fixture
def other(monkeypatch):
    """other(value): the second process tells `value` wherever processes tell each other something."""
    return lambda value: monkeypatch.setattr(together, "everywhere", lambda mine: [mine, value])


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"max_steps": 9}, "max_steps is 4 in process 0"),
        ({"eval_data": "v", "eval_steps": 2}, "eval_data is not given in process 0"),
        ({"resume_from_checkpoint": "latest"}, "and given in process 1 (other)"),
    ],
)
def test_processes_that_would_wait_for_each_other_in_vain_do_not_begin(settings, monkeypatch, theirs, message):
    others = []
    with monkeypatch.context() as alone:
        alone.setattr(folder, "_check_same", others.append)
        folder.check_settings(config.parse({**settings, **theirs, "output_dir": "elsewhere"}))
        folder.check_settings(config.parse(settings))
    said = []
    for theirs_told in others:
        monkeypatch.setattr(together, "everywhere", lambda mine, them=theirs_told: [mine, ("other", them)])
        try:
            folder.check_settings(config.parse(settings))
        except ConfigError as error:
            said.append(str(error))
    (one,) = said
    assert message in one


def test_a_reward_that_fails_in_one_process_ends_all(other):
    other(DataError("reward f failed: KeyError: 'answer'"))
    with pytest.raises(DataError, match="KeyError"):
        reward.ask(lambda prompts, responses, rows: [0.0], "f", ["p"], ["r"], [{}])


def test_the_largest_ratio_is_that_of_all_processes_and_nan_where_one_has_it(other):
    class Engine:
        world = 2

        def sum(self, x):
            return 2 * x

    stats = _Stats()
    stats.add({"policy_loss": torch.tensor(1.0), "ratio_max": torch.tensor(1.5)})
    stats.updated(1.0)
    for told in (7.0, float("nan")):
        other(told)
        assert str(stats.means(Engine())["ratio_max"]) == str(told)


def test_a_checkpoint_that_is_torn_for_one_process_is_refused_by_all_before_any_goes_on(settings, other):
    run, _, _ = trained(settings, max_steps=2)
    asked = []
    run.course.engine.load = asked.append
    other(CheckpointError("process-1.pt cannot be read: it is torn"))
    with pytest.raises(CheckpointError, match="process-1"):
        state.load(run.course, run.folder / "checkpoint-2")
    assert not asked


def test_each_process_tells_what_it_alone_knows_and_the_first_what_all_know(monkeypatch, capsys, tmp_path):
    def saves_and(error):
        with checkpoint.written_whole(tmp_path / "checkpoint-1", writes=True):
            raise error

    full, gone = (
        OSError(28, "No space left on device"),
        RuntimeError("[gloo/pair.cc:5] Connection closed by peer [::1]:5"),
    )
    ended = ": another process of the run has ended; what it or the launcher says tells why"
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.socket, "gethostname", lambda: "node")
    monkeypatch.setattr(command, "prepare", lambda *_: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, (error, fails), said, waits in (
        ("1", (full, saves_and), "process 1 on node: checkpoint-1 was not written (No space left on device; ", 0),
        ("1", (full, _raised), "process 1 on node: [Errno 28] No space left on device", 0),
        ("0", (gone, saves_and), f"process 0 on node{ended}", 0),
        ("1", (gone, _raised), f"process 1 on node{ended}", 0),
        ("0", (CheckpointError("torn"), _raised), "torn", 0),
        ("1", (CheckpointError("torn"), _raised), "process 1 on node: torn", 1),  # the launcher has ended it by then
    ):
        waited.clear()
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setattr(command, "finish", lambda *_, fails=fails, error=error, **__: fails(error))
        assert cli.main(["train", "x.yaml"]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"fastllm train: error: {said}")
        assert len(waited) == waits


def _raised(error):
    raise error


def test_a_folder_does_not_stay_where_the_optimizer_cannot_be_made(settings, monkeypatch, tmp_path):
    from fastllm.train.online import engines

    def out_of_memory(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as small:
        small.setattr(engines, "make", out_of_memory)
        with pytest.raises(RuntimeError):
            trained(settings)
    assert not list((tmp_path / "runs").iterdir())
    run, _, _ = trained(settings, max_steps=2)
    shutil.rmtree(run.folder / "final")
    with monkeypatch.context() as small:
        small.setattr(engines, "make", out_of_memory)
        with pytest.raises(RuntimeError):
            trained(settings, resume_from_checkpoint=str(run.folder))
    assert (run.folder / "checkpoint-2").is_dir()
