"""A head whose weights ZeRO-3 partitions, given as a module, trains by linear_ppo_loss as by its logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="the ZeRO claim needs DeepSpeed; the dev extra installs it")
pytest.importorskip("peft", reason="the claim on adapters needs PEFT; the dev extra installs it")


@pytest.mark.slow
def test_a_partitioned_head_trains_as_by_its_logits_with_and_without_adapters():
    launcher = Path(sys.executable).parent / "deepspeed"
    worker = Path(__file__).parent / "zero3_worker.py"
    root = Path(__file__).parents[2]
    environment = {
        **os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0",
        "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}", "PATH": f"{launcher.parent}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        [str(launcher), "--num_accelerators", "2", "--master_port", str(30500 + os.getpid() % 1000), str(worker)],
        env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    lines = [line.split("RESULT ", 1)[1] for line in done.stdout.splitlines() if "RESULT " in line]
    results = [json.loads(line) for line in lines]
    cases = {"token plain", "sequence lora"}
    assert {(r["case"], r["rank"]) for r in results} == {(c, r) for c in cases for r in (0, 1)}, (
        done.stdout + done.stderr
    )
    for result in results:
        assert len(set(result["logits"])) == 3, "the weights have to move for this to mean anything"
        assert result["linear"] == pytest.approx(result["logits"], rel=1e-5), result["case"]
