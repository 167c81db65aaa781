"""Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16) over masked, padded or packed tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops._op import Op


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``A[t] = δ[t] + gamma * lam * (1 - done[t]) * A[t+1]``, ``δ[t] = r[t] + gamma * (1 - done[t]) * V[t+1] - V[t]``.

    t + 1 is the next valid token of the sequence; after the last one, V and A are 0. Tokens that `mask` leaves out, at the
    ends or in between (prompts, tool output, other speakers), are stepped over: the state passes them unchanged. Where a
    sequence was cut off, not ended, add ``gamma * value`` of the state after its last token to that token's reward.

    Args:
        rewards: (B, T), float32, bfloat16 or float16; float64 is served by the definition. (T,) is one sequence, or
            several with `cu_seqlens`.
        values: like rewards, in a dtype of their own: the value of the state before each token.
        gamma: discount, in [0, 1].
        lam: λ in [0, 1].
        mask: bool like rewards, True where a token counts; None: all. What stands elsewhere, NaN included, is not looked at.
        dones: like rewards, bool (or numbers, where all but 0 count as True): an episode ends with this token, and nothing
            is taken from those after it, not even a NaN.
        cu_seqlens: (sequences + 1,) int32, ascending from 0 to T: where sequences begin, for packed (T,) inputs.

    Returns:
        (advantages, returns) with returns = advantages + values, both like rewards in float32 (float64 if an input is), and
        0 where masked. Neither requires a gradient, whatever the inputs do.

    Raises:
        TypeError: rewards or values are not of floating point, mask is not bool, or cu_seqlens not int32.
        ValueError: shapes or devices do not match, gamma or lam lies outside [0, 1], or cu_seqlens does not ascend from 0 to
            T (checked on the CPU).
    """
    _check.is_floating("rewards", rewards)
    _check.is_floating("values", values)
    shape = rewards.shape
    if not 1 <= len(shape) <= 2:
        raise ValueError(f"rewards must have shape (B, T) or (T,), got {tuple(shape)}")
    if mask is not None:
        _check.is_mask("mask", mask)
    for name, given in (("values", values), ("mask", mask), ("dones", dones)):
        if given is not None:
            _check.is_tensor(name, given)
            if given.shape != shape or given.device != rewards.device:
                _check.has_shape(name, given, shape, "the shape of rewards")
                _check.same_device(name, given, "rewards", rewards)
    if dones is not None and dones.dtype != torch.bool:
        dones = dones != 0
    _check.in_range("gamma", gamma, 0.0, 1.0)
    _check.in_range("lam", lam, 0.0, 1.0)
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise ValueError(f"cu_seqlens is for packed tokens of shape (T,), got rewards of shape {tuple(shape)}")
        _check.is_cu_seqlens("cu_seqlens", cu_seqlens, "rewards", rewards)
    if values.dtype == torch.float64:
        rewards = rewards.double()
    if rewards.requires_grad or values.requires_grad:
        rewards, values = rewards.detach(), values.detach()
    return _gae(rewards, values, mask, dones, cu_seqlens, gamma, lam)


def _definition(
    rewards: Tensor, values: Tensor, mask: Tensor | None, dones: Tensor | None, cu_seqlens: Tensor | None, gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    rewards, values = rewards.to(dtype), values.to(dtype)
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    ends = torch.zeros_like(valid) if dones is None else dones
    first = torch.zeros(rewards.shape[-1] + 1, dtype=torch.bool, device=rewards.device)
    if cu_seqlens is not None:  # index t: sequences begin here
        first[cu_seqlens.long()] = True
    next_value = next_advantage = torch.zeros_like(rewards[..., :1]).sum(-1)
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[-1])):
        next_value, next_advantage = (x.masked_fill(first[t + 1], 0.0) for x in (next_value, next_advantage))
        # A factor of 0 takes nothing from what follows, not even a NaN.
        taken_value = next_value.masked_fill(ends[..., t] | (gamma == 0), 0.0)
        taken_advantage = next_advantage.masked_fill(ends[..., t] | (gamma * lam == 0), 0.0)
        advantage = rewards[..., t] + gamma * taken_value - values[..., t] + gamma * lam * taken_advantage
        advantages[..., t] = advantage
        next_value = values[..., t].where(valid[..., t], next_value)
        next_advantage = advantage.where(valid[..., t], next_advantage)
    return advantages.where(valid, 0.0), (advantages + values).where(valid, 0.0)


def _fake(rewards: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    return tuple(rewards.new_empty(rewards.shape, dtype=dtype) for _ in range(2))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _backward(ctx: Any, *_: Any) -> tuple[None, ...]:
    return (None,) * 7


_gae = Op(
    "gae(Tensor rewards, Tensor values, Tensor? mask, Tensor? dones, Tensor? cu_seqlens, float gamma, float lam)"
    " -> (Tensor advantages, Tensor returns)",
    _definition,
    fake=_fake,
    triton="gae:gae",
    save=_save,
    backward=_backward,
    public=["gae"],
)
