"""Log-probabilities of tokens from hidden states and an LM head, for losses that are to be differentiated in both.

Logits are made a chunk at a time (``ops/_linear_rows.py``) and there are two ways to a gradient. Where a token's derivative of
the loss follows from its own log-probability, it is asked for while the token's logits are at hand: three matrix products.
Where it depends on other tokens, the backward pass makes the logits again: four.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastllm import backends, ops
from fastllm.ops import _linear_rows, _softmax_rows
from fastllm.ops._linear_rows import Rows
from fastllm.ops._op import vjp

# (hidden (N, C), weight (V, C), bias (V,), u (N, R), b (V, R)): logits are hidden @ weight.T + bias + u @ b.T
Operands = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", "Tensor | None"]
# (first token, last token, their log-probabilities, their entropies) -> derivatives of the loss in the two
Derivative = Callable[[int, int, Tensor, "Tensor | None"], "tuple[Tensor, Tensor | None]"]


def is_plain(hidden: Tensor) -> bool:
    """Whether this is an ordinary eager call on tensors that have kernels; the registered ops serve all others."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or hidden.dtype not in backends.KERNEL_DTYPES
        or hidden.device.type not in ("cpu", "cuda")
    )


def logprobs(operands: Operands, target: Tensor, how: Rows) -> tuple[Tensor, Tensor | None]:
    """(N,) log-probabilities and entropies (None unless how.with_entropy), differentiable in every operand."""
    if not is_plain(operands[0]) or operands[3] is None:
        return composed(operands, target, how)
    found = _Rows.apply(how, target, None, None, None, *operands)
    return found[0], found[1] if how.with_entropy else None


def loss_of(
    operands: Operands, target: Tensor, how: Rows, derivative: Derivative, scale: Tensor, loss: Callable[..., Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(0, log-probabilities, entropies): a 0-d zero whose gradient is `scale` times what `derivative` says, and the other two
    without gradients. ``loss(*operands)`` is the same loss by the ops, for derivatives of the derivative."""
    zero, found, entropy = _Rows.apply(how, target, derivative, scale, loss, *operands)
    return zero, found, entropy if how.with_entropy else None


def composed(operands: Operands, target: Tensor, how: Rows) -> tuple[Tensor, Tensor | None]:
    """`logprobs` by the registered op."""
    hidden, weight, bias, u, b = operands
    if u is not None and b is not None:
        hidden, weight = torch.cat((hidden, u.to(hidden.dtype)), -1), torch.cat((weight, b.to(hidden.dtype)), -1)
    options: dict[str, Any] = {
        "bias": bias, "temperature": how.temperature, "softcap": how.softcap or None, "logit_scale": how.logit_scale,
    }  # fmt: skip
    if how.with_entropy:
        return ops.linear_token_logprobs(hidden, weight, target, with_entropy=True, **options)
    return ops.linear_token_logprobs(hidden, weight, target, **options), None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, how: Rows, target: Tensor, derivative: Derivative | None, scale: Tensor | None,
        loss: Callable[..., Tensor] | None, *operands: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        hidden, weight, bias, u, b = operands
        wanted = ctx.needs_input_grad[5:]

        def grad(begin: int, end: int, stats: Tensor) -> tuple[Tensor, Tensor | None]:
            assert derivative is not None
            entropy = _softmax_rows.entropy(stats) if how.with_entropy else None
            found, found_entropy = derivative(begin, end, _softmax_rows.logprobs(stats), entropy)
            return -found, found_entropy

        stats, *gradients = _linear_rows.sweep(
            hidden, weight, target, bias, how, low_rank=None if u is None else (u, b),
            grad=None if derivative is None else grad, wanted=wanted if derivative is not None else (False,) * 5,
            dtype=torch.float32 if hidden.dtype == torch.float16 else hidden.dtype,
        )  # fmt: skip
        found = _softmax_rows.logprobs(stats)
        entropy = _softmax_rows.entropy(stats) if how.with_entropy else stats.new_empty(0)
        ctx.how, ctx.loss, ctx.forced, ctx.at_once = how, loss, backends.forced, derivative is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*operands, target, stats, scale, *gradients)
        if derivative is None:
            ctx.mark_non_differentiable(*(() if how.with_entropy else (entropy,)))
            return found, entropy
        ctx.mark_non_differentiable(found, entropy)
        return stats.new_zeros(()), found, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # asked for once: a checkpoint has them only once
        *operands, target, stats, scale = saved[:8]
        wanted = ctx.needs_input_grad[5:]
        first, second = grads[0], None if ctx.at_once or not ctx.how.with_entropy else grads[1]
        if first is None and second is None:
            return (None,) * 10
        found: Any
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted: that of the ops has one

            def again(*operands: Any) -> Any:
                return ctx.loss(*operands) if ctx.at_once else composed(operands, target, ctx.how)

            found = vjp(again, operands, (first, second))
        elif ctx.at_once:
            assert first is not None
            factor = first * scale
            found = [_linear_rows.scaled(g, factor) if want else None for g, want in zip(saved[8:], wanted)]
        else:
            hidden, weight, bias, u, b = operands
            if first is None:
                first = torch.zeros_like(second)  # type: ignore[arg-type]
            with backends.use_backend(ctx.forced) if ctx.forced else contextlib.nullcontext():
                _, *found = _linear_rows.sweep(
                    hidden, weight, target, bias, ctx.how, low_rank=None if u is None else (u, b), stats=stats,
                    grad=-first, grad_entropy=second, wanted=wanted,
                )  # fmt: skip
        each = itertools.zip_longest(found, operands, wanted)  # without an adapter, a sweep has no gradients for one
        return (None,) * 5 + tuple(g.to(x.dtype) if want and g is not None else None for g, x, want in each)
