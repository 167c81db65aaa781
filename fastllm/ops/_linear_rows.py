"""The loop under the fused linear losses: logits of a few tokens and classes at a time, their softmax statistics, their
gradient written over them, and the matrix products that need it. The logits of all tokens never exist at once.

Tokens are the outer loop, classes the inner one. Where statistics and gradient come in one sweep the logits of a chunk
of tokens stay (three products in all); where the statistics are known beforehand each block is made again and used at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.kernels import cpp
from fastllm.ops import _check, _softmax_rows
from fastllm.ops._op import is_batched, keeps_graph

# Bytes of logits held at once. Larger chunks add up the weight gradient fewer times, so where that needs an fp32 matrix
# the buffer may also grow to a quarter of it; and from SPLIT_BYTES on the logits of all tokens are at least two chunks.
BUFFER_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
SPLIT_BYTES = 8 << 20
# Classes per product on the CPU: its blocked matrix product is fastest when a block of the weight stays in cache. A GPU
# takes them all in one.
CPU_CLASSES = 4096
# Rows of the hidden gradient that are added up at once over blocks of classes, in fp32, where the logits of all classes are held.
SUM_ROWS = 1024


# (first row, last row, their statistics (5, rows)) -> gradients of each row's loss and of its entropy
Gradients = Callable[[int, int, Tensor], "tuple[Tensor, Tensor | None]"]


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
    grad: Tensor | Gradients | None = None,
    grad_entropy: Tensor | None = None,
    wanted: Sequence[bool] = (False, False, False),
    dtype: torch.dtype | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """Statistics (5, N) of every row and the gradients of hidden, weight and bias that are `wanted` (empty: not).

    Args:
        hidden: (N, C). weight: (V, C). target: (N,) int64. bias: (V,) or None.
        stats: the statistics, where an earlier sweep found them; None: found here.
        grad, grad_entropy: (N,) gradients of each row's loss and entropy; or in place of both a function that finds them for
            the rows first to last from their statistics. Then, and with low_rank, no row may be ignored.
        dtype: of the gradients, hidden's unless given. Sums over chunks are fp32, and rounded to it once.
        low_rank: (u, b), (N, R) and (V, R) in hidden's dtype or in fp32: the logits are those of hidden plus ``u @ b.T``, and two
            more gradients, of u and of b, are returned in fp32 where the fourth and fifth of `wanted` ask for them.
    """
    with torch.no_grad():
        hidden, weight = hidden.detach(), weight.detach()
        bias = None if bias is None else bias.detach().to(hidden.dtype)
        if low_rank is not None:
            dtypes = torch.promote_types(low_rank[0].dtype, low_rank[1].dtype)
            low_rank = low_rank[0].detach().to(dtypes), low_rank[1].detach().to(dtypes)
        if hidden.device.type == "cpu":
            _softmax_rows.check_range(target, weight.shape[0], rows.ignore_index)
            kept = (target != rows.ignore_index).nonzero().squeeze(-1)
            if kept.numel() < target.numel():  # prompts of supervised fine-tuning: no product is spent on them
                return _of_kept(kept, hidden, weight, target, bias, rows, stats, grad, grad_entropy, wanted, dtype)
        elif rows.ignore_index != _softmax_rows.NO_IGNORE:  # NaN in such a row must not reach the weight's gradient
            hidden = hidden.masked_fill((target == rows.ignore_index).unsqueeze(-1), 0.0)
        return _sweep(
            hidden, weight, target, bias, rows, stats, grad, grad_entropy, wanted, dtype or hidden.dtype, low_rank
        )


def _sweep(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, rows: Rows, stats: Tensor | None,
    grad: Tensor | Gradients | None, grad_entropy: Tensor | None, wanted: Sequence[bool], dtype: torch.dtype,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    (tokens, channels), classes = hidden.shape, weight.shape[0]
    retain = stats is None and any(wanted)
    size, step = _chunk(tokens, weight, retain, wanted[1])
    blocks = [(first, min(first + step, classes)) for first in range(0, classes, step)]
    chunks = [(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]
    found = hidden.new_empty((5, tokens), dtype=torch.float32) if stats is None else stats
    grad_hidden, grad_weight, grad_bias = (
        _fresh(hidden, shape if want else (0,), dtype)
        for shape, want in zip((hidden.shape, weight.shape, weight.shape[:1]), wanted)
    )
    sum_low_rank = [  # of so few numbers that they are all in fp32
        torch.zeros_like(t, dtype=torch.float32) if want else t.new_empty(0)
        for t, want in zip(low_rank or (), wanted[3:])
    ]
    if not tokens:
        return found, grad_hidden, grad_weight.zero_(), grad_bias.zero_(), *sum_low_rank

    # A gradient that is one product is written where it belongs, and on the CPU also one that is two: the first is then
    # an addend inside the second, which adds up in fp32. A sum of more products has an fp32 matrix to add up in.
    at_most = 2 if hidden.device.type == "cpu" else 1
    few = min(size, SUM_ROWS) if retain and len(blocks) > at_most else size
    sum_hidden = _sum_like(grad_hidden[:few], len(blocks) > at_most)
    sum_weight = _sum_like(grad_weight, len(chunks) > at_most)
    sum_bias = hidden.new_zeros(classes if wanted[2] else 0, dtype=torch.float32)
    buffer = _fresh(hidden, (size * (classes if retain else step),), hidden.dtype)
    narrow = dtype == hidden.dtype  # a gradient that is not added up has no product apart from itself
    lengths = [few * (sum_hidden is not None or not narrow), step * (sum_weight is not None or not narrow)]
    product = _fresh(hidden, (max(lengths) * channels * any(wanted),), hidden.dtype)
    block = buffer
    for begin, end in chunks:
        h, t, count = hidden[begin:end], target[begin:end], end - begin
        u = None if low_rank is None else (low_rank[0][begin:end], low_rank[1])
        held = []
        part = None
        for first, last in blocks:
            start = count * first if retain else 0
            block = buffer[start : start + count * (last - first)].view(count, last - first)
            held.append(block)
            if stats is None:
                _logits_into(block, h, weight, bias, first, last, u)
                part = _softmax_rows.statistics(
                    block, t, None, part, first, rows.ignore_index, rows.logit_scale, rows.softcap, rows.temperature,
                    rows.label_smoothing > 0, rows.with_entropy,
                )  # fmt: skip
        if part is None:
            part = found[:, begin:end].contiguous()
        else:
            found[:, begin:end] = part
        if not any(wanted):
            continue
        assert grad is not None
        if isinstance(grad, Tensor):
            grads, grads_entropy = grad[begin:end], None if grad_entropy is None else grad_entropy[begin:end]
        else:
            grads, grads_entropy = grad(begin, end, part)
        for (first, last), block in zip(blocks, held):
            if not retain:
                _logits_into(block, h, weight, bias, first, last, u)
            _softmax_rows.gradient_(
                block, t, None, part, grads, grads_entropy, first, classes, rows.ignore_index, rows.logit_scale,
                rows.softcap, rows.temperature, rows.label_smoothing, rows.z_loss,
            )  # fmt: skip
            if wanted[0] and not retain:
                total = grad_hidden[begin:end] if sum_hidden is None else sum_hidden[:count]
                _add(total, block, weight[first:last], product, fresh=first == 0)
            if wanted[1]:
                total = (grad_weight if sum_weight is None else sum_weight)[first:last]
                _add(total, block.t(), h, product, fresh=begin == 0)
            if wanted[2]:
                sum_bias[first:last] += block.sum(0, dtype=torch.float32)
            if u is not None:
                _add_low_rank(sum_low_rank, block, u, begin, first, wanted)
        if wanted[0] and retain:
            for into, *parts in zip(*(t.split(few) for t in (grad_hidden[begin:end], *held))):
                total = into if sum_hidden is None else sum_hidden[: len(into)]
                for (first, last), part in zip(blocks, parts):
                    _add(total, part, weight[first:last], product, fresh=first == 0)
                if sum_hidden is not None:
                    into.copy_(total)
        elif wanted[0] and sum_hidden is not None:
            grad_hidden[begin:end] = sum_hidden[:count]
    del buffer, product, block, held  # before the narrow copy of the weight gradient comes to life
    if sum_weight is not None:
        grad_weight.copy_(sum_weight)
    return found, grad_hidden, grad_weight, grad_bias.copy_(sum_bias), *sum_low_rank


def _chunk(tokens: int, weight: Tensor, retain: bool, sums_weight: bool) -> tuple[int, int]:
    """(tokens, classes) of logits that are made at once; where they are retained, chunks of tokens have all classes."""
    classes, width = weight.shape[0], weight.element_size()
    step = max(1, min(classes, CPU_CLASSES) if weight.device.type == "cpu" else classes)
    budget = BUFFER_BYTES.get(weight.device.type, 64 << 20)
    if retain and sums_weight and width < 4:
        budget = max(budget, weight.numel())
        if weight.device.type == "cpu" and tokens * classes * width <= 2 * (budget + 4 * weight.numel()):
            budget += 4 * weight.numel()  # two chunks do without the fp32 sum
    at_once = max(1, budget // (max(1, classes if retain else step) * width))
    chunks = max(1, -(-tokens // at_once))
    if (retain or step == classes) and tokens * classes * width > SPLIT_BYTES:
        chunks = max(chunks, 2)
    return max(1, -(-tokens // chunks)), step  # of nearly equal size


def _sum_like(gradient: Tensor, apart: bool) -> Tensor | None:
    """Where products add up to a gradient: an fp32 matrix, or None for the gradient itself."""
    if not apart or gradient.dtype == torch.float32:
        return None
    return _fresh(gradient, gradient.shape, torch.float32)


def _fresh(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; on the CPU in huge pages, without which first touches cost a tenth of the whole op."""
    tensor = like.new_empty(shape, dtype=dtype)
    if tensor.device.type == "cpu":
        cpp.advise_huge_pages(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return tensor


def _logits_into(
    block: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, first: int, last: int,
    low_rank: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    """The logits of classes first to last, rounded as the plain head and an adapter beside it round them."""
    if bias is None:
        torch.mm(hidden, weight[first:last].t(), out=block)
    else:
        torch.addmm(bias[first:last], hidden, weight[first:last].t(), out=block)
    if low_rank is None:
        return
    u, b = low_rank
    if u.dtype == block.dtype:
        block.addmm_(u, b[first:last].t())
        return
    for at in range(first, last, CPU_CLASSES):  # an fp32 product of few classes at a time
        end = min(at + CPU_CLASSES, last)
        block[:, at - first : end - first] += torch.mm(u, b[at:end].t())


def _add_low_rank(
    sums: list[Tensor], block: Tensor, low_rank: tuple[Tensor, Tensor], begin: int, first: int, wanted: Sequence[bool]
) -> None:
    """The gradients of u and b from that of the logits of tokens from `begin` and classes from `first`."""
    u, b = low_rank
    dtype = torch.float32 if block.dtype == torch.float16 else u.dtype  # as in _add
    for part, at in zip(block.split(CPU_CLASSES, 1), range(first, first + block.shape[1], CPU_CLASSES)):
        part, classes = part.to(dtype), slice(at, at + part.shape[1])
        if wanted[3]:
            sums[0][begin : begin + len(part)] += torch.mm(part, b[classes].to(dtype))
        if wanted[4]:
            sums[1][classes] += torch.mm(part.t(), u.to(dtype))


def _add(total: Tensor, a: Tensor, b: Tensor, scratch: Tensor, fresh: bool) -> None:
    """total += a @ b; total = a @ b where it is `fresh`. CUDA hands an fp32 total the product before it is rounded."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if fresh else torch.addmm(total, a, b, out=total)
    elif total.device.type == "cuda" and torch.version.hip is None:
        if fresh:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype == torch.float16:  # unscaled rows may add up past 65504; a CPU is faster in fp32 too
        product = torch.mm(a.float(), b.float())
        total.copy_(product) if fresh else total.add_(product)
    else:
        product = torch.mm(a, b, out=scratch[: total.numel()].view(total.shape))
        total.copy_(product) if fresh else total.add_(product)


def _of_kept(
    kept: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, rows: Rows, stats: Tensor | None,
    grad: Tensor | Gradients | None, grad_entropy: Tensor | None, wanted: Sequence[bool], dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`sweep` over the rows that are not ignored, its results put back among the others."""
    assert grad is None or isinstance(grad, Tensor)
    part, grad_hidden, grad_weight, grad_bias = _sweep(
        hidden[kept], weight, target[kept], bias, rows,
        None if stats is None else stats[:, kept].contiguous(),
        None if grad is None else grad[kept],
        None if grad_entropy is None else grad_entropy[kept],
        wanted, dtype or hidden.dtype,
    )  # fmt: skip
    if stats is None:
        stats = part.new_tensor([0.0, 1.0, 0.0, 0.0, 0.0]).unsqueeze(-1).repeat(1, hidden.shape[0])
        stats[:, kept] = part
    if wanted[0]:
        grad_hidden = torch.zeros_like(hidden, dtype=grad_hidden.dtype).index_copy_(0, kept, grad_hidden)
    return stats, grad_hidden, grad_weight, grad_bias


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """gradient * factor, a 0-d tensor; in place where the graph that holds the gradient is about to be freed."""
    if (
        type(gradient) is not Tensor  # being traced: no memory to speak of
        or torch.compiler.is_compiling()
        or is_batched(factor)
    ):
        return gradient * factor
    if not keeps_graph():
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=_fresh(gradient, gradient.shape, gradient.dtype))


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain head, as the definitions use it."""
    return F.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))


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
    device = hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden and weight must have one dtype, got {hidden.dtype} and {weight.dtype}")
    return hidden, weight, bias
