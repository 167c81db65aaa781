"""The PPO loss and log-probabilities of responses from hidden states and the LM head: the logits are never stored whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastllm.ops import _check, _softmax_rows
from fastllm.ops._linear_rows import Rows, check_operands
from fastllm.rl._head import with_head
from fastllm.rl._linear_logprobs import Operands, composed, is_plain, logprobs, loss_of
from fastllm.rl._masked import check_tokens, kept, saveable
from fastllm.rl.ppo import PPOLoss, ppo_loss


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    tokens: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    value_clip: float | None = 0.2,
    value_coef: float = 0.1,
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
    """``ppo_loss`` of the log-probabilities that `hidden` and the LM head `weight` give `tokens`, without the (N, V) logits.

    With level "token" the gradients are found in the forward pass, while a chunk of logits is at hand: three matrix products,
    as many as the unfused form, two where the head is frozen. With "sequence" the backward pass makes the logits again.
    Only valid tokens are computed with on a CPU.

    Args:
        hidden: (B, T, C), or (T, C) packed: hidden[:, t] is the state that predicts tokens[:, t], so for a model over ids
            ``model(ids)[:, :-1]`` and ``tokens = ids[:, 1:]``. float32, bfloat16 or float16; float64 by the definition.
        weight: (V, C) in hidden's dtype: the head's weight, an embedding tied to it, or an expression in others that has a
            gradient. Or the head itself: a linear layer, with PEFT's LoRA adapters or without, which is called with its hooks, so
            that weights partitioned by DeepSpeed's ZeRO-3 are gathered for as long as they are needed.
        tokens: (B, T) the sampled tokens in [0, V), any integer dtype; what stands at masked ones does not matter.
        old_logprobs, advantages, mask: as in ``ppo_loss``.
        bias: (V,), added to the logits before logit_scale multiplies, softcap caps and temperature divides them, as in
            ``ops.linear_token_logprobs``. None where weight is a module, whose own bias counts.
        with_entropy: have `entropy` in stats also where entropy_coef is 0. Otherwise entropies are not computed then.
        clip_low and all that follow: as in ``ppo_loss``.

    Returns:
        PPOLoss as of ``ppo_loss``, differentiable in hidden, weight, bias, the adapters and values, any number of times. Weight
        gradients add up in fp32. Memory beyond gradients: about 64 MB of logits on a CPU and 256 MB on a GPU, or half the bytes of
        the head's weight where that is more.

    Raises:
        TypeError, ValueError: as ``ppo_loss`` and ``ops.linear_token_logprobs``, before any product; a head that is no linear
            layer, or whose adapters are not plain LoRA.
        IndexError: on the CPU, a valid token outside [0, V).
    """
    options: dict[str, Any] = {
        "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "entropy_coef": entropy_coef,
        "ref_logprobs": ref_logprobs, "kl_coef": kl_coef, "kl_estimator": kl_estimator,
        "importance_weights": importance_weights, "variant": variant,
    }  # fmt: skip
    whole: dict[str, Any] = {
        "values": values, "old_values": old_values, "returns": returns, "value_clip": value_clip,
        "value_coef": value_coef, "level": level, "aggregation": aggregation, "num_items": num_items,
        "cu_seqlens": cu_seqlens, **options,
    }  # fmt: skip
    _check.is_floating("hidden", hidden)
    if not 2 <= hidden.dim() <= 3:
        raise ValueError(f"hidden must have shape (B, T, C) or (T, C), got {tuple(hidden.shape)}")
    _check.in_range("entropy_coef", entropy_coef, float("-inf"))
    rows = _Tokens(hidden, tokens, mask, bias, temperature, softcap, logit_scale, with_entropy or entropy_coef != 0)
    with torch.no_grad():  # ppo_loss's own checks of all that it is given, before any product
        zeros = torch.zeros(mask.shape, dtype=_softmax_rows.wide(hidden.dtype), device=mask.device)
        old = zeros if old_logprobs is None else old_logprobs
        ppo_loss(zeros, old, advantages, mask, entropy=zeros if rows.how.with_entropy else None, **whole)

    def finish(found: Tensor, entropy: Tensor | None) -> PPOLoss:
        found, entropy = rows.spread(found), None if entropy is None else rows.spread(entropy)
        old = found.detach() if old_logprobs is None else old_logprobs
        return ppo_loss(found, old, advantages, mask, entropy=entropy, **whole)

    def by_ops(*operands: Any) -> Tensor:
        return finish(*composed(operands, rows.target, rows.how)).loss

    learns = torch.is_grad_enabled()
    at_once = level == "token" and learns and is_plain(rows.hidden)
    outputs: list[Any] = []

    def body(h: Tensor, w: Tensor, b: Tensor | None, low_rank: tuple[Tensor, Tensor] | None) -> Any:
        operands = rows.operands(h, w, b, low_rank)
        if not at_once or not any(t is not None and t.requires_grad for t in operands):
            found, entropy = logprobs(operands, rows.target, rows.how)
            outputs[:] = [None, found, entropy]
            return found if entropy is None else (found, entropy)
        parts = {
            "old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs,
            "importance_weights": importance_weights,
        }  # fmt: skip
        derivative, scale = _token_derivative(rows, parts, options, aggregation, num_items, cu_seqlens)
        zero, found, entropy = loss_of(operands, rows.target, rows.how, derivative, scale, by_ops)
        outputs[:] = [zero, found, entropy]
        return zero

    returned = with_head(weight, bias, rows.hidden, body)
    zero, found, entropy = outputs
    if zero is None:  # what the hooks of a module made of it
        found, entropy = returned if isinstance(returned, tuple) else (returned, None)
        return finish(found, entropy)
    loss, stats = finish(found, entropy)
    return PPOLoss(loss + returned, stats)


def _token_derivative(
    rows: _Tokens, parts: dict[str, Any], options: dict[str, Any], aggregation: str, num_items: Any, cu_seqlens: Any
) -> tuple[Any, Tensor]:
    """(derivative, scale) as ``loss_of`` takes them, for the rows of a loss whose tokens do not depend on each other."""
    mask = rows.mask
    with torch.enable_grad():  # what a token counts for, by the loss's own rules: the gradient of the sum of all
        ones = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        counted = ppo_loss(
            ones, ones.detach(), torch.full_like(ones, -1.0), mask, variant="reinforce", aggregation=aggregation,
            num_items=num_items, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        (weights,) = torch.autograd.grad(counted.loss, ones)
    scale = weights.abs().amax() if weights.numel() else weights.sum()
    weights = rows.pick(weights / scale.where(scale > 0, 1.0))
    valid = rows.pick(mask)
    given = {}
    for name, value in parts.items():
        if value is not None:
            if value.shape != mask.shape:  # (B,) or (B, 1), one a sequence
                value = value.reshape(-1, 1).expand(mask.shape)
            given[name] = rows.pick(value.detach())
    numbers = {name: value for name, value in options.items() if name not in parts}

    def derivative(begin: int, end: int, found: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        with torch.enable_grad():
            learnt = [t.detach().requires_grad_() for t in (found, entropy) if t is not None]
            each: dict[str, Any] = {"old_logprobs": found.detach()} | {
                name: value[begin:end] for name, value in given.items()
            }
            loss = ppo_loss(
                learnt[0], mask=valid[begin:end], entropy=None if entropy is None else learnt[1], num_items=1.0, **each,
                **numbers,
            ).loss  # fmt: skip
            grads = [g * weights[begin:end] for g in torch.autograd.grad(loss, learnt)]
        return grads[0], grads[1] if entropy is not None else None

    return derivative, scale


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor | nn.Module,
    tokens: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """The log-probability of each token from hidden states and the LM head: ``ops.linear_token_logprobs`` with a mask, for every
    kind of head that ``linear_ppo_loss`` takes.

    Args:
        hidden, weight, tokens, bias, temperature, softcap, logit_scale: as in ``linear_ppo_loss``.
        mask: bool like tokens, True at tokens that count.

    Returns:
        Like tokens, fp32 (fp64 for fp64), 0 where masked; differentiable in hidden, weight and bias.

    Raises:
        As ``linear_ppo_loss``.
    """
    rows = _Tokens(hidden, tokens, mask, bias, temperature, softcap, logit_scale, False)

    def body(h: Tensor, w: Tensor, b: Tensor | None, low_rank: tuple[Tensor, Tensor] | None) -> Tensor:
        return logprobs(rows.operands(h, w, b, low_rank), rows.target, rows.how)[0]

    return rows.spread(with_head(weight, bias, rows.hidden, body)).masked_fill(~mask, 0.0)


def linear_sequence_logprobs(
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
) -> tuple[Tensor, Tensor]:
    """The log-probability of each response, summed over its tokens, and its length, from hidden states and the LM head.

    Args:
        hidden, weight, tokens, bias, temperature, softcap, logit_scale: as in ``linear_ppo_loss``.
        mask: bool like tokens, True at response tokens.
        cu_seqlens: (B + 1,) int32, where the packed sequences begin, for tokens (T,) and hidden (T, C).

    Returns:
        (logps, lengths): (B,) fp32 (fp64 for fp64), differentiable in hidden, weight and bias, and (B,) int64.

    Raises:
        As ``linear_ppo_loss``.
    """
    check_tokens(mask)
    check_packing(mask, cu_seqlens)
    found = linear_logprobs(
        hidden, weight, tokens, mask, bias=bias, temperature=temperature, softcap=softcap, logit_scale=logit_scale
    )
    return sequence_logprobs(found, mask, cu_seqlens=cu_seqlens)


def sequence_logprobs(logprobs: Tensor, mask: Tensor, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The log-probability of each response, summed over its tokens, and its length.

    Args:
        logprobs: (B, T), as ``ops.token_logprobs`` gives them, or (T,) packed. mask: bool of that shape.
        cu_seqlens: (B + 1,) int32, where the packed sequences begin.

    Returns:
        (logps, lengths): (B,) fp32 (fp64 for fp64), differentiable in logprobs, and (B,) int64.

    Raises:
        TypeError: mask is not bool, logprobs not floating-point or cu_seqlens not int32. ValueError: shapes do not match.
    """
    check_tokens(mask, logprobs=logprobs)
    check_packing(mask, cu_seqlens)
    values = kept(logprobs, mask)
    if cu_seqlens is None:
        return values.sum(-1), mask.sum(-1)
    at = torch.arange(mask.shape[0], device=mask.device, dtype=cu_seqlens.dtype)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)
    sequences = cu_seqlens.shape[0] - 1
    return (
        values.new_zeros(sequences).index_add(0, row, values),
        torch.zeros(sequences, dtype=torch.int64, device=mask.device).index_add(0, row, mask.long()),
    )


