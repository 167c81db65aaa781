"""``python -m bench trainer``: a run that makes a step when told to, and the page of what was measured."""

import os
import sys

import pytest

from bench import trainer, trainer_page

from .rows import MACHINE

pytest.importorskip("datasets")

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 300,
}


def test_steps_are_made_one_by_one_and_their_parts_fit_into_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stderr)  # put back afterwards
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    rows = [{"prompt": "a" * (5 + 3 * n), "response": "b" * 9} for n in range(12)]
    settings = {"stage": "sft", "max_length": 64, "per_device_train_batch_size": 4, "optim": "sgd"}
    found = {}
    for packing in (False, True):
        run = trainer.Stepped(tmp_path / str(packing), SHAPE, rows, 3, {**settings, "packing": packing})
        steps = [run.step() for _ in range(3)]
        for step in steps:
            own = step["whole"] - step["forward"] - step["backward"] - step["optimizer"]
            assert 0 < own < step["whole"]
            assert min(step["forward"], step["backward"], step["optimizer"]) > 0
        found[packing] = sum(step["positions"] for step in steps) / sum(step["tokens"] for step in steps)
    assert found[True] == 1 < 1.1 < found[False]  # packing lowers the positions of a real token


def test_a_run_that_fails_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setenv("DS_ACCELERATOR", os.environ.get("DS_ACCELERATOR", "cpu"))
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    settings = {"stage": "pretrain", "max_length": 16, "optim": "sgd", "per_device_train_batch_size": 1}
    run = trainer.Stepped(tmp_path / "x", SHAPE, [{"text": "abc" * 9}] * 4, 2, settings)
    run.step()
    run.run.trainer.train_dataset = None
    run.run.trainer.model.forward = lambda **_: 1 / 0
    with pytest.raises(RuntimeError, match="division by zero"):
        run.step()


def test_the_page_has_a_line_for_each_contestant():
    parts = {"forward": 1.0, "backward": 0.8, "optimizer": 0.1, "positions": 100.0}
    record = {
        "suite": "trainer", "machine": MACHINE,
        "overhead": {
            "case": "llama", "steps": 2, "machine": MACHINE, "own_share": {trainer.PATCHED: [0.05, 0.05]},
            "seconds": {"bare loop, unpatched": [4.0, 4.0], "bare loop, patched": [2.0, 2.0], trainer.UNPATCHED: [4.2, 4.2],
                        trainer.PATCHED: [2.0, 2.0]},
        },
        "packing": {
            "case": "llama", "steps": 1, "machine": MACHINE, "capacity": 64, "lengths": {"mean": 9, "quartiles": [4, 12], "longest": 20},
            "parts": {"padded": [{**parts, "whole": 2.0, "tokens": 40.0}], "packed": [{**parts, "whole": 2.0, "tokens": 100.0}]},
        },
    }  # fmt: skip
    page = trainer_page.page(record)
    assert "| fastllm train, patched | 2.00 | 2.00–2.00 | 2.10× | 5.00% | 100.0 |" in page
    assert "| packed | 50 | 2.50× | 100% |" in page
    assert "| padded | 20 | 1.00× | 40% |" in page


def test_a_plot_is_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        trainer.main(["--plot", "x"])
    assert stopped.value.code == 2
    assert "nothing to draw" in capsys.readouterr().err
