"""Cross entropy over a vocabulary, with label smoothing (Szegedy et al., arXiv 1512.00567, section 7), z-loss (PaLM,
arXiv 2204.02311, section 5) and soft-capped logits (Gemma 2, arXiv 2408.00118, section 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm.ops import _check, _softmax_rows
from fastllm.ops._op import Op, vjp

REDUCTIONS = ("none", "mean", "sum")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Each row's ``lse - z[target]`` for ``z = softcap * tanh(logits / softcap)`` and ``lse = log(sum(exp(z)))``.

    With label smoothing ε as in ``torch.nn.functional.cross_entropy``, and z-loss, a row's loss is
    ``(1 - ε) * (lse - z[target]) + ε * mean(lse - z) + z_loss * lse²``.

    Args:
        logits: (N, V), float32, bfloat16 or float16; float64 is served by the definition. N may be several dimensions.
        target: (N,) class indices in [0, V), any integer dtype.
        ignore_index: a row with this target contributes neither loss nor gradient, whatever its logits hold.
        label_smoothing: ε in [0, 1].
        z_loss: weight of lse², >= 0.
        softcap: > 0, or None for no capping.
        reduction: "mean" over the targets that are not ignored, "sum", or "none" for one loss a row.
        num_items: for "mean", what to divide the sum by in place of the number of targets: the count over all
            micro batches, as Transformers' num_items_in_batch. A number >= 0 or a tensor with one element, which is
            not read on the host.

    Returns:
        float32 (float64 for float64 logits): 0-d, or (N,) for "none". 0 with zero gradients when no target is left.
        Differentiable in logits, any number of times; the gradient has the logits' dtype.

    Raises:
        TypeError: logits is not a floating-point tensor or target not an integer one.
        ValueError: shapes or devices do not match, or a number is out of its range.
        IndexError: on the CPU, a target outside [0, V) that is not ignore_index. On a GPU such a target is a device
            assert in Triton's debug mode, and gives an infinite loss otherwise.
    """
    _check.is_floating("logits", logits)
    if logits.dim() == 0:
        _check.has_rank_of_at_least("logits", logits, 1)
    shape = logits.shape[:-1]
    target = _softmax_rows.check_target(target, shape, logits)
    if label_smoothing or z_loss or softcap is not None:
        _check.in_range("label_smoothing", label_smoothing, 0.0, 1.0)
        _check.in_range("z_loss", z_loss, 0.0)
        if softcap is not None:
            _check.in_range("softcap", softcap, 0.0, open_low=True)
    _check.one_of("reduction", reduction, REDUCTIONS)
    items = -1.0
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(f"num_items replaces the divisor of reduction='mean', got reduction={reduction!r}")
        num_items, items = items_argument(num_items, logits.device)
    if len(shape) != 1:
        logits, target = logits.reshape(target.numel(), logits.shape[-1]), target.reshape(-1)
    loss = _softmax_rows.call_checked(
        _cross_entropy, target, logits.shape[1], ignore_index, logits, target, num_items, items, ignore_index,
        label_smoothing, z_loss, softcap or 0.0, REDUCTIONS.index(reduction),
    )[0]  # fmt: skip
    return loss.view(shape) if reduction == "none" and len(shape) != 1 else loss


def items_argument(num_items: Any, device: torch.device) -> tuple[Tensor | None, float]:
    """num_items as the op takes it: a tensor, or a number with None in the tensor's place."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must have one element, got shape {tuple(num_items.shape)}")
        return num_items.detach().to(device), -1.0
    _check.in_range("num_items", num_items, 0.0)
    return None, float(num_items)


def row_losses(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float
) -> Tensor:
    ignored = target == ignore_index
    z = _softmax_rows.transform(logits.masked_fill(ignored.unsqueeze(-1), 0.0), None, 1.0, softcap, 1.0)
    logp = z.log_softmax(-1)
    loss = -_softmax_rows.pick(logp, target.masked_fill(ignored, 0))
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logp.mean(-1)
    if z_loss:
        loss = loss + z_loss * z.logsumexp(-1).square()
    return loss.masked_fill(ignored, 0.0)


def reduce_losses(losses: Tensor, scale: Tensor, reduction: int) -> Tensor:
    return losses if REDUCTIONS[reduction] == "none" else losses.sum() * scale


def _definition(
    logits: Tensor, target: Tensor, num_items: Tensor | None, items: float, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float, reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    losses = row_losses(logits, target, ignore_index, label_smoothing, z_loss, softcap)
    scale = losses.new_ones(())
    if REDUCTIONS[reduction] == "mean":
        divisor = items if num_items is None and items >= 0 else num_items
        scale = 1 / _softmax_rows.divisor(target, ignore_index, divisor, losses.dtype)
    stats = losses.new_zeros(5, losses.shape[0])  # the kernels' business: the definition's gradient does without
    return reduce_losses(losses, scale, reduction), stats, scale


def _fake(
    logits: Tensor, target: Tensor, num_items: Tensor | None, items: float, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float, reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, dtype = logits.shape[0], _softmax_rows.wide(logits.dtype)
    loss = logits.new_empty((rows,) if REDUCTIONS[reduction] == "none" else (), dtype=dtype)
    return loss, logits.new_empty((5, rows), dtype=dtype), logits.new_empty((), dtype=dtype)


def _backward_definition(
    logits: Tensor, target: Tensor, grad_loss: Tensor, stats: Tensor, scale: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, reduction: int,
) -> Tensor:  # fmt: skip
    def loss(logits: Tensor) -> Tensor:
        return reduce_losses(
            row_losses(logits, target, ignore_index, label_smoothing, z_loss, softcap), scale, reduction
        )

    (grad_logits,) = vjp(loss, (logits,), (grad_loss,))
    assert grad_logits is not None
    return grad_logits


def _backward_fake(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, target, _, _, *ctx.how = inputs
    _, stats, scale = output
    ctx.save_for_backward(logits, target, stats, scale)
    ctx.mark_non_differentiable(stats, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    rest = (None,) * 8
    if grad_loss is None:
        return None, *rest
    logits, target, stats, scale = ctx.saved_tensors
    return _cross_entropy_backward(logits, target, grad_loss, stats, scale, *ctx.how), *rest


_cross_entropy = Op(
    "cross_entropy(Tensor logits, Tensor target, Tensor? num_items, float items, int ignore_index,"
    " float label_smoothing, float z_loss, float softcap, int reduction) -> (Tensor loss, Tensor stats, Tensor scale)",
    _definition,
    fake=_fake,
    triton="softmax_rows:cross_entropy",
    save=_save,
    backward=_backward,
    public=["cross_entropy"],
)
_cross_entropy_backward = Op(
    "cross_entropy_backward(Tensor logits, Tensor target, Tensor grad_loss, Tensor stats, Tensor scale,"
    " int ignore_index, float label_smoothing, float z_loss, float softcap, int reduction) -> Tensor",
    _backward_definition,
    fake=_backward_fake,
    triton="softmax_rows:cross_entropy_backward",
)
