"""A patched model under DeepSpeed ZeRO-2 and ZeRO-3 on two CPU ranks trains as the unpatched one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="the ZeRO claim needs DeepSpeed; the dev extra installs it")


@pytest.mark.slow
def test_zero_2_and_3_train_alike_patched_before_and_after_initialize():
    launcher = Path(sys.executable).parent / "deepspeed"
    worker = Path(__file__).parent / "deepspeed_worker.py"
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{launcher.parent}:{os.environ['PATH']}",
        "TRITON_INTERPRET": "0",
    }
    done = subprocess.run(
        [str(launcher), "--num_accelerators", "2", "--master_port", str(29500 + os.getpid() % 1000), str(worker)],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    lines = [line.split("RESULT ", 1)[1] for line in done.stdout.splitlines() if "RESULT " in line]
    results = [json.loads(line) for line in lines]
    assert {(r["stage"], r["rank"]) for r in results} == {(2, 0), (2, 1), (3, 0), (3, 1)}, done.stdout + done.stderr
    for result in results:
        plain = result["losses"]["plain"]
        for when in ("before", "after"):
            assert result["losses"][when] == pytest.approx(plain, rel=1e-5), (result["stage"], when)
            assert result["counts"][when].get("rms_norm", 0) == 5, result["counts"]
