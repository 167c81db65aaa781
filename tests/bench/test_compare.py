"""The gate: a slow-down shows whatever the machine, noise does not."""

import json

import pytest

from bench import compare
from tests.bench.rows import row, steps, wrong

OLD = [row(fastllm=2.0, eager=6.0, torch_compile=3.0), row("swiglu", fastllm=1.0, eager=4.0)]


def run(tmp_path, old, new):
    paths = []
    for name, rows in (("old", old), ("new", new)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(rows if isinstance(rows, str) else json.dumps(rows))
    try:
        return compare.main([str(path) for path in paths])
    except SystemExit as stopped:
        return stopped.code


def verdicts(old, new):
    return {(change.peer, change.verdict) for change in compare.compare(old, new)}


def test_a_run_equals_itself_and_the_same_on_a_machine_three_times_as_slow(tmp_path, capsys):
    assert run(tmp_path, OLD, OLD) == 0
    slow = [row(fastllm=6.0, eager=18.0, torch_compile=9.0), row("swiglu", fastllm=3.0, eager=12.0)]
    assert run(tmp_path, OLD, slow) == 0
    assert "2 rows: 0 failed, 0 faster" in capsys.readouterr().out


def test_a_slow_down_of_ours_fails_against_the_best_peer_and_eager(tmp_path, capsys):
    new = row(fastllm=2.4, eager=6.0, torch_compile=3.0)
    assert verdicts(OLD[0], new) == {("torch.compile", "slower"), ("eager", "slower")}
    assert run(tmp_path, OLD, [new, OLD[1]]) == 1
    said = capsys.readouterr().out
    assert "slower" in said
    assert "-17%" in said
    assert "1.50× (1.44–1.56)" in said
    assert "2 rows: 1 failed" in said


def test_a_peer_that_itself_changed_is_told(tmp_path, capsys):
    assert run(tmp_path, [row(fastllm=2.0, eager=6.0)], [row(fastllm=2.0, eager=9.0)]) == 0
    assert capsys.readouterr().out.split().count("+50%") == 2


def test_a_speed_up_passes(tmp_path, capsys):
    assert run(tmp_path, OLD, [row(fastllm=1.5, eager=6.0, torch_compile=3.0), OLD[1]]) == 0
    assert "2 rows: 0 failed, 1 faster" in capsys.readouterr().out


@pytest.mark.parametrize("noisy", ["old", "new"])
def test_the_same_slow_down_within_the_quartiles_of_either_run_is_noise(noisy):
    spread = {"old": 0.02, "new": 0.02}
    old, new = ({"fastllm": ms, "eager": 6.0} for ms in (2.0, 2.4))
    assert verdicts(row(**old, spread=spread["old"]), row(**new, spread=spread["new"])) == {("eager", "slower")}
    spread[noisy] = 0.15
    assert verdicts(row(**old, spread=spread["old"]), row(**new, spread=spread["new"])) == {("eager", "same")}


def test_a_change_too_small_for_any_run_to_tell_is_none():
    assert verdicts(row(fastllm=2.0, eager=6.0, spread=0.001), row(fastllm=2.03, eager=6.0, spread=0.001)) == {
        ("eager", "same")
    }


def test_a_peer_of_one_run_alone_is_not_compared_with():
    new = row(fastllm=2.0, eager=6.0, missing=("torch.compile",))
    assert verdicts(OLD[0], new) == {("eager", "same")}
    assert verdicts(OLD[0], row(fastllm=2.0, missing=("eager",))) == {("", "no common peer")}


@pytest.mark.parametrize(
    ("new", "verdict"),
    [
        ([OLD[1]], "vanished"),
        ([wrong(OLD[0]), OLD[1]], "WRONG"),
        ([OLD[0] | {"contestants": [{"name": "fastllm", "missing": "no kernel"}]}, OLD[1]], "failed"),
        ([row(fastllm=2.0, other=3.0), OLD[1]], "no common peer"),
    ],
)
def test_a_row_that_can_no_longer_be_vouched_for_fails(new, verdict, tmp_path, capsys):
    assert run(tmp_path, OLD, new) == 1
    assert verdict in capsys.readouterr().out


def test_a_row_that_was_wrong_before_or_is_new_fails_nothing(tmp_path, capsys):
    assert run(tmp_path, [wrong(OLD[0]), OLD[1]], [*OLD, row("geglu", fastllm=1.0, eager=2.0)]) == 0
    assert "1 are new" in capsys.readouterr().out


def test_training_steps_are_compared_too(tmp_path):
    assert run(tmp_path, steps(), steps()) == 0
    assert run(tmp_path, steps(), steps(patched=3.0)) == 1
    assert run(tmp_path, steps(), steps(patched=1.5)) == 0


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (OLD, "not json", "new.json holds no rows of a suite"),
        ('{"rows": 1}', OLD, "old.json holds no rows"),
        (OLD, "[]", "new.json holds no rows"),
        ("[1]", OLD, "old.json holds no rows"),
        (OLD, [row("geglu", fastllm=1.0, eager=2.0)], "no case in common"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_exit_code_2(old, new, named, tmp_path, capsys):
    assert run(tmp_path, old, new) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert named in said.err
    assert len(said.err.splitlines()) == 1


def test_a_file_that_is_not_there_is_one_line_and_exit_code_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(tmp_path / "absent.json"), str(tmp_path / "absent.json")])
    assert stopped.value.code == 2
    assert "absent.json: No such file" in capsys.readouterr().err
