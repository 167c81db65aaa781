"""Rewards of tokens, from the scores of whole sequences and the distance to a reference policy."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops._ppo_loss import KL_ESTIMATORS, kl_estimate
from fastllm.rl._masked import check_tokens, kept, last_valid, masked_mean, wide


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float = 0.05,
    estimator: str = "k1",
    clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """``-kl_coef * k`` for every token, plus the sequence's score at its last valid token (Ziegler et al., arXiv 1909.08593, 2.1).

    k estimates KL(policy || reference) from ``d = logprobs - ref_logprobs`` (Schulman, "Approximating KL divergence", 2020):
    "k1" is ``d``, "k2" ``d² / 2``, "k3" ``e^(-d) - 1 + d``.

    Args:
        scores: (B,) one score a sequence, of a reward model or a check.
        logprobs, ref_logprobs: (B, T) log-probabilities of the sampled tokens under the policy that sampled them and under
            the reference policy.
        mask: (B, T) bool, True at response tokens; gaps are allowed, as is padding on either side.
        kl_coef: weight of the penalty, for example ``AdaptiveKL.value``.
        estimator: "k1", "k2" or "k3".
        clip: scores are clipped to [-clip, clip]; None: not at all.

    Returns:
        (rewards, mean_kl): (B, T) and the 0-d mean of k over valid tokens, fp32 (fp64 for fp64 log-probabilities), without
        gradients. Masked tokens have reward 0; a row with no valid token is all 0, whatever its score.

    Raises:
        TypeError: mask is not bool, or another tensor not floating-point.
        ValueError: shapes or devices do not match, the estimator is unknown, kl_coef is negative or clip not positive.
    """
    check_tokens(mask, logprobs=logprobs, ref_logprobs=ref_logprobs)
    _check_rows(mask)
    _check.is_floating("scores", scores)
    _check.has_shape("scores", scores, (mask.shape[0],), "one for each row of mask")
    _check.same_device("scores", scores, "mask", mask)
    _check.one_of("estimator", estimator, KL_ESTIMATORS)
    _check.in_range("kl_coef", kl_coef, 0.0)
    if clip is not None:
        _check.in_range("clip", clip, 0.0, open_low=True)
    with torch.no_grad():
        k = kl_estimate(kept(logprobs, mask) - kept(ref_logprobs, mask), estimator)
        score = wide(scores) if clip is None else wide(scores).clamp(-clip, clip)
        rewards = (-kl_coef * k).masked_fill(~mask, 0.0)
        return rewards + kept(score.unsqueeze(-1).expand(mask.shape), last_valid(mask)), masked_mean(k, mask)


def sequence_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """Each row's score at its last valid token, where a reward model is read.

    Args:
        scores: (B, T) a score for every token. mask: (B, T) bool, False at padding.

    Returns:
        (B,) fp32 (fp64 for fp64 scores); 0 for a row with no valid token. Differentiable in scores.

    Raises:
        TypeError: mask is not bool or scores not floating-point. ValueError: shapes or devices do not match.
    """
    check_tokens(mask, scores=scores)
    _check_rows(mask)
    return kept(scores, last_valid(mask)).sum(-1)


def _check_rows(mask: Tensor) -> None:
    if mask.dim() != 2:
        raise ValueError(f"mask must have two dimensions (B, T), got shape {tuple(mask.shape)}")
