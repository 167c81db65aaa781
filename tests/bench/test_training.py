"""Trainers in processes of their own: the same losses from the same seed, and failures that are told."""

import os
from functools import partial

import pytest
import torch

from bench import training
from bench.device import Cpu

pytest.importorskip("transformers")
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
}


def batch(step):
    return torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(step))


def build(kind):
    return training.Trainer(kind, SHAPE, torch.float32, batch, partial(torch.optim.SGD, momentum=0.9), lambda step: 0.1)


def test_patched_training_is_the_same_training():
    losses = {}
    for kind in ("unpatched", "patched"):
        trainer = build(kind)
        losses[kind] = [step.loss for step in trainer.steps(8)]
        assert bool(trainer.describe()["report"]) == (kind == "patched")
    torch.testing.assert_close(losses["patched"], losses["unpatched"], rtol=1e-4, atol=1e-4)
    assert len(set(losses["patched"])) == 8


def test_memory_of_a_step_holds_weights_and_optimizer_state():
    trainer = build("unpatched")
    trainer.steps(1)
    weights = sum(p.nbytes for p in trainer.model.parameters())
    peak = trainer.measured_step()
    assert peak is None or peak >= 2 * weights


@pytest.mark.skipif(Cpu().reset_peak() is None, reason="the system tells no peak memory")
def test_the_peak_of_a_run_counts_what_is_kept_between_steps():
    trainer = build("unpatched")
    trainer.steps(1)
    before, in_a_step = trainer.describe()["peak_over_built"], trainer.measured_step()
    kept = torch.ones(32 << 20)  # 128 MiB that stay
    assert trainer.describe()["peak_over_built"] - before > 100 << 20
    assert abs(trainer.measured_step() - in_a_step) < 50 << 20
    del kept
    assert trainer.describe()["peak_over_built"] - before > 100 << 20  # a peak stays, also over measured steps


class Worker:
    def __init__(self, kind):
        self.kind = kind

    def process(self):
        return self.kind, os.getpid()

    def fail(self):
        raise ValueError(f"{self.kind} cannot")

    def die(self):
        os._exit(3)


def test_workers_have_processes_of_their_own_and_tell_what_went_wrong():
    with training.taking_turns(Worker, ("a", "b")) as workers:
        found = {name: worker.call("process") for name, worker in workers.items()}
        assert {kind for kind, _ in found.values()} == {"a", "b"}
        assert len({pid for _, pid in found.values()} | {os.getpid()}) == 3
        with pytest.raises(RuntimeError, match="ValueError: a cannot"):
            workers["a"].call("fail")
        with pytest.raises(RuntimeError, match="exit code 3"):
            workers["b"].call("die")
        assert workers["a"].call("process") == found["a"]
