"""The loop under the fused linear losses: logits of a few tokens and classes at a time, their softmax statistics, their
gradient written over them, and the matrix products that need it. The logits of all tokens never exist at once.

Tokens are the outer loop, classes the inner one. Where statistics and gradient come in one sweep the logits of a chunk
of tokens stay (three products in all); where the statistics are known beforehand each block is made again and used at
once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import _check, _softmax_rows

# Bytes of logits held at once. Larger chunks add up the weight gradient fewer times; the largest are logits whole.
BUFFER_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
# Classes per product on the CPU: its blocked matrix product is fastest when a block of the weight stays in cache. A GPU
# takes them all in one.
CPU_CLASSES = 4096


@dataclass(frozen=True)
class Rows:
    """What happens to a row of logits: the arguments that the softmax kernels share."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    logit_scale: float
    temperature: float
    with_entropy: bool


def sweep(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    rows: Rows,
    *,
    stats: Tensor | None = None,
    grad: Tensor | None = None,
    grad_entropy: Tensor | None = None,
    wanted: tuple[bool, bool, bool] = (False, False, False),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics (5, N) of every row and the fp32 gradients of hidden, weight and bias that are `wanted` (empty: not).

    Args:
        hidden: (N, C). weight: (V, C). target: (N,) int64. bias: (V,) or None.
        stats: the statistics, where an earlier sweep found them; None: found here.
        grad, grad_entropy: (N,) gradients of each row's loss and entropy.
    """
    with torch.no_grad():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach().to(hidden.dtype)
        tokens, classes = hidden.shape[0], weight.shape[0]
        if hidden.device.type == "cpu":
            _softmax_rows.check_range(target, classes, rows.ignore_index)
            kept = (target != rows.ignore_index).nonzero().squeeze(-1)
            if kept.numel() < 0.9 * tokens:  # most prompts of supervised fine-tuning: no product is spent on them
                return _of_kept(kept, hidden, weight, target, bias, rows, stats, grad, grad_entropy, wanted)
        retain = stats is None and any(wanted)
        step = min(classes, CPU_CLASSES) if hidden.device.type == "cpu" else classes
        blocks = [(first, min(first + step, classes)) for first in range(0, classes, max(step, 1))]
        budget = BUFFER_BYTES.get(hidden.device.type, 64 << 20)
        if hidden.device.type == "cpu" and hidden.dtype == torch.float32:
            budget //= 2  # fp32 products are slow enough for smaller chunks to cost nothing
        at_once = budget // ((classes if retain else step) * hidden.element_size() or 1)
        count = max(1, -(-tokens // max(1, at_once)))  # chunks, of nearly equal size
        size = -(-tokens // count)
        buffer = hidden.new_empty(size * (classes if retain else step))

        found = hidden.new_empty((5, tokens), dtype=torch.float32) if stats is None else stats
        grad_hidden, grad_weight, grad_bias = (
            torch.empty(shape if want else (0,), dtype=torch.float32, device=hidden.device)
            for shape, want in zip((hidden.shape, weight.shape, weight.shape[:1]), wanted)
        )
        if not tokens:
            grad_weight.zero_(), grad_bias.zero_()
        for begin in range(0, tokens, max(size, 1)):
            end = min(begin + size, tokens)
            h, t = hidden[begin:end], target[begin:end]
            held = []
            part = None
            for first, last in blocks:
                start = (end - begin) * first if retain else 0
                block = buffer[start : start + (end - begin) * (last - first)].view(end - begin, last - first)
                held.append(block)
                if stats is None:
                    _logits_into(block, h, weight, bias, first, last)
                    part = _softmax_rows.statistics(
                        block, t, None, part, first, rows.ignore_index, rows.logit_scale, rows.softcap,
                        rows.temperature,
                        rows.label_smoothing > 0, rows.with_entropy,
                    )  # fmt: skip
            if part is not None:
                found[:, begin:end] = part
            if not any(wanted):
                continue
            assert grad is not None
            for (first, last), block in zip(blocks, held):
                w = weight[first:last]
                if not retain:
                    _logits_into(block, h, weight, bias, first, last)
                _softmax_rows.gradient_(
                    block, t, None, found[:, begin:end].contiguous(), grad[begin:end],
                    None if grad_entropy is None else grad_entropy[begin:end], first, classes, rows.ignore_index,
                    rows.logit_scale, rows.softcap, rows.temperature, rows.label_smoothing, rows.z_loss,
                )  # fmt: skip
                if wanted[0]:
                    _add(grad_hidden[begin:end], block, w, fresh=first == 0)
                if wanted[1]:
                    _add(grad_weight[first:last], block.t(), h, fresh=begin == 0)
                if wanted[2]:
                    column_sums = block.sum(0, dtype=torch.float32)
                    grad_bias[first:last] = column_sums if begin == 0 else grad_bias[first:last] + column_sums
        return found, grad_hidden, grad_weight, grad_bias


def _logits_into(block: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, first: int, last: int) -> None:
    """The logits of classes first to last, rounded as the plain head rounds them."""
    if bias is None:
        torch.mm(hidden, weight[first:last].t(), out=block)
    else:
        torch.addmm(bias[first:last], hidden, weight[first:last].t(), out=block)


def _add(total: Tensor, a: Tensor, b: Tensor, fresh: bool) -> None:
    """total += a @ b in fp32; total = a @ b where it is `fresh`."""
    wide = a.device.type == "cuda" and a.dtype != torch.float32
    product = torch.mm(a, b, out_dtype=torch.float32) if wide else torch.mm(a, b)
    total.copy_(product) if fresh else total.add_(product)


def _of_kept(
    kept: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, rows: Rows, stats: Tensor | None,
    grad: Tensor | None, grad_entropy: Tensor | None, wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`sweep` over the rows that are not ignored, its results put back among the others."""
    part, grad_hidden, grad_weight, grad_bias = sweep(
        hidden[kept], weight, target[kept], bias, rows, wanted=wanted,
        stats=None if stats is None else stats[:, kept].contiguous(),
        grad=None if grad is None else grad[kept],
        grad_entropy=None if grad_entropy is None else grad_entropy[kept],
    )  # fmt: skip
    if stats is None:
        stats = part.new_tensor([0.0, 1.0, 0.0, 0.0, 0.0]).unsqueeze(-1).repeat(1, hidden.shape[0])
        stats[:, kept] = part
    if wanted[0]:
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32).index_copy_(0, kept, grad_hidden)
    return stats, grad_hidden, grad_weight, grad_bias


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain head, as the definitions use it."""
    return F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))


def scaled(gradient: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """An fp32 gradient times a 0-d factor, rounded once to `dtype`, without an fp32 copy between."""
    if factor is None:
        return gradient.to(dtype)
    return torch.mul(gradient, factor.to(gradient.dtype), out=torch.empty_like(gradient, dtype=dtype))


def check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden (..., C), weight (V, C), bias (V,) or None, cast as ``F.linear`` would be under autocast."""
    _check.is_floating("hidden", hidden)
    _check.is_floating("weight", weight)
    _check.has_rank_of_at_least("hidden", hidden, 1)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must have shape (V, {hidden.shape[-1]}) (the last dimension of hidden), got {tuple(weight.shape)}"
        )
    _check.same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        _check.is_floating("bias", bias)
        _check.has_shape("bias", bias, weight.shape[:1], "the first dimension of weight")
        _check.same_device("bias", bias, "hidden", hidden)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    return hidden, weight, bias
