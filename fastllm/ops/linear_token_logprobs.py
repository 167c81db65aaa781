"""Output head and token log-probabilities in one op: ``token_logprobs`` without the logits."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastllm.ops import _check, _softmax_rows
from fastllm.ops._linear_rows import Rows, check_operands, logits, sweep
from fastllm.ops._op import Op, vjp
from fastllm.ops.linear_cross_entropy import linear_rows_backward


@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ..., temperature: float = ...,
    softcap: float | None = ..., logit_scale: float = ..., with_entropy: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = ..., temperature: float = ...,
    softcap: float | None = ..., logit_scale: float = ..., with_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``token_logprobs(logit_scale * (hidden @ weight.T + bias), target, ...)`` without the (..., V) logits.

    The backward pass makes the logits again, a block at a time: four matrix products in all.

    Args:
        hidden: (..., C), float32, bfloat16 or float16; float64 is served by the definition.
        weight: (V, C) in hidden's dtype. Under autocast both are cast.
        target: (...) token indices in [0, V), any integer dtype.
        bias: (V,), added before the scale.
        logit_scale: multiplies the logits, before `softcap` caps them, before `temperature` (> 0) divides them.
        with_entropy: also return the entropy of each distribution, in nats.

    Returns:
        float32 (float64 for float64 inputs) log-probabilities (...), never above 0; with_entropy: (logprobs, entropy).
        Differentiable in hidden, weight and bias, any number of times; weight gradients add up in fp32.

    Raises:
        TypeError: hidden, weight or bias is not a floating-point tensor, or target not an integer one.
        ValueError: shapes, dtypes or devices do not match, or a number is out of its range.
        IndexError: on the CPU, a target outside [0, V).
    """
    hidden, weight, bias = check_operands(hidden, weight, bias)
    shape = hidden.shape[:-1]
    target = _softmax_rows.check_target(target, shape, hidden, "hidden")
    _check.in_range("temperature", temperature, 0.0, open_low=True)
    if softcap is not None:
        _check.in_range("softcap", softcap, 0.0, open_low=True)
    _check.in_range("logit_scale", logit_scale, float("-inf"))
    logprobs, entropy, _ = _softmax_rows.call_checked(
        _linear_token_logprobs, target, weight.shape[0], _softmax_rows.NO_IGNORE,
        hidden.reshape(target.numel(), hidden.shape[-1]), weight, target.reshape(-1), bias, softcap or 0.0, logit_scale,
        temperature, with_entropy,
    )  # fmt: skip
    return (logprobs.view(shape), entropy.view(shape)) if with_entropy else logprobs.view(shape)


def _definition(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float, logit_scale: float,
    temperature: float, with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    z = _softmax_rows.transform(logits(hidden, weight, bias), None, logit_scale, softcap, temperature)
    logp = z.log_softmax(-1)
    entropy = logp.new_empty(0)
    if with_entropy:  # 0 log 0 = 0, in the gradient too
        entropy = -(logp.exp() * logp.masked_fill(logp == float("-inf"), 0.0)).sum(-1)
    return _softmax_rows.pick(logp, target), entropy, logp.new_zeros(5, logp.shape[0])


def _composed(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float, logit_scale: float,
    temperature: float, with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = Rows(_softmax_rows.NO_IGNORE, 0.0, 0.0, softcap, logit_scale, temperature, with_entropy)
    stats, *_ = sweep(hidden, weight, target, bias, rows)
    entropy = _softmax_rows.entropy(stats) if with_entropy else stats.new_empty(0)
    return _softmax_rows.logprobs(stats), entropy, stats


def _fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, dtype = hidden.shape[0], _softmax_rows.wide(hidden.dtype)
    entropy = hidden.new_empty((tokens,) if rest[-1] else (0,), dtype=dtype)
    return hidden.new_empty((tokens,), dtype=dtype), entropy, hidden.new_empty((5, tokens), dtype=dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, target, bias, *ctx.how, ctx.with_entropy = inputs
    _, entropy, stats = output
    ctx.learns = [t is not None and t.requires_grad for t in (hidden, weight, bias)]
    ctx.save_for_backward(hidden, weight, target, bias, stats)
    ctx.mark_non_differentiable(stats, *(() if ctx.with_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if not ctx.with_entropy:
        grad_entropy = None
    if grad_logprobs is None:
        if grad_entropy is None:
            return (None,) * 8
        grad_logprobs = torch.zeros_like(grad_entropy)
    hidden, weight, target, bias, stats = ctx.saved_tensors
    if torch.is_grad_enabled():  # a gradient of this gradient is wanted: the definition's has one
        how = (*ctx.how, ctx.with_entropy)

        def both(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            return _definition(hidden, weight, target, bias, *how)[:2]

        grads = vjp(both, (hidden, weight, bias), (grad_logprobs, grad_entropy))
    else:
        softcap, logit_scale, temperature = ctx.how
        wide = linear_rows_backward(
            hidden, weight, target, bias, stats, grad_logprobs, grad_entropy, _softmax_rows.NO_IGNORE, 0.0, 0.0,
            softcap, logit_scale, temperature, *ctx.learns,
        )  # fmt: skip
        grads = tuple(g.to(t.dtype) if learn else None for g, t, learn in zip(wide, (hidden, weight, bias), ctx.learns))
    return grads[0], grads[1], None, grads[2], None, None, None, None


_linear_token_logprobs = Op(
    "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, float softcap, float logit_scale,"
    " float temperature, bool with_entropy) -> (Tensor logprobs, Tensor entropy, Tensor stats)",
    _definition,
    fake=_fake,
    composed=_composed,
    save=_save,
    backward=_backward,
    public=["linear_token_logprobs"],
)
