"""Stage ppo on a reward that anyone can check, the share of digits in the answer."""

import math

import pytest

from .conftest import trained

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "more",
    [
        {"advantage": "gae"},
        {"advantage": "gae", "preset": "ppo_max", "critic_warmup_steps": 2, "ptx_coef": 0, "kl_coef": 0.002},
        {"advantage": "grpo", "kl_loss_coef": 0.001},
        {"advantage": "rloo"},
        {"advantage": "dr_grpo", "aggregation": "token-sum-norm"},
        {"advantage": "reinforce++"},
    ],
    ids=["gae", "ppo_max", "grpo", "rloo", "dr_grpo", "reinforce++"],
)
def test_the_reward_rises(settings, more):
    settings = {**settings, "rollout_batch_size": 32, "per_device_train_batch_size": 16, "max_steps": 14, **more}
    if more["advantage"] == "dr_grpo":
        settings.pop("kl_coef")
    _, result, log = trained(settings, save_strategy="no")
    rewards = [line["reward"] for line in log]
    assert sum(rewards[-3:]) / 3 > 0.15 + sum(rewards[:3]) / 3
    assert result.last_reward == rewards[-1]
    assert all(math.isfinite(value) for line in log for value in line.values())
