"""Log-probabilities of chosen tokens and the entropy of their distributions, as policy-gradient losses need them."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastllm.ops import _check, _softmax_rows
from fastllm.ops._op import Op, vjp


@overload
def token_logprobs(
    logits: Tensor, target: Tensor, *, temperature: float = ..., softcap: float | None = ...,
    with_entropy: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def token_logprobs(
    logits: Tensor, target: Tensor, *, temperature: float = ..., softcap: float | None = ...,
    with_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def token_logprobs(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log p[target]`` for ``p = softmax(softcap * tanh(logits / softcap) / temperature)``.

    Args:
        logits: (..., V), float32, bfloat16 or float16; float64 is served by the definition.
        target: (...) token indices in [0, V), any integer dtype.
        temperature: > 0, as in sampling.
        softcap: > 0, or None for no capping; applied before the temperature.
        with_entropy: also return ``H = -sum(p * log p)`` of each row, in nats, from the same pass over the logits.

    Returns:
        float32 (float64 for float64 logits) log-probabilities (...), never above 0; with_entropy: (logprobs, entropy).
        A logit of -inf has probability 0, counts 0 in the entropy and gets gradient 0; as a target it gives -inf.
        Differentiable in logits, any number of times; the gradient has the logits' dtype.

    Raises:
        TypeError: logits is not a floating-point tensor or target not an integer one.
        ValueError: shapes or devices do not match, or temperature or softcap is not positive.
        IndexError: on the CPU, a target outside [0, V). On a GPU such a target is a device assert in Triton's debug
            mode, and gives -inf otherwise.
    """
    _check.is_floating("logits", logits)
    if logits.dim() == 0:
        _check.has_rank_of_at_least("logits", logits, 1)
    shape = logits.shape[:-1]
    target = _softmax_rows.check_target(target, shape, logits)
    if temperature != 1.0:
        _check.in_range("temperature", temperature, 0.0, open_low=True)
    if softcap is not None:
        _check.in_range("softcap", softcap, 0.0, open_low=True)
    if len(shape) != 1:
        logits, target = logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1)
    logprobs, entropy, _ = _softmax_rows.call_checked(
        _token_logprobs, target, logits.shape[1], _softmax_rows.NO_IGNORE, logits, target, temperature, softcap or 0.0,
        with_entropy,
    )  # fmt: skip
    if len(shape) != 1:
        logprobs, entropy = logprobs.view(shape), entropy.view(shape) if with_entropy else entropy
    return (logprobs, entropy) if with_entropy else logprobs


def _definition(
    logits: Tensor, target: Tensor, temperature: float, softcap: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    logp = _softmax_rows.transform(logits, None, 1.0, softcap, temperature).log_softmax(-1)
    entropy = logp.new_empty(0)
    if with_entropy:  # 0 log 0 = 0, in the gradient too
        impossible = logp == float("-inf")
        entropy = -(logp.exp() * logp.masked_fill(impossible, 0.0)).sum(-1)
    stats = logp.new_zeros(5, logp.shape[0])  # the kernels' business: the definition's gradient does without
    return _softmax_rows.pick(logp, target), entropy, stats


def _fake(
    logits: Tensor, target: Tensor, temperature: float, softcap: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], _softmax_rows.wide(logits.dtype)
    entropy = logits.new_empty((rows,) if with_entropy else (0,), dtype=dtype)
    return logits.new_empty((rows,), dtype=dtype), entropy, logits.new_empty((5, rows), dtype=dtype)


def _backward_definition(
    logits: Tensor, target: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None, stats: Tensor,
    temperature: float, softcap: float,
) -> Tensor:  # fmt: skip
    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        return _definition(logits, target, temperature, softcap, grad_entropy is not None)[:2]

    (grad_logits,) = vjp(both, (logits,), (grad_logprobs, grad_entropy))
    assert grad_logits is not None
    return grad_logits


def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, ctx.temperature, ctx.softcap, ctx.with_entropy = inputs
    _, entropy, stats = output
    ctx.save_for_backward(logits, target, stats)
    ctx.mark_non_differentiable(stats, *(() if ctx.with_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 4
    if not ctx.with_entropy:
        grad_entropy = None
    if grad_logprobs is None:
        if grad_entropy is None:
            return None, *rest
        grad_logprobs = torch.zeros_like(grad_entropy)
    logits, target, stats = ctx.saved_tensors
    return (
        _token_logprobs_backward(logits, target, grad_logprobs, grad_entropy, stats, ctx.temperature, ctx.softcap),
        *rest,
    )


_token_logprobs = Op(
    "token_logprobs(Tensor logits, Tensor target, float temperature, float softcap, bool with_entropy)"
    " -> (Tensor logprobs, Tensor entropy, Tensor stats)",
    _definition,
    fake=_fake,
    triton="softmax_rows:token_logprobs",
    save=_save,
    backward=_backward,
    public=["token_logprobs"],
)
_token_logprobs_backward = Op(
    "token_logprobs_backward(Tensor logits, Tensor target, Tensor grad_logprobs, Tensor? grad_entropy, Tensor stats,"
    " float temperature, float softcap) -> Tensor",
    _backward_definition,
    fake=_backward_fake,
    triton="softmax_rows:token_logprobs_backward",
)