def check_packing(mask: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        if mask.dim() != 1:
            raise ValueError(f"cu_seqlens is for packed tokens of shape (T,), got mask of shape {tuple(mask.shape)}")
        _check.is_cu_seqlens("cu_seqlens", cu_seqlens, "mask", mask)
    elif mask.dim() != 2:
        raise ValueError(f"mask must have shape (B, T), or (T,) with cu_seqlens, got {tuple(mask.shape)}")


class _Tokens:
    """The rows that the head is applied to: on a CPU the valid tokens, elsewhere all of them, the masked ones emptied, so that
    nothing waits for a device."""

    def __init__(
        self, hidden: Tensor, tokens: Tensor, mask: Tensor, bias: Tensor | None, temperature: float, softcap: float | None,
        logit_scale: float, with_entropy: bool,
    ) -> None:  # fmt: skip
        _check.is_floating("hidden", hidden)
        _check.has_rank_of_at_least("hidden", hidden, 2)
        check_tokens(mask)
        if mask.shape != hidden.shape[:-1]:
            _check.has_shape("mask", mask, tuple(hidden.shape[:-1]), "the leading dimensions of hidden")
        _check.same_device("mask", mask, "hidden", hidden)
        _check.is_tensor("tokens", tokens)
        if tokens.dtype == torch.bool or tokens.is_floating_point() or tokens.is_complex():
            raise TypeError(f"tokens must hold token indices (an integer tensor), got dtype {tokens.dtype}")
        _check.has_shape("tokens", tokens, tuple(hidden.shape[:-1]), "the leading dimensions of hidden")
        _check.same_device("tokens", tokens, "hidden", hidden)
        (tokens,) = saveable(tokens.long())
        _check.in_range("temperature", temperature, 0.0, open_low=True)
        if softcap is not None:
            _check.in_range("softcap", softcap, 0.0, open_low=True)
        _check.in_range("logit_scale", logit_scale, float("-inf"))
        self.mask = mask
        self.how = Rows(_softmax_rows.NO_IGNORE, 0.0, 0.0, softcap or 0.0, logit_scale, temperature, with_entropy)
        flat, rows = mask.reshape(-1), hidden.reshape(mask.numel(), hidden.shape[-1])
        self.hidden, self.target = rows, tokens.reshape(-1)
        self.at: Tensor | None = None
        if hidden.device.type != "cpu" or not is_plain(hidden):
            self.hidden, self.target = rows.masked_fill(~flat.unsqueeze(-1), 0.0), self.target.masked_fill(~flat, 0)
        elif not flat.all():
            self.at = flat.nonzero().squeeze(-1)
            self.hidden, self.target = rows.index_select(0, self.at), self.target.index_select(0, self.at)

    def operands(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, low_rank: Any) -> Operands:
        hidden, weight, bias = check_operands(hidden, weight, bias)
        if hidden.device.type == "cpu" and is_plain(hidden):
            outside = (self.target < 0) | (self.target >= weight.shape[0])
            if outside.any():
                value = int(self.target[outside][0])
                raise IndexError(f"tokens must lie in [0, {weight.shape[0]}) where mask is True, got {value}")
        return hidden, weight, bias, *(low_rank or (None, None))

    def pick(self, x: Tensor) -> Tensor:
        """(rows,) of a tensor of mask's shape."""
        x = x.reshape(-1)
        return x if self.at is None else x.index_select(0, self.at)

    def spread(self, x: Tensor) -> Tensor:
        """A tensor of mask's shape of (rows,), 0 elsewhere."""
        if self.at is not None:
            x = x.new_zeros(self.mask.numel()).index_copy(0, self.at, x)
        return x.view(self.mask.shape)
