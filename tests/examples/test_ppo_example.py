"""docs/ppo_example.py, shortened."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_reward_rises():
    spec = importlib.util.spec_from_file_location("ppo_example", ROOT / "docs" / "ppo_example.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    history = example.train(seconds=200.0, batches=30)
    first, last = (sum(part) / len(part) for part in (history[:5], history[-5:]))
    assert first < 0.2, "chance is 0.1"
    assert last > first + 0.25, history
