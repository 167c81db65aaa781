"""Keeping the policy near where it was: the coefficient of the KL penalty, and when to leave a batch."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm.ops import _check
from fastllm.rl._masked import device_of_ranks, sum_over_ranks


class AdaptiveKL:
    """A KL coefficient that steers towards a target (Ziegler et al., arXiv 1909.08593, 2.2).

    ``value ← value * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon)``

    Args:
        init: the first value, > 0. target: KL of a sequence, in nats, > 0. horizon: samples over which it adapts, > 0.

    Raises:
        TypeError, ValueError: an argument is not a positive number.
    """

    def __init__(self, init: float = 0.2, target: float = 6.0, horizon: float = 10000) -> None:
        for name, number in (("init", init), ("target", target), ("horizon", horizon)):
            _check.in_range(name, number, 0.0, open_low=True)
        self.value, self.target, self.horizon = float(init), float(target), float(horizon)

    def update(self, kl: Tensor | float, n: int) -> float:
        """The new value after `n` more samples whose KL was `kl`.

        Ranks that are given different numbers drift apart: reduce `kl` over them first and count `n` over all. A tensor is read
        on the host.

        Raises:
            TypeError: kl or n is no number. ValueError: kl is NaN or has several elements, n is negative, or so large against the
            horizon that the value would fall to 0 or below. The value stays as it was.
        """
        _is_scalar("kl", kl)
        kl = float(kl)
        if math.isnan(kl):
            raise ValueError("kl must be a number, got nan")
        _check.in_range("n", n, 0)
        factor = 1 + min(max(kl / self.target - 1, -0.2), 0.2) * n / self.horizon
        if factor <= 0:
            raise ValueError(
                f"n must be less than 5 * horizon = {5 * self.horizon:g} for value to stay above 0, got {n}"
            )
        self.value *= factor
        return self.value

    def __repr__(self) -> str:
        return f"AdaptiveKL(value={self.value:g}, target={self.target:g}, horizon={self.horizon:g})"

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "target": self.target, "horizon": self.horizon}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        names = ("value", "target", "horizon")
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"state must hold {', '.join(names)}, got none for {', '.join(missing)}")
        self.value, self.target, self.horizon = (float(state[name]) for name in names)


def should_stop(
    policy_kl: Tensor | float,
    target_kl: float | None,
    *,
    count: Tensor | float = 1.0,
    group: dist.ProcessGroup | None = None,
) -> bool:
    """Whether the policy has left the one that sampled: ``policy_kl > 1.5 * target_kl``, the same answer on every rank.

    With True, drop the mini-batch's gradients and go on to the next rollout (OpenAI's Spinning Up, PPO). Under
    torch.distributed the KL is averaged over the ranks by one all-reduce, and every rank has to call.

    Args:
        policy_kl: 0-d, ``masked_mean(old_logprobs - logprobs)``: `approx_kl` of the loss's stats.
        target_kl: > 0; None: never stops, on any rank, without communication.
        count: how many tokens policy_kl is the mean of, for ranks with unequal numbers of them.
        group: of ranks; None: the default one.

    Returns:
        A bool, which a GPU is waited for. True for a KL of NaN: no step should follow that.

    Raises:
        TypeError, ValueError: policy_kl or count has more than one element, count is a negative number, or target_kl is not
            positive.
    """
    _is_scalar("policy_kl", policy_kl)
    _is_scalar("count", count)
    if not isinstance(count, Tensor):
        _check.in_range("count", count, 0.0)
    if target_kl is None:
        return False
    _check.in_range("target_kl", target_kl, 0.0, open_low=True)
    device = policy_kl.device if isinstance(policy_kl, Tensor) else device_of_ranks(group)
    kl, weight = (
        torch.as_tensor(v, dtype=torch.float32, device=device).detach().reshape(()) for v in (policy_kl, count)
    )
    total, weight = sum_over_ranks(torch.stack([kl.where(weight != 0, 0.0) * weight, weight]), group).tolist()
    return not total <= 1.5 * target_kl * weight


def _is_scalar(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor with one element, got {type(value).__name__}")
