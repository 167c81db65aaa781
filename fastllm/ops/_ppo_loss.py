"""The policy-gradient loss over tokens as one operator: loss, statistics and gradients from one pass.

``fastllm.rl.ppo_loss`` is its public form and says what each argument means. Token tensors are (B, T), or (T,) for one
sequence or, with cu_seqlens, for packed ones. The kernels write the gradients while they read the tokens, and with them a
number, `scale`, for the backward pass to multiply them by: what remained to be done, which is nothing, 1, in C++.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm import backends
from fastllm.ops._op import Op, is_traced, vjp

KL_ESTIMATORS = ("k1", "k2", "k3")
LEVELS = ("token", "sequence")
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm")
VARIANTS = ("ppo", "cispo", "reinforce")
# What the op's `stats` holds, in this order; 0 where the call has no such tensor.
STATS = (
    "policy_loss", "value_loss", "entropy", "kl", "approx_kl", "approx_kl_k3", "clip_fraction", "value_clip_fraction",
    "ratio_mean", "ratio_max", "advantage_mean", "returns_mean", "value_mean", "explained_variance",
)  # fmt: skip
LOG_RATIO_BOUND = 20.0


class Settings(NamedTuple):
    """The numbers of a call; names are indices into the tuples above. dual_clip 0.0: none."""

    clip_low: float
    clip_high: float
    dual_clip: float
    value_clip: float
    value_coef: float
    entropy_coef: float
    kl_coef: float
    kl_estimator: int
    level: int
    aggregation: int
    variant: int


def kl_estimate(difference: Tensor, estimator: str) -> Tensor:
    """Schulman's estimators (joschu.net/blog/kl-approx) of the KL divergence from the reference, of log p - log p_ref."""
    if estimator == "k1":
        return difference
    return difference.square() / 2 if estimator == "k2" else torch.expm1(-difference) + difference


