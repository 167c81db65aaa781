"""Losses and rewards of reinforcement learning from human feedback, composed from fastllm.ops."""

from fastllm.rl.advantages import explained_variance, group_advantages, whiten
from fastllm.rl.control import AdaptiveKL, should_stop
from fastllm.rl.linear import linear_logprobs, linear_ppo_loss, linear_sequence_logprobs, sequence_logprobs
from fastllm.rl.linear_preference import linear_dpo_loss, linear_kto_loss, linear_orpo_loss, linear_simpo_loss
from fastllm.rl.ppo import PPOLoss, ppo_loss
from fastllm.rl.preference import PreferenceLoss, dpo_loss, kto_loss, orpo_loss, reward_loss, simpo_loss
from fastllm.rl.rewards import sequence_scores, token_rewards

__all__ = [
    "AdaptiveKL",
    "PPOLoss",
    "PreferenceLoss",
    "dpo_loss",
    "explained_variance",
    "group_advantages",
    "kto_loss",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_logprobs",
    "linear_orpo_loss",
    "linear_ppo_loss",
    "linear_sequence_logprobs",
    "linear_simpo_loss",
    "orpo_loss",
    "ppo_loss",
    "reward_loss",
    "sequence_logprobs",
    "sequence_scores",
    "should_stop",
    "simpo_loss",
    "token_rewards",
    "whiten",
]
