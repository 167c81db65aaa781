"""Losses on preferences between whole responses, and the loss of a reward model, from log-probabilities and scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops.cross_entropy import items_argument
from fastllm.rl._masked import masked_mean, sum_over_ranks, wide

DPO_KINDS = ("sigmoid", "robust", "hinge", "ipo")


class PreferenceLoss(NamedTuple):
    """A 0-d loss, and 0-d statistics without a gradient: `chosen_rewards`, `rejected_rewards`, `margin` (their difference)
    and `accuracy` as means over the batch, and what the loss adds."""

    loss: Tensor
    stats: dict[str, Tensor]


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    num_items: Tensor | float | None = None,
) -> PreferenceLoss:
    """Direct preference optimisation, with ``z = beta * ((lc - lr) - (lc_ref - lr_ref))`` and e = label_smoothing.

    | kind | loss of a pair | source |
    |---|---|---|
    | "sigmoid" | ``-(1 - e) * logsigmoid(z) - e * logsigmoid(-z)`` | arXiv 2305.18290, eq. 7; e: conservative DPO |
    | "robust" | ``(-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2e)`` | arXiv 2403.00409, eq. 8 |
    | "hinge" | ``relu(1 - z)`` | SLiC, arXiv 2305.10425, with a reference |
    | "ipo" | ``(z / beta - 1 / (2 * beta))²``, each log-probability divided by its length | arXiv 2310.12036, eq. 17; averaged as in TRL |

    Args:
        chosen_logps, rejected_logps: (B,) the policy's log-probability of each response, summed over its tokens.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference policy; constants.
        beta: > 0.
        label_smoothing: share of labels taken to be wrong, in [0, 1] for "sigmoid" and [0, 0.5) for "robust".
        chosen_lengths, rejected_lengths: (B,) response tokens. Read by "ipo" alone, which without them takes the
            log-probabilities as they are. A pair with an empty response then counts for nothing.
        num_items: what to divide the sum over pairs by in place of their number: the pairs of all micro-batches and ranks.

    Returns:
        PreferenceLoss; rewards are ``beta * (logp - ref_logp)``. fp32, fp64 for fp64. No pair: 0 with zero gradients.

    Raises:
        TypeError: a log-probability is no floating-point tensor.
        ValueError: shapes or devices do not match, an unknown kind, a number out of its range.
    """
    _check_sequences(
        chosen_logps=chosen_logps, rejected_logps=rejected_logps, ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )  # fmt: skip
    _check.in_range("beta", beta, 0.0, open_low=True)
    _check.one_of("kind", kind, DPO_KINDS)
    _check.in_range("label_smoothing", label_smoothing, 0.0, 1.0)
    if label_smoothing and kind not in ("sigmoid", "robust"):
        raise ValueError(f"label_smoothing must be 0 for kind={kind!r}, got {label_smoothing}")
    if kind == "robust" and label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing must be below 0.5 for kind='robust', got {label_smoothing}")
    items = _items(num_items, chosen_logps)
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("chosen_lengths and rejected_lengths must be given together")
    chosen, rejected = wide(chosen_logps), wide(rejected_logps)
    ref_chosen, ref_rejected = wide(ref_chosen_logps.detach()), wide(ref_rejected_logps.detach())
    counts = torch.ones_like(chosen, dtype=torch.bool)
    if chosen_lengths is not None and rejected_lengths is not None:
        _check_lengths(chosen_logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
        if kind == "ipo":
            counts = (chosen_lengths > 0) & (rejected_lengths > 0)
            chosen, ref_chosen = (_averaged(x, chosen_lengths, counts) for x in (chosen, ref_chosen))
            rejected, ref_rejected = (_averaged(x, rejected_lengths, counts) for x in (rejected, ref_rejected))
    chosen_rewards, rejected_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    difference = (chosen - rejected) - (ref_chosen - ref_rejected)
    z = beta * difference
    if kind == "hinge":
        losses = F.relu(1 - z)
    elif kind == "ipo":
        losses = (difference - 1 / (2 * beta)).square()
    else:
        right, wrong = 1 - label_smoothing, label_smoothing
        losses = -right * F.logsigmoid(z)
        if label_smoothing:
            losses = losses + (wrong if kind == "robust" else -wrong) * F.logsigmoid(-z)
        if kind == "robust":
            losses = losses / (1 - 2 * label_smoothing)
    return PreferenceLoss(_mean(losses, counts, items), _pair_stats(chosen_rewards, rejected_rewards, counts))


def orpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
    num_items: Tensor | float | None = None,
) -> PreferenceLoss:
    """``-mean lc - beta * logsigmoid(log odds(chosen) - log odds(rejected))`` (arXiv 2403.07691, eq. 6 and 7).

    A response's log odds are ``m - log(1 - e^m)`` of its mean log-probability m. Where m is 0 to rounding, the odds are those of
    the largest probability below 1 and have no gradient.

    Args:
        chosen_logps, rejected_logps: (B,) log-probabilities summed over the response.
        chosen_lengths, rejected_lengths: (B,) response tokens. A pair with an empty response counts for nothing.
        beta: weight of the odds, >= 0; TRL's `beta`, the paper's lambda.
        num_items: as in ``dpo_loss``.

    Returns:
        PreferenceLoss; rewards are ``beta * m``. stats also has `nll` and `log_odds` (of chosen against rejected).

    Raises:
        TypeError, ValueError: as ``dpo_loss``.
    """
    chosen, rejected, counts, items = _means(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, num_items)
    _check.in_range("beta", beta, 0.0)
    log_odds = _log_odds(chosen) - _log_odds(rejected)
    losses = -chosen - beta * F.logsigmoid(log_odds)
    stats = _pair_stats(beta * chosen, beta * rejected, counts)
    stats |= {"nll": masked_mean(-chosen.detach(), counts), "log_odds": masked_mean(log_odds.detach(), counts)}
    return PreferenceLoss(_mean(losses, counts, items), stats)


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    num_items: Tensor | float | None = None,
) -> PreferenceLoss:
    """``-logsigmoid(beta * (mean lc - mean lr) - gamma)`` (arXiv 2405.14734, eq. 6): no reference policy.

    Args:
        chosen_logps, rejected_logps: (B,) log-probabilities summed over the response.
        chosen_lengths, rejected_lengths: (B,) response tokens. A pair with an empty response counts for nothing.
        beta: > 0. gamma: the target margin; TRL's `simpo_gamma` of CPO.
        num_items: as in ``dpo_loss``.

    Returns:
        PreferenceLoss; rewards are ``beta * mean logp``.

    Raises:
        TypeError, ValueError: as ``dpo_loss``.
    """
    chosen, rejected, counts, items = _means(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths, num_items)
    _check.in_range("beta", beta, 0.0, open_low=True)
    _check.in_range("gamma", gamma, float("-inf"))
    losses = -F.logsigmoid(beta * (chosen - rejected) - gamma)
    return PreferenceLoss(_mean(losses, counts, items), _pair_stats(beta * chosen, beta * rejected, counts))


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    beta: float = 0.1,
    kl: Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    lengths: Tensor | None = None,
    num_items: Tensor | float | None = None,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
) -> PreferenceLoss:
    """``w * (1 - sigmoid(beta * (l - KL)))`` for desirable and ``w * (1 - sigmoid(beta * (KL - l)))`` for undesirable responses
    (arXiv 2402.01306, eq. 8), where ``l = logps - ref_logps`` and ``KL = max(mean(kl), 0)`` without a gradient.

    Args:
        logps, ref_logps: (B,) log-probability of each response, summed over its tokens, under policy and reference.
        desirable: (B,) bool.
        beta: > 0.
        kl: log-ratios of mismatched pairs of prompt and response, any shape; None: those of this batch. Micro-batches that are
            to add up to a batch need the same kl.
        desirable_weight, undesirable_weight: w, >= 0.
        lengths: (B,) response tokens; an empty response then counts for nothing, in this batch's KL neither.
        num_items: what to divide the sum by in place of B, or of the responses that count.
        distributed, group: the mean of kl is taken over all ranks of `group` (None: the default one) by one all-reduce.

    Returns:
        PreferenceLoss. `chosen_rewards` are ``beta * l`` of desirable responses, `rejected_rewards` of undesirable ones (0 where
        there are none), `accuracy` is the share with l on its side of KL; stats also has `kl`.

    Raises:
        TypeError: desirable is not bool, a log-probability not floating-point.
        ValueError: shapes or devices do not match, or a number is out of its range.
    """
    _check_sequences(logps=logps, ref_logps=ref_logps)
    _check_labels(desirable, logps)
    _check.in_range("beta", beta, 0.0, open_low=True)
    _check.in_range("desirable_weight", desirable_weight, 0.0)
    _check.in_range("undesirable_weight", undesirable_weight, 0.0)
    if kl is not None:
        _check.is_floating("kl", kl)
        _check.same_device("kl", kl, "logps", logps)
    items = _items(num_items, logps)
    ratio = wide(logps) - wide(ref_logps.detach())
    counts = torch.ones_like(desirable)
    if lengths is not None:
        _check_lengths(logps, lengths=lengths)
        counts = lengths > 0
        ratio = ratio.masked_fill(~counts, 0.0)
    pairs = wide((ratio if kl is None else kl).detach())
    total = torch.stack([pairs.sum(), counts.sum().to(pairs) if kl is None else pairs.new_tensor(float(pairs.numel()))])
    if distributed:
        total = sum_over_ranks(total, group)
    baseline = (total[0] / total[1].clamp(min=1)).clamp(min=0).to(ratio.dtype)
    side = torch.where(desirable, 1.0, -1.0).to(ratio.dtype)
    weight = torch.where(desirable, desirable_weight, undesirable_weight).to(ratio.dtype)
    losses = weight * torch.sigmoid(-beta * side * (ratio - baseline))  # 1 - sigmoid(x) = sigmoid(-x)
    with torch.no_grad():
        chosen, rejected = (masked_mean(beta * ratio, m & counts) for m in (desirable, ~desirable))
        stats = {
            "chosen_rewards": chosen,
            "rejected_rewards": rejected,
            "margin": chosen - rejected,
            "accuracy": masked_mean((side * (ratio - baseline) > 0).to(ratio.dtype), counts),
            "kl": baseline,
        }
    return PreferenceLoss(_mean(losses, counts, items), stats)


def reward_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    margin: Tensor | float | None = None,
    center: float = 0.0,
    num_items: Tensor | float | None = None,
) -> PreferenceLoss:
    """``-logsigmoid(rc - rr - margin) + center * (rc + rr)²`` (Bradley-Terry; the margin of arXiv 2307.09288, eq. 2; centred as
    in arXiv 2312.09244, section A).

    Args:
        chosen_scores, rejected_scores: (B,) scores of the pairs; ``sequence_scores`` reads them at the last valid token.
        margin: (B,), of floating point or integers, or a number.
        center: >= 0; TRL's `center_rewards_coefficient`.
        num_items: as in ``dpo_loss``.

    Returns:
        PreferenceLoss; the rewards are the scores.

    Raises:
        TypeError, ValueError: as ``dpo_loss``.
    """
    _check_sequences(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    _check.in_range("center", center, 0.0)
    chosen, rejected = wide(chosen_scores), wide(rejected_scores)
    ahead = chosen - rejected
    if isinstance(margin, Tensor):
        if margin.dtype == torch.bool or margin.is_complex():
            raise TypeError(f"margin must hold real numbers, got dtype {margin.dtype}")
        _check.has_shape("margin", margin, tuple(chosen.shape), "that of chosen_scores")
        _check.same_device("margin", margin, "chosen_scores", chosen)
        ahead = ahead - margin.to(ahead.dtype)
    elif margin is not None:
        if isinstance(margin, (list, tuple)):
            raise TypeError(f"margin must be a tensor {tuple(chosen.shape)} or a number, got a {type(margin).__name__}")
        _check.in_range("margin", margin, float("-inf"))
        ahead = ahead - margin
    losses = -F.logsigmoid(ahead)
    if center:
        losses = losses + center * (chosen + rejected).square()
    everyone = torch.ones_like(chosen, dtype=torch.bool)
    items = _items(num_items, chosen_scores)
    return PreferenceLoss(_mean(losses, everyone, items), _pair_stats(chosen, rejected, everyone))


def _means(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor, num_items: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | float | None]:
    """Mean log-probabilities, which pairs count (the others have -1), and num_items."""
    _check_sequences(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    _check_lengths(chosen_logps, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths)
    counts = (chosen_lengths > 0) & (rejected_lengths > 0)
    chosen = _averaged(wide(chosen_logps), chosen_lengths, counts)
    return chosen, _averaged(wide(rejected_logps), rejected_lengths, counts), counts, _items(num_items, chosen_logps)


def _averaged(logps: Tensor, lengths: Tensor, counts: Tensor) -> Tensor:
    return (logps / lengths.clamp(min=1)).masked_fill(~counts, -1.0)


def _log_odds(m: Tensor) -> Tensor:
    m = m.clamp(max=-torch.finfo(m.dtype).eps)
    return m - torch.log(-torch.expm1(m))


def _mean(losses: Tensor, counts: Tensor, items: Tensor | float | None) -> Tensor:
    total, pairs = losses.masked_fill(~counts, 0.0).sum(), counts.sum()
    divisor = pairs if items is None else items
    if isinstance(divisor, Tensor):
        divisor = divisor.to(total.dtype).where(pairs > 0, 1.0)
    return total / divisor


def _items(num_items: Any, like: Tensor) -> Tensor | float | None:
    if num_items is None:
        return None
    tensor, number = items_argument(num_items, like.device)
    if tensor is not None:
        return tensor.reshape(())
    _check.in_range("num_items", num_items, 0.0, open_low=True)
    return number


def _pair_stats(chosen: Tensor, rejected: Tensor, counts: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return {
            "chosen_rewards": masked_mean(chosen, counts),
            "rejected_rewards": masked_mean(rejected, counts),
            "margin": masked_mean(chosen - rejected, counts),
            "accuracy": masked_mean((chosen > rejected).to(chosen.dtype), counts),
        }


def _check_sequences(**tensors: Any) -> None:
    (first_name, first), *others = tensors.items()
    _check.is_floating(first_name, first)
    if first.dim() != 1:
        raise ValueError(f"{first_name} must have shape (B,), got {tuple(first.shape)}")
    for name, value in others:
        _check.is_floating(name, value)
        _check.has_shape(name, value, tuple(first.shape), f"that of {first_name}")
        _check.same_device(name, value, first_name, first)


def _check_lengths(like: Tensor, **tensors: Any) -> None:
    for name, value in tensors.items():
        _check.is_tensor(name, value)
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must count tokens, got dtype {value.dtype}")
        _check.has_shape(name, value, tuple(like.shape), "one for each log-probability")
        _check.same_device(name, value, "the log-probabilities", like)


def _check_labels(desirable: Any, logps: Tensor) -> None:
    _check.is_mask("desirable", desirable)
    _check.has_shape("desirable", desirable, tuple(logps.shape), "that of logps")
    _check.same_device("desirable", desirable, "logps", logps)