def definition(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, values: Tensor | None,
    old_values: Tensor | None, returns: Tensor | None, entropy: Tensor | None, ref_logprobs: Tensor | None,
    importance_weights: Tensor | None, cu_seqlens: Tensor | None, num_items: Tensor | None, items: float, *how: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    s = Settings(*how)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    row = None if cu_seqlens is None else _row_of_token(cu_seqlens, mask.shape[0])

    def sum_rows(x: Tensor) -> Tensor:
        if row is None or cu_seqlens is None:
            return x.sum(-1, keepdim=True)
        return x.new_zeros(cu_seqlens.shape[0] - 1).index_add(0, row, x)

    def spread(x: Tensor) -> Tensor:
        return x.expand(mask.shape) if row is None else x[row]

    def learnt(x: Tensor) -> Tensor:  # 0 where masked: what stands there reaches neither a result nor a gradient
        x = x.unsqueeze(-1) if x.dim() < mask.dim() else x
        return x.to(dtype).where(mask, 0.0)

    def given(x: Tensor) -> Tensor:
        return learnt(x.detach())

    weight = mask.to(dtype)
    count = weight.sum()
    tokens = sum_rows(weight)

    def mean(x: Tensor) -> Tensor:
        return (x * mask).sum() / count.clamp(min=1)

    aggregation = AGGREGATIONS[s.aggregation]
    divisor = (tokens > 0).sum().to(dtype) if aggregation.startswith("seq") else count
    if num_items is not None:
        divisor = num_items.detach().reshape(()).to(dtype)
    elif items >= 0:
        divisor = torch.full_like(count, items)
    scale = 1 / divisor.where(count > 0, float("inf"))
    if aggregation == "seq-mean-token-mean":
        weight = weight / spread(tokens.clamp(min=1))

    def aggregate(x: Tensor) -> Tensor:
        return (x * weight).sum() * scale

    # The policy: L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), where A < 0 at most -A dual_clip.
    logp, a = learnt(logprobs), given(advantages)
    token_log_ratio = log_ratio = logp - given(old_logprobs)
    if LEVELS[s.level] == "sequence":
        log_ratio = spread(sum_rows(log_ratio) / tokens.clamp(min=1))
    ratio = _bounded(log_ratio).exp()
    kept = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
    if VARIANTS[s.variant] == "ppo":
        policy, clipped = torch.maximum(-a * ratio, -a * kept), -a * kept > -a * ratio
        if s.dual_clip:
            policy = torch.where((a < 0) & (policy > -a * s.dual_clip), -a * s.dual_clip, policy)
    elif VARIANTS[s.variant] == "cispo":
        policy, clipped = -kept.detach() * a * logp, kept != ratio
    else:
        policy, clipped = -a * logp, torch.zeros_like(mask)
    if importance_weights is not None:
        policy = policy * given(importance_weights)
    stats = {"policy_loss": aggregate(policy)}
    loss = stats["policy_loss"]

    token_log_ratio = _bounded(token_log_ratio.detach())
    stats |= {
        "approx_kl": mean(given(old_logprobs) - logp),
        "approx_kl_k3": mean(torch.expm1(token_log_ratio) - token_log_ratio),
        "clip_fraction": mean(clipped.to(dtype)),
        "ratio_mean": mean(ratio),
        "ratio_max": ratio.masked_fill(~mask, 0.0).amax() if mask.numel() else count,
        "advantage_mean": mean(a),
    }
    if values is not None and returns is not None:
        v, r = learnt(values), given(returns)
        errors = (v - r).square()
        if old_values is not None:
            old = given(old_values)
            errors_clipped = (v.clamp(old - s.value_clip, old + s.value_clip) - r).square()
            stats["value_clip_fraction"] = mean((errors_clipped > errors).to(dtype))
            errors = torch.maximum(errors, errors_clipped)
        stats["value_loss"] = aggregate(0.5 * errors)
        loss = loss + _times(s.value_coef, stats["value_loss"], v)
        spread_of_returns = mean((r - mean(r)).square())
        unexplained = mean((r - v - mean(r - v)).square())
        stats |= {
            "returns_mean": mean(r),
            "value_mean": mean(v),
            "explained_variance": (1 - unexplained / spread_of_returns).where(spread_of_returns != 0, 0.0),
        }
    if entropy is not None:
        entropy = learnt(entropy)
        stats["entropy"] = aggregate(entropy)
        loss = loss - _times(s.entropy_coef, stats["entropy"], entropy)
    if ref_logprobs is not None:
        stats["kl"] = aggregate(kl_estimate(logp - given(ref_logprobs), KL_ESTIMATORS[s.kl_estimator]))
        loss = loss + _times(s.kl_coef, stats["kl"], logp)
    told = torch.stack([stats.get(name, torch.zeros_like(loss)).detach() for name in STATS])
    # The gradients are the kernels' business: those of the definition come from it.
    grads = (loss.new_zeros((0,) if x is None else mask.shape) for x in (logprobs, values, entropy))
    return loss, told, scale, *grads


def _bounded(log_ratio: Tensor) -> Tensor:
    """clamp(log_ratio, -20, 20), but a NaN has a gradient of NaN, not of 0."""
    beyond = log_ratio.abs() > LOG_RATIO_BOUND
    return torch.where(beyond, log_ratio.detach().clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), log_ratio)


def _times(coef: float, term: Tensor, of: Tensor) -> Tensor:
    """coef * term; 0 for coef 0, whatever the term is, and so is the gradient of what it is `of`, which then exists all the same."""
    return coef * term if coef else of.nan_to_num(0.0, 0.0, 0.0).sum() * 0.0


def _row_of_token(cu_seqlens: Tensor, tokens: int) -> Tensor:
    at = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), at, right=True)


def _fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    mask, values, entropy = rest[2], rest[3], rest[6]
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    grads = ((0,) if x is None else mask.shape for x in (logprobs, values, entropy))
    return tuple(logprobs.new_empty(shape, dtype=dtype) for shape in ((), (len(STATS),), (), *grads))


_TENSORS = 12  # of the arguments: logprobs to num_items
_LEARNT = (0, 4, 7)  # of these: logprobs, values, entropy


