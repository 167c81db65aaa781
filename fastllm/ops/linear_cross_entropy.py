"""Output head and cross entropy in one op, so that logits are never stored whole (Wijmans et al., arXiv 2411.09009)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm.ops import _check, _softmax_rows
from fastllm.ops._linear_rows import Rows, check_operands, logits, scaled, sweep
from fastllm.ops._op import Op, vjp
from fastllm.ops.cross_entropy import REDUCTIONS, items_argument, reduce_losses, row_losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
) -> Tensor:
    """``cross_entropy(logit_scale * (hidden @ weight.T + bias), target, ...)`` without the (N, V) logits.

    For "mean" and "sum" the gradients are found in the forward pass, while a chunk of logits is at hand: three matrix
    products, as many as the unfused form, and no logits kept for the backward pass.

    Args:
        hidden: (N, C), float32, bfloat16 or float16; float64 is served by the definition. N may be several dimensions.
        weight: (V, C) in hidden's dtype: an output head, or an embedding tied to it. Under autocast both are cast.
        target: (N,) class indices in [0, V), any integer dtype.
        bias: (V,), added before the scale.
        logit_scale: multiplies the logits, before `softcap` caps them.
        ignore_index, label_smoothing, z_loss, softcap, reduction, num_items: as in ``cross_entropy``.

    Returns:
        float32 (float64 for float64 inputs): 0-d, or (N,) for "none". 0 with zero gradients when no target is left.
        Differentiable in hidden, weight and bias, any number of times; weight gradients add up in fp32.

    Raises:
        TypeError: hidden, weight or bias is not a floating-point tensor, or target not an integer one.
        ValueError: shapes, dtypes or devices do not match, or a number is out of its range.
        IndexError: on the CPU, a target outside [0, V) that is not ignore_index.
    """
    hidden, weight, bias = check_operands(hidden, weight, bias)
    shape = hidden.shape[:-1]
    target = _softmax_rows.check_target(target, shape, hidden, "hidden")
    _check.in_range("label_smoothing", label_smoothing, 0.0, 1.0)
    _check.in_range("z_loss", z_loss, 0.0)
    if softcap is not None:
        _check.in_range("softcap", softcap, 0.0, open_low=True)
    _check.in_range("logit_scale", logit_scale, float("-inf"))
    _check.one_of("reduction", reduction, REDUCTIONS)
    items = -1.0
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f"num_items replaces the divisor of reduction='mean', got reduction={reduction!r}")
        num_items, items = items_argument(num_items, hidden.device)
    learns = torch.is_grad_enabled()
    loss = _softmax_rows.call_checked(
        _linear_cross_entropy, target, weight.shape[0], ignore_index,
        hidden.reshape(target.numel(), hidden.shape[-1]), weight, target.reshape(-1), bias, num_items, items, ignore_index,
        label_smoothing, z_loss, softcap or 0.0, logit_scale, REDUCTIONS.index(reduction),
        learns and hidden.requires_grad, learns and weight.requires_grad,
        learns and bias is not None and bias.requires_grad,
    )[0]  # fmt: skip
    return loss.view(shape) if reduction == "none" else loss


def _losses(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float, logit_scale: float,
) -> Tensor:  # fmt: skip
    ignored = (target == ignore_index).unsqueeze(-1)  # whatever such a row holds must not reach the weight's gradient
    z = _softmax_rows.transform(logits(hidden.masked_fill(ignored, 0.0), weight, bias), None, logit_scale, softcap, 1.0)
    return row_losses(z, target, ignore_index, label_smoothing, z_loss, 0.0)


def _scale(
    target: Tensor, ignore_index: int, num_items: Tensor | None, items: float, reduction: int, dtype: torch.dtype
) -> Tensor:
    if REDUCTIONS[reduction] != "mean":
        return torch.ones((), dtype=dtype, device=target.device)
    divisor = items if num_items is None and items >= 0 else num_items
    return 1 / _softmax_rows.divisor(target, ignore_index, divisor, dtype)


def _definition(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, num_items: Tensor | None, items: float,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float, reduction: int,
    *_: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    losses = _losses(hidden, weight, target, bias, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    scale = _scale(target, ignore_index, num_items, items, reduction, losses.dtype)
    none = losses.new_empty(0)
    stats = losses.new_zeros(5, losses.shape[0])  # the kernels' business, as are the gradients that follow
    return reduce_losses(losses, scale, reduction), stats, scale, none, none.clone(), none.clone()


# The gradients wait for the loss's own gradient, in fp16 training a loss scale that lifts them into the range of fp16.
# Until it comes, fp16 has them in fp32 and without the divisor of the mean; the other dtypes have the range.
def _kept_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _unscaled(scale: Tensor, hidden: Tensor) -> Tensor:
    return torch.ones_like(scale) if hidden.dtype == torch.float16 else scale


def _composed(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, num_items: Tensor | None, items: float,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float, reduction: int,
    hidden_grad: bool, weight_grad: bool, bias_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = Rows(ignore_index, label_smoothing, z_loss, softcap, logit_scale, 1.0, False)
    at_once = REDUCTIONS[reduction] != "none"
    scale = _scale(target, ignore_index, num_items, items, reduction, torch.float32)
    stats, *gradients = sweep(
        hidden, weight, target, bias, rows, grad=_unscaled(scale, hidden).expand(hidden.shape[0]),
        wanted=(at_once and hidden_grad, at_once and weight_grad, at_once and bias_grad), dtype=_kept_dtype(hidden),
    )  # fmt: skip
    losses = _softmax_rows.losses(stats, target, weight.shape[0], ignore_index, label_smoothing, z_loss)
    return reduce_losses(losses, scale, reduction), stats, scale, *gradients


def _fake(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, num_items: Tensor | None, items: float,
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float, logit_scale: float, reduction: int,
    *learns: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, dtype = hidden.shape[0], _softmax_rows.wide(hidden.dtype)
    whole = REDUCTIONS[reduction] == "none"
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return (
        hidden.new_empty((rows,) if whole else (), dtype=dtype),
        hidden.new_empty((5, rows), dtype=dtype),
        hidden.new_empty((), dtype=dtype),
        *(
            hidden.new_empty(s if learn and not whole else (0,), dtype=_kept_dtype(hidden))
            for s, learn in zip(shapes, learns)
        ),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, target, bias, _, _, *ctx.how, ctx.reduction, ctx.hidden_grad, ctx.weight_grad, ctx.bias_grad = (
        inputs
    )
    ctx.save_for_backward(hidden, weight, target, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 15
    hidden, weight, target, bias, stats, scale, *gradients = ctx.saved_tensors
    learns = (ctx.hidden_grad, ctx.weight_grad, ctx.bias_grad)
    if torch.is_grad_enabled():  # a gradient of this gradient is wanted: the definition's has one

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return reduce_losses(_losses(hidden, weight, target, bias, *ctx.how), scale, ctx.reduction)

        grad_hidden, grad_weight, grad_bias = vjp(loss, (hidden, weight, bias), (grad_loss,))
    elif REDUCTIONS[ctx.reduction] == "none" or any(
        t is not None and t.requires_grad and not learn for t, learn in zip((hidden, weight, bias), learns)
    ):  # also a graph that was traced while an operand was frozen
        learns = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
        grad_rows = (scale * grad_loss).expand(target.shape)
        grad_hidden, grad_weight, grad_bias = linear_rows_backward(
            hidden, weight, target, bias, stats, -grad_rows, None, *ctx.how, 1.0, *learns
        )
    else:
        factor = scale * grad_loss if hidden.dtype == torch.float16 else grad_loss
        grad_hidden, grad_weight, grad_bias = (scaled(g, factor) for g in gradients)
    grad_hidden, grad_weight, grad_bias = (
        g.to(t.dtype) if learn and g is not None else None
        for g, t, learn in zip((grad_hidden, grad_weight, grad_bias), (hidden, weight, bias), learns)
    )
    return grad_hidden, grad_weight, None, grad_bias, *(None,) * 11


def _rows_backward_definition(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, stats: Tensor, grad_logprobs: Tensor,
    grad_entropy: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    logit_scale: float, temperature: float, *learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def scores(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = hidden.masked_fill((target == ignore_index).unsqueeze(-1), 0.0)
        z = _softmax_rows.transform(logits(hidden, weight, bias), None, logit_scale, softcap, temperature)
        losses = row_losses(z, target, ignore_index, label_smoothing, z_loss, 0.0)
        logp = z.log_softmax(-1)
        return -losses, -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)

    grads = vjp(scores, (hidden, weight, bias), (grad_logprobs, grad_entropy))
    none = hidden.new_empty(0)
    return tuple(g.to(hidden.dtype) if learn and g is not None else none.clone() for g, learn in zip(grads, learns))  # type: ignore[return-value]


def _rows_backward_composed(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, stats: Tensor, grad_logprobs: Tensor,
    grad_entropy: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    logit_scale: float, temperature: float, *learns: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = Rows(ignore_index, label_smoothing, z_loss, softcap, logit_scale, temperature, grad_entropy is not None)
    _, *gradients = sweep(
        hidden, weight, target, bias, rows, stats=stats, grad=-grad_logprobs, grad_entropy=grad_entropy, wanted=learns
    )
    return tuple(gradients)  # type: ignore[return-value]


def _rows_backward_fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(s if learn else (0,)) for s, learn in zip(shapes, rest[-3:]))


linear_rows_backward = Op(
    "linear_rows_backward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor stats,"
    " Tensor grad_logprobs, Tensor? grad_entropy, int ignore_index, float label_smoothing, float z_loss, float softcap,"
    " float logit_scale, float temperature, bool hidden_grad, bool weight_grad, bool bias_grad)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _rows_backward_definition,
    fake=_rows_backward_fake,
    composed=_rows_backward_composed,
)
_linear_cross_entropy = Op(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? num_items, float items,"
    " int ignore_index, float label_smoothing, float z_loss, float softcap, float logit_scale, int reduction,"
    " bool hidden_grad, bool weight_grad, bool bias_grad) -> (Tensor loss, Tensor stats, Tensor scale,"
    " Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
    _definition,
    fake=_fake,
    composed=_composed,
    save=_save,
    backward=_backward,
    public=["linear_cross_entropy"],
)
