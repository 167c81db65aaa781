"""The demo: two sides in turn, their numbers reported as they are, failures told in one line."""

import json
import subprocess
import sys
import textwrap

import pytest

from bench import demo

# A side without a model: step n has loss 2 / n and takes 0.5 s unpatched, 0.25 s patched, the first block ten times that.
SIDE = """
import json, sys
steps, side = int(sys.argv[2]), sys.argv[4]
def say(message):
    print(json.dumps(message), flush=True)
say({"ready": True, "parameters": 10**6, "report": "patched what there was"})
done = 0
while done < steps:
    if not sys.stdin.readline():
        sys.exit(1)
    if FAILS == (side, done):
        sys.exit(7)
    count = min(10, steps - done)
    seconds = (0.5 if side == "unpatched" else 0.25) * (10 if done == 0 else 1)
    say({"losses": [2 / (done + n + 1) + APART * (side == "patched") for n in range(count)], "seconds": [seconds] * count})
    done += count
sys.stdin.readline()
say({"peak_mb": 400.0 if side == "unpatched" else 300.0, "perplexity": 3.5})
"""


def side(fails=None, apart=0.0):
    return [sys.executable, "-c", f"FAILS = {fails!r}\nAPART = {apart}\n{SIDE}"]


def words(runs):
    return demo.sentence(demo.summary(runs), runs["unpatched"]["losses"])


def test_known_numbers_are_reported_as_they_are(tmp_path, capsys):
    runs = demo.take_turns(45, side())
    found = demo.summary(runs)
    assert len(runs["patched"]["losses"]) == 45
    assert [len(block) for block in runs["patched"]["blocks"]] == [10, 10, 10, 10, 5]
    assert found["apart"] == 0
    assert found["rate"] == {"unpatched": 4096 / 0.5, "patched": 4096 / 0.25}  # the slow first block left out
    assert found["step"] == {"unpatched": 0.5, "patched": 0.25}
    assert (found["speedup"], found["memory"]) == (2, 0.75)
    demo.show(runs, tmp_path)
    said = capsys.readouterr().out
    for wanted in (
        "16,384",
        "8,192",
        "500 ms",
        "250 ms",
        "400 MB",
        "300 MB",
        "0.75 x",
        "3.5000",
        "patched what there was",
    ):
        assert wanted in said
    assert max(len(line) for line in said.replace(str(tmp_path), "").splitlines()) <= 120
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "demo.json").read_text())["runs"]["patched"]["peak_mb"] == 300


def test_the_sentence_follows_the_numbers():
    fast = demo.take_turns(50, side())
    assert "2.00 times as fast (2.00 to 2.00" in words(fast)
    assert "rounding, not training" in words(fast)
    swapped = {"unpatched": fast["patched"], "patched": fast["unpatched"]}
    assert "0.50 times as fast" in words(swapped)
    assert "1.33 times the unpatched side's memory" in words(swapped)
    assert "No difference in speed" in words({s: fast["patched"] for s in demo.SIDES})
    assert "Too few steps" in words(demo.take_turns(10, side()))
    assert "more than rounding" in words(demo.take_turns(10, side(apart=0.01)))


@pytest.mark.parametrize("fails", [("unpatched", 0), ("patched", 10)])
def test_a_side_that_ends_early_is_told_and_takes_the_other_with_it(fails, monkeypatch):
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    with pytest.raises(RuntimeError, match="exit code 7"):
        demo.take_turns(30, side(fails))
    assert len(started) == 2
    assert all(process.returncode is not None for process in started)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "at least 1, got 0"),
        (["--steps", "many"], "many"),
        (["--out", "/dev/null/results"], "/dev/null/results"),
        (["--fast"], "--fast"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == ""
    assert named in said.err
    assert len(said.err.splitlines()) == 1


def test_memory_counts_from_what_is_resident_and_keeps_the_peak():
    """In a process of its own, whose peak no other test has set, started by one that has held more."""
    parents = bytearray(b"x") * (600 << 20)
    code = textwrap.dedent("""
        from bench import demo
        freed = bytearray(b"x") * (200 << 20)
        del freed
        before = demo.resident()
        held = bytearray(b"x") * (300 << 20)
        del held
        print((demo.peak_memory() - before) >> 20)
    """)
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    del parents
    if sys.platform == "linux":
        assert 290 <= grown <= 330


def test_a_side_ends_with_its_parent(monkeypatch):
    with open("/dev/null") as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(SystemExit):
            demo.await_turn()