def _backward_definition(grad_loss: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs = rest[len(_LEARNT) :]
    learnt = [inputs[i] for i in _LEARNT]

    def loss(*learnt: Tensor) -> Tensor:
        arguments = list(inputs)
        for i, x in zip(_LEARNT, learnt):
            arguments[i] = x
        return definition(*arguments)[0]

    found = vjp(loss, learnt, (grad_loss,))
    return tuple(
        grad_loss.new_empty(0) if x is None else torch.zeros_like(x) if g is None else g.contiguous()
        for g, x in zip(found, learnt)
    )


def _backward_fake(grad_loss: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs = rest[len(_LEARNT) :]
    return tuple(
        grad_loss.new_empty(0)
        if inputs[i] is None
        else torch.empty_like(inputs[i], memory_format=torch.contiguous_format)
        for i in _LEARNT
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:], *inputs[:_TENSORS])
    ctx.how = inputs[_TENSORS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * (_TENSORS + len(ctx.how))
    return _rescaled(ctx, grad_loss, ctx.saved_tensors)


def _rescaled(ctx: Any, grad_loss: Tensor, saved: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The gradients as new tensors, from what a backward pass may take out of a checkpoint only once."""
    wanted: list[Tensor | None] = [None] * (_TENSORS + len(ctx.how))
    inputs = saved[1 + len(_LEARNT) :]
    for i, grad in zip(_LEARNT, _ppo_loss_backward(grad_loss, *saved, *ctx.how)):
        wanted[i] = None if inputs[i] is None else grad
    return tuple(wanted)


def _backward_once(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """As _backward, with what the forward pass stored as the gradients themselves: no tensors of their size, and no pass over them
    where nothing is left to multiply them by."""
    if grad_loss is None:
        return _backward(ctx, None)
    scale, *rest = saved = ctx.saved_tensors
    grads, inputs = rest[: len(_LEARNT)], rest[len(_LEARNT) :]
    as_stored = all(inputs[i] is None or inputs[i].dtype == torch.float32 for i in _LEARNT)
    if not as_stored or backends.forced not in (None, "cpp") or scale.device.type != "cpu":
        return _rescaled(ctx, grad_loss, saved)
    if is_traced(grad_loss) or grad_loss.item() * scale.item() != 1:
        _ppo_loss_backward_(grad_loss, scale, inputs[3], *grads)
    wanted: list[Tensor | None] = [None] * (_TENSORS + len(ctx.how))
    for i, grad in zip(_LEARNT, grads):
        if ctx.wanted[i]:
            wanted[i] = grad
    return tuple(wanted)


_ARGUMENTS = (
    "Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? values, Tensor? old_values,"
    " Tensor? returns, Tensor? entropy, Tensor? ref_logprobs, Tensor? importance_weights, Tensor? cu_seqlens,"
    " Tensor? num_items, float items, float clip_low, float clip_high, float dual_clip, float value_clip,"
    " float value_coef, float entropy_coef, float kl_coef, int kl_estimator, int level, int aggregation, int variant"
)
# Of what a call does not have the gradient is of shape (0,).
_GRADS = "Tensor grad_logprobs, Tensor grad_values, Tensor grad_entropy"
ppo_loss: Callable[..., tuple[Tensor, ...]] = Op(
    f"ppo_loss({_ARGUMENTS}) -> (Tensor loss, Tensor stats, Tensor scale, {_GRADS})",
    definition,
    fake=_fake,
    triton="ppo_loss:ppo_loss",
    save=_save,
    backward=_backward,
    backward_once=_backward_once,
    public=["ppo_loss"],
)
_ppo_loss_backward = Op(
    f"ppo_loss_backward(Tensor grad_loss, Tensor scale, {_GRADS.replace('grad_', 'stored_')}, {_ARGUMENTS}) -> ({_GRADS})",
    _backward_definition,
    fake=_backward_fake,
    triton="ppo_loss_backward:ppo_loss_backward",
)


def _scale_in_place(grad_loss: Tensor, scale: Tensor, mask: Tensor, *grads: Tensor) -> None:
    for grad in grads:
        grad.copy_((grad * (grad_loss * scale)).where(grad != 0, grad))


_ppo_loss_backward_ = Op(
    "ppo_loss_backward_(Tensor grad_loss, Tensor scale, Tensor mask, Tensor(a!) grad_logprobs, Tensor(b!) grad_values,"
    " Tensor(c!) grad_entropy) -> ()",
    _scale_in_place,
    fake=lambda *_: None,
)
