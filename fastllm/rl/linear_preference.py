"""The preference losses from hidden states and the LM head: log-probabilities of responses without logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastllm.rl.linear import linear_sequence_logprobs
from fastllm.rl.preference import PreferenceLoss, dpo_loss, kto_loss, orpo_loss, simpo_loss


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    tokens: Tensor,
    mask: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
    num_items: Tensor | float | None = None,
) -> PreferenceLoss:
    """``dpo_loss`` of B pairs from hidden states; "ipo" averages over the responses' lengths.

    Args:
        hidden: (2B, T, C), the B chosen sequences first, then the B rejected, as TRL concatenates them; hidden[:, t] predicts
            tokens[:, t]. Packed: (T, C) with cu_seqlens of 2B sequences.
        weight: (V, C), or the head itself, as in ``linear_ppo_loss``.
        tokens: (2B, T). mask: (2B, T) bool, True at response tokens.
        ref_chosen_logps, ref_rejected_logps: (B,) under the reference policy, for example from ``linear_sequence_logprobs``
            under ``torch.no_grad()``.
        bias, temperature, softcap, logit_scale, cu_seqlens: as in ``linear_ppo_loss``.
        beta, kind, label_smoothing, num_items: as in ``dpo_loss``.

    Returns:
        PreferenceLoss, differentiable in hidden, weight and bias. A pair with an empty response counts for nothing under "ipo".

    Raises:
        As ``linear_ppo_loss`` and ``dpo_loss``; ValueError for an odd number of sequences.
    """
    halves = _pairs(mask, cu_seqlens)
    dpo_loss(  # its checks, before any product
        ref_chosen_logps, ref_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta, kind=kind,
        label_smoothing=label_smoothing, num_items=num_items,
    )  # fmt: skip
    if ref_chosen_logps.shape[0] != halves:
        raise ValueError(f"ref_chosen_logps must have shape ({halves},) (pairs), got {tuple(ref_chosen_logps.shape)}")
    chosen, rejected = _chosen_and_rejected(
        hidden, weight, tokens, mask, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return dpo_loss(
        chosen[0], rejected[0], ref_chosen_logps, ref_rejected_logps, beta=beta, kind=kind,
        label_smoothing=label_smoothing, chosen_lengths=chosen[1], rejected_lengths=rejected[1], num_items=num_items,
    )  # fmt: skip


def linear_orpo_loss(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    tokens: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    num_items: Tensor | float | None = None,
) -> PreferenceLoss:
    """``orpo_loss`` of B pairs from hidden states (2B, T, C), tokens and mask (2B, T), the chosen sequences first.

    Args, Returns and Raises: as ``linear_dpo_loss`` and ``orpo_loss``.
    """
    (chosen, n), (rejected, m) = _chosen_and_rejected(
        hidden, weight, tokens, mask, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return orpo_loss(chosen, rejected, n, m, beta=beta, num_items=num_items)


def linear_simpo_loss(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    tokens: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    beta: float = 2.0,
    gamma: float = 1.0,
    num_items: Tensor | float | None = None,
) -> PreferenceLoss:
    """``simpo_loss`` of B pairs from hidden states (2B, T, C), tokens and mask (2B, T), the chosen sequences first.

    Args, Returns and Raises: as ``linear_dpo_loss`` and ``simpo_loss``.
    """
    (chosen, n), (rejected, m) = _chosen_and_rejected(
        hidden, weight, tokens, mask, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return simpo_loss(chosen, rejected, n, m, beta=beta, gamma=gamma, num_items=num_items)


def linear_kto_loss(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    tokens: Tensor,
    mask: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> PreferenceLoss:
    """``kto_loss`` of B responses from hidden states (B, T, C), tokens and mask (B, T).

    Args:
        hidden, weight, tokens, mask, bias, temperature, softcap, logit_scale, cu_seqlens: as in ``linear_ppo_loss``.
        ref_logps, desirable, options: as in ``kto_loss``.

    Returns and Raises: as ``kto_loss`` and ``linear_ppo_loss``.
    """
    logps, _ = linear_sequence_logprobs(
        hidden, weight, tokens, mask, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return kto_loss(logps, ref_logps, desirable, **options)


def _pairs(mask: Tensor, cu_seqlens: Tensor | None) -> int:
    sequences = mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if sequences % 2:
        raise ValueError(f"mask must have 2B sequences, the chosen ones first, got {sequences}")
    return sequences // 2


def _chosen_and_rejected(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    tokens: Tensor,
    mask: Tensor,
    *,
    cu_seqlens: Tensor | None,
    **options: Any,
) -> list[tuple[Tensor, Tensor]]:
    half = _pairs(mask, cu_seqlens)
    logps, lengths = linear_sequence_logprobs(hidden, weight, tokens, mask, cu_seqlens=cu_seqlens, **options)
    return [(logps[:half], lengths[:half]), (logps[half:], lengths[half:])]
