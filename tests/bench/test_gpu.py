import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, tiles
from bench.__main__ import OTHERS


def stage(name, code, seconds=20.0):
    return gpu.Stage(name, [sys.executable, "-c", textwrap.dedent(code)], seconds)


def recorded(folder):
    return [(s["name"], s["status"]) for s in json.loads((folder / "gpu.json").read_text())["stages"]]


def test_a_failing_stage_stops_no_other_and_makes_the_exit_code(tmp_path, capfd):
    plan = [stage("first", "print('hello')"), stage("second", "import sys; sys.exit(3)"), stage("third", "")]
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)], plan) == 1
    assert recorded(tmp_path) == [("first", "ok"), ("second", "failed"), ("third", "ok")]
    said = capfd.readouterr().out
    assert "hello" in said
    assert "second     failed" in said
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path)], plan[:1]) == 0


def test_a_hanging_stage_is_ended_with_its_children(tmp_path):
    child = tmp_path / "child"
    code = f"""
        import subprocess, sys, time
        made = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(child)!r}, "w").write(str(made.pid))
        time.sleep(60)
    """
    begin = time.monotonic()
    done = gpu.run([stage("hangs", code, 2.0), stage("next", "")], tmp_path, 60)
    assert time.monotonic() - begin < 15
    assert [d.status for d in done] == ["out of time", "ok"]
    time.sleep(0.2)
    status = Path("/proc") / child.read_text() / "stat"
    assert not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_all_of_it_ends_when_its_time_is_up(tmp_path):
    done = gpu.run([stage("long", "import time; time.sleep(60)"), stage("never", "")], tmp_path, 2)
    assert [d.status for d in done] == ["out of time", "no time left"]
    kept = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert [stage["status"] for stage in kept] == ["out of time", "no time left"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_there_is(tmp_path, number):
    code = f"""
        import sys
        from pathlib import Path
        from bench import gpu
        slow = gpu.Stage("slow", [sys.executable, "-c", "import time; print('slow', flush=True); time.sleep(60)"], 60)
        plan = [gpu.Stage("quick", [sys.executable, "-c", ""], 20), slow, slow]
        sys.exit(gpu.main(["--device", "cpu", "--out", {str(tmp_path)!r}], plan))
    """
    process = subprocess.Popen([sys.executable, "-u", "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.strip() == "slow":
            break
    os.kill(process.pid, number)
    assert process.wait(20) == 130
    assert recorded(tmp_path) == [("quick", "ok"), ("slow", "interrupted"), ("slow", "interrupted")]


def test_without_a_gpu_it_says_so(tmp_path, capsys, monkeypatch):
    if not torch.cuda.is_available():
        assert gpu.main(["--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith("python -m bench gpu: error: torch ")
        assert tiles.main([]) == 0
    (tmp_path / "file").write_text("")
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "file" / "below")], []) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert {"gpu", "tiles"} <= set(OTHERS)


def test_the_plan_is_of_commands_that_are_there(tmp_path):
    plan = gpu.stages("cuda", tmp_path, False)
    assert sum(s.seconds for s in plan) <= 600
    assert plan[0].environment == {"FASTLLM_BUILD_CUDA": "1"}
    for one in plan[2:]:
        assert one.command[1:3] == ["-m", "bench"]
        assert subprocess.run([*one.command[:4], "-h"], capture_output=True, cwd=gpu.ROOT).returncode == 0
