"""The preference losses from hidden states and the LM head: log-probabilities of responses without logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastllm.ops import _check
from fastllm.rl._masked import check_tokens
from fastllm.rl.linear import check_packing, linear_sequence_logprobs
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
    pairs = _pairs(mask, cu_seqlens)
    for name, value in (("ref_chosen_logps", ref_chosen_logps), ("ref_rejected_logps", ref_rejected_logps)):
        _check_row(name, value, pairs, "one for each pair", mask)
    none, _ = _nothing(mask)
    dpo_loss(none, none, none, none, beta=beta, kind=kind, label_smoothing=label_smoothing, num_items=num_items)
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
    none, of_none = _nothing(mask)
    orpo_loss(none, none, of_none, of_none, beta=beta, num_items=num_items)
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
    none, of_none = _nothing(mask)
    simpo_loss(none, none, of_none, of_none, beta=beta, gamma=gamma, num_items=num_items)
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
    beta: float = 0.1,
    kl: Tensor | None = None,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    num_items: Tensor | float | None = None,
    distributed: bool = False,
    group: dist.ProcessGroup | None = None,
) -> PreferenceLoss:
    """``kto_loss`` of B responses from hidden states (B, T, C), tokens and mask (B, T).

    Args:
        hidden, weight, tokens, mask, bias, temperature, softcap, logit_scale, cu_seqlens: as in ``linear_ppo_loss``.
        ref_logps, desirable, beta and all that follow: as in ``kto_loss``.

    Returns and Raises: as ``kto_loss`` and ``linear_ppo_loss``. A response without a token in `mask` counts for nothing.
    """
    rows = _sequences(mask, cu_seqlens)
    _check_row("ref_logps", ref_logps, rows, "one for each sequence", mask)
    how: dict[str, Any] = {
        "beta": beta, "kl": kl, "desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight,
        "num_items": num_items,
    }  # fmt: skip
    with torch.no_grad():
        kto_loss(ref_logps, ref_logps, desirable, **how)
    logps, lengths = linear_sequence_logprobs(
        hidden, weight, tokens, mask, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale,
        cu_seqlens=cu_seqlens,
    )  # fmt: skip
    return kto_loss(logps, ref_logps, desirable, **how, lengths=lengths, distributed=distributed, group=group)


def _sequences(mask: Any, cu_seqlens: Any) -> int:
    check_tokens(mask)
    check_packing(mask, cu_seqlens)
    return mask.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _pairs(mask: Any, cu_seqlens: Any) -> int:
    sequences = _sequences(mask, cu_seqlens)
    if sequences % 2:
        name = "mask" if cu_seqlens is None else "cu_seqlens"
        raise ValueError(f"{name} must be of 2B sequences, the chosen ones first, got {sequences}")
    return sequences // 2


def _check_row(name: str, value: Any, rows: int, meaning: str, mask: Tensor) -> None:
    _check.is_floating(name, value)
    _check.has_shape(name, value, (rows,), meaning)
    _check.same_device(name, value, "mask", mask)


def _nothing(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and lengths of no pair: a loss of them makes its checks of numbers before there is any product."""
    check_tokens(mask)
    return torch.zeros(0, device=mask.device), torch.zeros(0, dtype=torch.int64, device=mask.device)


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
