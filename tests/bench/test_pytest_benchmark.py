"""``pytest bench/ --benchmark-only`` runs the cases of the suites."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("TRITON_INTERPRET", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")


def test_a_case_is_timed_checked_and_named(tmp_path):
    out = tmp_path / "out.json"
    chosen = ["-k", "rms_norm and 16x4096 and cpu and (fastllm or eager)"]
    command = [sys.executable, "-m", "pytest", "bench/", "--benchmark-only", f"--benchmark-json={out}", *chosen]
    environment = {name: value for name, value in os.environ.items() if name not in OTHERS}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = json.loads(out.read_text())["benchmarks"]
    assert {run["group"] for run in found} == {"rms_norm 16x4096 bf16 forward cpu"}
    assert len(found) == 2
    assert all(run["stats"]["rounds"] == 20 and run["extra_info"]["torch"] for run in found)
