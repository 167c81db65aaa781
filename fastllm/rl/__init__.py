"""Losses and rewards of reinforcement learning from human feedback, composed from fastllm.ops."""

from fastllm.rl.ppo import PPOLoss, ppo_loss

__all__ = ["PPOLoss", "ppo_loss"]
