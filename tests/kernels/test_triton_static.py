"""Every shipped Triton kernel compiles for every chip, spills nothing and fits its shared memory. No GPU is needed.

The check runs in a process of its own: this one has triton in interpreter mode, where nothing is compiled.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}


def run(module, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )


def test_shipped_kernels_compile_for_every_chip_without_a_spill():
    done = run("bench.static", "--json")
    assert done.stdout, done.stderr
    rows = json.loads(done.stdout)
    assert [row for row in rows if row["faults"]] == []
    assert done.returncode == 0
    assert {row["target"] for row in rows} == TARGETS
    assert len({row["kernel"] for row in rows}) * len(TARGETS) == len(rows), "two configurations share a label"
    assert {row["kernel"].split()[0] for row in rows} >= {"rms_norm"}


def test_a_kernel_that_spills_is_reported_and_fails():
    done = run("tests.kernels.spilling", "--json")
    assert done.returncode == 1, done.stderr
    rows = json.loads(done.stdout)
    assert {row["target"] for row in rows} == TARGETS
    assert all(row["spilled_bytes"] > 0 for row in rows)
    assert all("spills" in row["faults"][0] for row in rows)


def test_wrong_calls_say_what_is_wrong():
    done = run("bench.static", "--match", "no such kernel")
    assert done.returncode == 2
    assert "no kernel's label contains 'no such kernel'" in done.stderr
    interpreted = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "bench.static"], env=interpreted, capture_output=True, text=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr
