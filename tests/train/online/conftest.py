"""Settings of a PPO run that takes a second, and how it is run."""

import json

import pytest
import torch

from fastllm.train import config
from fastllm.train.online.run import Run


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are so small that a second thread waits more than it works."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(folder, write, tmp_path):
    return {
        "stage": "ppo", "model": str(folder), "data": str(write("prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(24)])),
        "reward": "fastllm.train.examples:share_of_digits", "output_dir": str(tmp_path / "runs"), "max_length": 64,
        "max_new_tokens": 8, "rollout_batch_size": 16, "rollout_chunk_size": 16, "per_device_train_batch_size": 8, "max_steps": 4,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "kl_coef": 0.002, "save_steps": 2, "seed": 3,
    }  # fmt: skip


def trained(settings, **more):
    """One run; its Run, its result and its log by iteration."""
    run = Run(config.parse({**settings, **more}))
    result = run.go()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return run, result, lines


TIMES = ("samples_per_s", "tgs", "step_s", "rollout_s", "score_s", "train_s", "peak_memory_gb")
RATES = ("tflops", "hardware_tflops", "rollout_tflops", "score_tflops", "train_tflops")


def timeless(lines):
    """A log without what the clock says."""
    return [{name: value for name, value in line.items() if name not in TIMES + RATES} for line in lines]
