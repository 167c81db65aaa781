"""What is done to advantages and rewards before the loss: whitening, baselines of a group, how good the values were."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm.ops import _check
from fastllm.rl._masked import check_tokens, kept, masked_mean, sum_over_ranks, wide

GROUP_KINDS = ("grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline")


def whiten(
    x: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    unbiased: bool = False,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """``(x - mean) * rsqrt(var + 1e-8)`` with mean and variance over valid tokens.

    Args:
        x: floating-point, any shape. mask: bool, the same shape.
        shift_mean: False: the mean is added back, only the scale changes.
        unbiased: divide the squares by n - 1, as TRL and verl do; otherwise by n.
        distributed: mean and variance over the tokens of all ranks of `group` (None: the default group), by one all-reduce of
            three numbers. Every rank has to call. Without torch.distributed: this process alone.

    Returns:
        x's shape, fp32 (fp64 for fp64), 0 at masked tokens, without a gradient.

    Raises:
        TypeError: mask is not bool or x not floating-point. ValueError: shapes or devices do not match.
    """
    check_tokens(mask, x=x)
    with torch.no_grad():
        values = kept(x, mask).double()
        mean, variance = _moments(values, mask, unbiased, distributed, group)
        whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
        return kept(whitened if shift_mean else whitened + mean, mask).to(wide(x).dtype)


def _moments(
    values: Tensor, mask: Tensor, unbiased: bool, distributed: bool, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Mean and variance over valid tokens of fp64 values that are 0 elsewhere."""
    if distributed:
        count, total, squares = sum_over_ranks(
            torch.stack([mask.sum().double(), values.sum(), values.square().sum()]), group
        )
        mean = total / count.clamp(min=1)
        squares = (squares - count * mean.square()).clamp(min=0)
    else:
        count = mask.sum()
        mean = values.sum() / count.clamp(min=1)
        squares = kept(values - mean, mask).square().sum()
    return mean, squares / (count - 1 if unbiased else count).clamp(min=1)


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    kind: str = "grpo",
    eps: float = 1e-4,
    unbiased: bool = False,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Advantages of sequences against the other samples of their prompt.

    | kind | advantage of reward R in its group of G | source |
    |---|---|---|
    | "grpo" | (R - mean) / (std + eps) | arXiv 2402.03300, eq. 3 and 4.1.2 |
    | "dr_grpo" | R - mean | arXiv 2503.20783, 3.2 |
    | "rloo" | (R - mean) * G / (G - 1), that is R less the mean of the others | arXiv 2402.14740, 2.3 |
    | "reinforce++" | R whitened over the whole batch | arXiv 2501.03262 |
    | "reinforce++-baseline" | R - mean, whitened over the whole batch | arXiv 2501.03262 |

    A group of equal rewards gets 0, exactly (under "reinforce++": a batch of equal rewards).

    Args:
        rewards: (N,) floating-point; each `group_size` consecutive ones belong to one prompt.
        eps: added to the standard deviation of "grpo".
        unbiased: divide the squares by G - 1 (N - 1 for the whitened kinds), as TRL and verl do; otherwise by G (N).
        distributed, group: as in ``whiten``, for the whitened kinds; the others never look beyond a group.

    Returns:
        (N,) fp32 (fp64 for fp64), without a gradient; ``.unsqueeze(-1).expand(-1, T)`` makes them those of tokens.

    Raises:
        TypeError: rewards is not floating-point, or group_size not an integer.
        ValueError: an unknown kind, a group size that does not divide N or is below 1 (2 for "rloo"), a negative eps.
    """
    _check.is_floating("rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape (N,), got {tuple(rewards.shape)}")
    _check.one_of("kind", kind, GROUP_KINDS)
    _check.is_count("group_size", group_size, 2 if kind == "rloo" else 1)
    if rewards.shape[0] % group_size:
        raise ValueError(f"group_size must divide the number of rewards ({rewards.shape[0]}), got {group_size}")
    _check.in_range("eps", eps, 0.0)
    with torch.no_grad():
        each = torch.ones_like(rewards, dtype=torch.bool)
        if kind == "reinforce++":
            r = rewards.double()
            r = r if distributed else r - r[:1]  # so that equal rewards have a mean of exactly 0
            return whiten(r, each, unbiased=unbiased, distributed=distributed, group=group).to(wide(rewards).dtype)
        r = wide(rewards).view(-1, group_size)
        r = r - r[:, :1]  # as above
        centred = r - r.mean(-1, keepdim=True)
        if kind == "grpo":
            squares = centred.square().sum(-1, keepdim=True)
            centred = centred / ((squares / max(1, group_size - unbiased)).sqrt() + eps)
        elif kind == "rloo":
            centred = centred * (group_size / (group_size - 1))
        elif kind == "reinforce++-baseline":
            _, variance = _moments(centred.view(-1).double(), each, unbiased, distributed, group)
            centred = centred * torch.rsqrt(variance + 1e-8).to(centred.dtype)
        return centred.view(-1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - Var(returns - values) / Var(returns)`` over valid tokens: 1 for perfect values, 0 for a constant.

    Args:
        values, returns: floating-point, any shape. mask: bool, the same shape.

    Returns:
        0-d, fp32 (fp64 for fp64), without a gradient; 0 where the returns do not vary.

    Raises:
        TypeError: mask is not bool, or values or returns not floating-point. ValueError: shapes or devices do not match.
    """
    check_tokens(mask, values=values, returns=returns)
    with torch.no_grad():
        target = kept(returns, mask)
        total = _variance(target, mask)
        ratio = _variance(target - kept(values, mask), mask) / total.where(total > 0, 1.0)
        return (1 - ratio).where(total > 0, 0.0)


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)).square(), mask)
