"""The loss of proximal policy optimisation and its relatives over sampled tokens: PPO (Schulman et al., arXiv
1707.06347), dual clip (Ye et al., arXiv 1912.09729), asymmetric clip (DAPO, arXiv 2503.14476), GSPO (arXiv 2507.18071),
CISPO (MiniMax-M1, arXiv 2506.13585), GRPO's KL term (arXiv 2402.03300) and Dr. GRPO's normaliser (arXiv 2503.20783)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastllm.ops import _check, _ppo_loss
from fastllm.ops._ppo_loss import AGGREGATIONS, KL_ESTIMATORS, LEVELS, STATS, VARIANTS
from fastllm.ops.cross_entropy import items_argument
from fastllm.rl._masked import saveable


class PPOLoss(NamedTuple):
    """loss: 0-d, differentiable. stats: name -> 0-d tensor without gradient, none of which has been waited for."""

    loss: Tensor
    stats: dict[str, Tensor]


# Statistics that mean nothing without values.
_OF_VALUES = ("value_loss", "value_clip_fraction", "returns_mean", "value_mean", "explained_variance")


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    importance_weights: Tensor | None = None,
    level: str = "token",
    aggregation: str = "token-mean",
    num_items: Tensor | float | None = None,
    variant: str = "ppo",
    cu_seqlens: Tensor | None = None,
) -> PPOLoss:
    """``policy + value_coef * value - entropy_coef * entropy + kl_coef * kl``, each aggregated over the valid tokens.

    With ``r = exp(clamp(logprobs - old_logprobs, -20, 20))``, ``c(r) = clamp(r, 1 - clip_low, 1 + clip_high)`` and A the
    advantages, a token's policy loss is

    - "ppo": ``max(-A * r, -A * c(r))``; with dual_clip, where A < 0, at most ``-A * dual_clip``;
    - "cispo": ``-c(r) * A * logprobs`` with no gradient through c(r);
    - "reinforce": ``-A * logprobs``;

    times importance_weights. The value loss is ``0.5 * max((V - R)², (clamp(V, V_old ± value_clip) - R)²)``, the KL term
    one of Schulman's estimators of ``d = logprobs - ref_logprobs``: "k1" d, "k2" d²/2, "k3" exp(-d) - 1 + d.

    Args:
        logprobs: (B, T) log-probabilities of the sampled tokens under the policy, float32, bfloat16 or float16; float64 is
            served by the definition. (T,) is one sequence, or several with `cu_seqlens`. Each tensor may have a dtype of
            its own.
        old_logprobs: like logprobs, under the policy that sampled; None for one that has not moved since, so that they are
            logprobs themselves. No gradient.
        advantages: like logprobs; or (B,) or (B, 1), one a sequence (packed: ``a.repeat_interleave(cu_seqlens.diff())``). No
            gradient.
        mask: bool like logprobs, True where a token counts. What stands elsewhere, NaN included, reaches neither a result nor
            a gradient.
        clip_low, clip_high: >= 0, how far r may fall and rise before its gradient is cut.
        dual_clip: > 1, for variant "ppo"; None for none.
        values, returns: like logprobs, both or neither: adds the value loss. No gradient for returns.
        old_values: like values, those of the rollout; None, or value_clip None, for no clipping. No gradient.
        entropy: like logprobs, of each token's distribution, as ``token_logprobs(with_entropy=True)`` returns it.
        ref_logprobs: like logprobs, under the reference model. No gradient.
        kl_estimator: "k1", "k2" or "k3".
        importance_weights: like advantages, factors of the policy loss. No gradient.
        level: "token", or "sequence": r is one ratio a sequence, the exponential of its mean log-ratio (GSPO), with
            gradients through it.
        aggregation: "token-mean"; "seq-mean-token-sum"; "seq-mean-token-mean"; "token-sum-norm", the sum over num_items. All
            four terms are aggregated alike; sequences without a valid token do not count.
        num_items: what to divide by in place of the number of this batch's valid tokens, or sequences for "seq-...", so that
            the losses of micro batches and ranks add up to that of the whole batch. A number >= 0 or a tensor with one
            element, which is not read on the host. "token-sum-norm" divides by B * T without it.
        variant: "ppo", "cispo" or "reinforce".
        cu_seqlens: (sequences + 1,) int32, where the packed sequences begin, for token tensors (T,).

    Returns:
        PPOLoss: loss, float32 (float64 for float64 logprobs), differentiable in logprobs, values and entropy, any number of
        times; and stats, 0-d tensors of its dtype: policy_loss, value_loss, entropy and kl, aggregated as in the loss;
        approx_kl (mean of old_logprobs - logprobs) and approx_kl_k3 (mean of r - 1 - log r); clip_fraction and
        value_clip_fraction, the shares of tokens whose clipped loss is strictly larger ("cispo": whose ratio was clipped);
        ratio_mean, ratio_max, advantage_mean, returns_mean, value_mean; explained_variance, 1 - var(R - V) / var(R), or 0
        where the returns do not vary. Means are over this batch's valid tokens, whatever num_items is. What a tensor not
        given would be needed for is left out. Without any valid token all is 0, and so are the gradients.

    Raises:
        TypeError: a tensor is not of floating point, mask is not bool, or cu_seqlens not int32.
        ValueError: shapes or devices do not match, a name is unknown, a number is out of its range, a coefficient stands
            without its tensor, or cu_seqlens does not ascend from 0 to T (checked on the CPU).
    """
    _check.is_floating("logprobs", logprobs)
    shape = logprobs.shape
    if not 1 <= len(shape) <= 2:
        raise ValueError(f"logprobs must have shape (B, T) or (T,), got {tuple(shape)}")
    for name, value, valid in (
        ("kl_estimator", kl_estimator, KL_ESTIMATORS), ("level", level, LEVELS), ("variant", variant, VARIANTS),
        ("aggregation", aggregation, AGGREGATIONS),
    ):  # fmt: skip
        _check.one_of(name, value, valid)
    _check.is_mask("mask", mask)
    old_logprobs = logprobs.detach() if old_logprobs is None else _operand("old_logprobs", old_logprobs, logprobs)
    if (values is None) != (returns is None):
        given, missing = ("values", "returns") if returns is None else ("returns", "values")
        raise ValueError(f"{given} was given without {missing}: the value loss needs both")
    if old_values is not None and values is None:
        raise ValueError("old_values was given without values")
    if values is not None and returns is not None:
        values, returns = _operand("values", values, logprobs), _operand("returns", returns, logprobs)
        if old_values is not None:
            old_values = _operand("old_values", old_values, logprobs)
        if value_clip is not None:
            _check.in_range("value_clip", value_clip, 0.0)
    _check.has_shape("mask", mask, shape, "the shape of logprobs")
    _check.same_device("mask", mask, "logprobs", logprobs)
    if entropy is not None:
        entropy = _operand("entropy", entropy, logprobs)
    elif entropy_coef != 0:
        raise ValueError(f"entropy_coef is {entropy_coef}, but no entropy was given")
    if ref_logprobs is not None:
        ref_logprobs = _operand("ref_logprobs", ref_logprobs, logprobs)
    elif kl_coef != 0:
        raise ValueError(f"kl_coef is {kl_coef}, but no ref_logprobs were given")
    advantages = _operand("advantages", advantages, logprobs, by_row=True)
    if importance_weights is not None:
        importance_weights = _operand("importance_weights", importance_weights, logprobs, by_row=True)
    for name, number in (("value_coef", value_coef), ("entropy_coef", entropy_coef), ("kl_coef", kl_coef)):
        _check.in_range(name, number, float("-inf"))
    _check.in_range("clip_low", clip_low, 0.0)
    _check.in_range("clip_high", clip_high, 0.0)
    if dual_clip is not None:
        _check.in_range("dual_clip", dual_clip, 1.0, open_low=True)
        if variant != "ppo":
            raise ValueError(f"dual_clip is a bound of variant='ppo', got variant={variant!r}")
    if cu_seqlens is not None:
        if len(shape) != 1:
            raise ValueError(f"cu_seqlens is for packed tokens of shape (T,), got logprobs of shape {tuple(shape)}")
        _check.is_cu_seqlens("cu_seqlens", cu_seqlens, "logprobs", logprobs)
    items = float(mask.numel()) if aggregation == "token-sum-norm" else -1.0
    if num_items is not None:
        num_items, items = items_argument(num_items, logprobs.device)
    tensors = saveable(
        logprobs, old_logprobs, advantages, mask, values, None if value_clip is None else old_values, returns, entropy,
        ref_logprobs, importance_weights, cu_seqlens, num_items,
    )  # fmt: skip
    loss, stats, *_ = _ppo_loss.ppo_loss(
        *tensors, items, clip_low, clip_high, dual_clip or 0.0, value_clip or 0.0, value_coef, entropy_coef, kl_coef,
        KL_ESTIMATORS.index(kl_estimator), LEVELS.index(level), AGGREGATIONS.index(aggregation), VARIANTS.index(variant),
    )  # fmt: skip
    told = dict(zip(STATS, stats.unbind()))
    for tensor, needed_for in ((values, _OF_VALUES), (entropy, ("entropy",)), (ref_logprobs, ("kl",))):
        if tensor is None:
            for absent in needed_for:
                del told[absent]
    return PPOLoss(loss, told)


def _operand(name: str, value: Tensor, logprobs: Tensor, by_row: bool = False) -> Tensor:
    """A token tensor after its checks; by_row: (B,) or (B, 1) will do as well, and comes back as (B,)."""
    _check.is_floating(name, value)
    if value.shape != logprobs.shape:
        rows = logprobs.shape[:1]
        if not (by_row and logprobs.dim() == 2 and value.shape in (rows, (*rows, 1))):
            others = f"; or {(*rows,)} or {(*rows, 1)}, one a sequence" if by_row and logprobs.dim() == 2 else ""
            _check.has_shape(name, value, logprobs.shape, f"the shape of logprobs{others}")
        value = value.reshape(rows)
    if value.device != logprobs.device:
        _check.same_device(name, value, "logprobs", logprobs)
    return value.float() if value.dtype == torch.float64 != logprobs.dtype else value
