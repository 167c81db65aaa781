"""The softmax of rows of logits without storing it: statistics in one pass over a row, gradients in another.

A logit u becomes s = outer * tanh(inner * (u + bias)), or factor * (u + bias) without a soft cap. What is kept of a row
is written to `stats` (5, rows): max s, sum of exp(s - max), s of the target, sum of s, sum of exp(s - max) (s - max).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, Work, triton_type
from fastllm.kernels.triton._numeric import narrow

BLOCK = 4096  # logits a program has in flight
WARPS = 8
LOSSES_BLOCK = 1024
NONE, MEAN = 0, 1  # reductions; 2 is the plain sum
NO_IGNORE = -(2**63)
LOWEST = tl.constexpr(-104.0)  # exp vanishes here: a logit of -inf then counts 0 in exp(d) d as well


@triton.jit
def _transform(u, bias, factor, inner, outer, CAPPED: tl.constexpr):
    s = u.to(tl.float32) + bias
    if CAPPED:
        x = inner * s
        z = x * x  # tanh: a polynomial (Cephes tanhf) below 0.625, where the difference that serves beyond would cancel
        p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1
        near = x + x * z * (p * z - 3.33332819422e-1)
        s = outer * tl.where(z < 0.390625, near, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
    else:
        s *= factor
    return s


@triton.jit
def _statistics_kernel(
    logits_ptr, target_ptr, bias_ptr, previous_ptr, stats_ptr, rows, columns, stride, first_column, ignore_index,
    factor, inner, outer,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, HAS_PREVIOUS: tl.constexpr, TOTAL: tl.constexpr,
    ENTROPY: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    # LANES running softmaxes, each over WIDTH neighbouring logits at a time, which one thread holds: the loop needs no
    # exchange between threads, and rescales once for WIDTH exponentials.
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    logits_ptr += row * stride
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    top = tl.full([LANES], float("-inf"), tl.float32)
    total_exp = tl.zeros([LANES], tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    for start in range(0, tl.where(ignored, 0, columns), LANES * WIDTH):
        inside = start + offsets < columns
        u = tl.load(logits_ptr + start + offsets, mask=inside, other=0.0)
        bias = tl.load(bias_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
        s = _transform(u, bias, factor, inner, outer, CAPPED)
        if TOTAL:
            total += tl.sum(tl.where(inside, s, 0.0), 1)
        s = tl.where(inside, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        scale = tl.exp(top - base)
        below = s - base[:, None]
        e = tl.exp(below)
        if ENTROPY:
            step = tl.maximum(top - base, LOWEST)
            weighted = (weighted + total_exp * step) * scale + tl.sum(e * tl.maximum(below, LOWEST), 1)
        total_exp = total_exp * scale + tl.sum(e, 1)
        top = higher

    highest = tl.max(top, 0)
    at = target - first_column
    here = (at >= 0) & (at < columns) & (not ignored)
    u = tl.load(logits_ptr + at, mask=here, other=0.0)
    bias = tl.load(bias_ptr + at, mask=here, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    logit = tl.minimum(_transform(u, bias, factor, inner, outer, CAPPED), highest)  # however either was rounded
    logit = tl.where(here, logit, float("-inf"))
    row_total = tl.sum(total, 0)
    if HAS_PREVIOUS:
        earlier_top = tl.load(previous_ptr + row)
        highest = tl.maximum(highest, earlier_top)
        logit = tl.maximum(logit, tl.load(previous_ptr + 2 * rows + row))
        row_total += tl.load(previous_ptr + 3 * rows + row)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    scale = tl.exp(top - base)
    row_exp = tl.sum(total_exp * scale, 0)
    row_weighted = tl.sum((weighted + total_exp * tl.maximum(top - base, LOWEST)) * scale, 0)
    if HAS_PREVIOUS:
        scale = tl.exp(earlier_top - base)
        earlier_exp = tl.load(previous_ptr + rows + row)
        earlier_weighted = tl.load(previous_ptr + 4 * rows + row)
        row_weighted += (earlier_weighted + earlier_exp * tl.maximum(earlier_top - base, LOWEST)) * scale
        row_exp += earlier_exp * scale
    stats_ptr += row
    tl.store(stats_ptr, tl.where(ignored, 0.0, highest))
    tl.store(stats_ptr + rows, tl.where(ignored, 1.0, row_exp))
    tl.store(stats_ptr + 2 * rows, tl.where(ignored, 0.0, logit))
    tl.store(stats_ptr + 3 * rows, tl.where(ignored, 0.0, row_total) if TOTAL else 0.0)
    tl.store(stats_ptr + 4 * rows, tl.where(ignored, 0.0, row_weighted) if ENTROPY else 0.0)


@triton.jit
def _gradient_kernel(
    logits_ptr, target_ptr, bias_ptr, stats_ptr, grad_ptr, grad_entropy_ptr, scale_ptr, out_ptr, rows, columns, stride,
    out_stride, grad_stride, grad_entropy_stride, first_column, vocabulary, ignore_index, factor, inner, outer,
    label_smoothing, z_loss, sign,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, HAS_SCALE: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # ds_j = p_j grad (1 + 2 z_loss lse) - grad (1 - smoothing) [j = target] - grad smoothing / vocabulary
    #        - grad_entropy p_j (s_j - E_p[s]),  then through the soft cap and the scale to du_j. `out` may be `logits`.
    program = tl.program_id(0)
    blocks = tl.cdiv(columns, BLOCK)
    row = (program // blocks).to(tl.int64)
    start = (program % blocks) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < columns
    target = tl.load(target_ptr + row)
    ignored = target == ignore_index
    tl.device_assert(ignored | ((target >= 0) & (target < vocabulary)), "target out of range")
    top = tl.load(stats_ptr + row)
    total_exp = tl.load(stats_ptr + rows + row)
    grad = tl.load(grad_ptr + row * grad_stride) * sign
    if HAS_SCALE:
        grad *= tl.load(scale_ptr)
    probability = grad * (1.0 + 2.0 * z_loss * (top + tl.log(total_exp)))
    u = tl.load(logits_ptr + row * stride + offsets, mask=inside & (not ignored), other=0.0)
    bias = tl.load(bias_ptr + offsets, mask=inside, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    s = _transform(u, bias, factor, inner, outer, CAPPED)
    below = tl.maximum(s - top, LOWEST)
    p = tl.exp(below) * (1.0 / total_exp)
    if ENTROPY:
        expected = tl.load(stats_ptr + 4 * rows + row) / total_exp
        probability -= tl.load(grad_entropy_ptr + row * grad_entropy_stride) * (below - expected)
    ds = p * probability - grad * label_smoothing / vocabulary
    ds -= tl.where(offsets == target - first_column, grad * (1.0 - label_smoothing), 0.0)
    if CAPPED:
        ds *= 1.0 - (s / outer) * (s / outer)
    out = tl.where(ignored, 0.0, ds * factor)
    tl.store(out_ptr + row * out_stride + offsets, narrow(out, out_ptr), mask=inside)


@triton.jit
def _losses_kernel(
    stats_ptr, target_ptr, num_items_ptr, loss_ptr, scale_ptr, rows, vocabulary, ignore_index, label_smoothing, z_loss,
    items, HAS_ITEMS: tl.constexpr, EACH: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # EACH: every row's loss, many programs. Otherwise one program adds them up, in an order that does not vary.
    summed = tl.zeros([BLOCK], tl.float32)
    kept = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, rows, tl.num_programs(0) * BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < rows
        target = tl.load(target_ptr + row, mask=inside, other=ignore_index)
        wanted = target != ignore_index
        tl.device_assert((not wanted) | ((target >= 0) & (target < vocabulary)), "target out of range")
        top = tl.load(stats_ptr + row, mask=wanted, other=0.0)
        log_sum = tl.log(tl.load(stats_ptr + rows + row, mask=wanted, other=1.0))
        loss = log_sum + (top - tl.load(stats_ptr + 2 * rows + row, mask=wanted, other=0.0))
        if label_smoothing != 0:
            total = tl.load(stats_ptr + 3 * rows + row, mask=wanted, other=0.0)
            uniform = log_sum + (top - total / vocabulary)
            loss = (1.0 - label_smoothing) * loss + label_smoothing * uniform
        if z_loss != 0:
            loss += z_loss * (top + log_sum) * (top + log_sum)
        loss = tl.where(wanted, loss, 0.0)
        if EACH:
            tl.store(loss_ptr + row, loss, mask=inside)
        summed += loss
        kept += wanted.to(tl.int32)
    if not EACH:
        count = tl.sum(kept, 0)
        scale = 1.0
        if MEAN:
            if HAS_ITEMS:
                divisor = tl.load(num_items_ptr).to(tl.float32)
            else:
                divisor = tl.where(items >= 0, items, count.to(tl.float32))
            scale = tl.where(count > 0, 1.0 / tl.where(count > 0, divisor, 1.0), 0.0)
        tl.store(loss_ptr, tl.sum(summed, 0) * scale)
        tl.store(scale_ptr, scale)


@triton.jit
def _logprobs_kernel(
    stats_ptr, target_ptr, logprobs_ptr, entropy_ptr, rows, vocabulary, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    target = tl.load(target_ptr + row, mask=inside, other=0)
    tl.device_assert((target >= 0) & (target < vocabulary), "target out of range")
    top = tl.load(stats_ptr + row, mask=inside, other=0.0)
    total_exp = tl.load(stats_ptr + rows + row, mask=inside, other=1.0)
    log_sum = tl.log(total_exp)  # never below 0, so a log-probability is never above
    logit = tl.load(stats_ptr + 2 * rows + row, mask=inside, other=0.0)
    tl.store(logprobs_ptr + row, (logit - top) - log_sum, mask=inside)
    if ENTROPY:
        weighted = tl.load(stats_ptr + 4 * rows + row, mask=inside, other=0.0)
        tl.store(entropy_ptr + row, log_sum - weighted / total_exp, mask=inside)


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] <= 1 else logits.contiguous()


def _chain(logit_scale: float, softcap: float, temperature: float) -> tuple[float, float, float]:
    inner = logit_scale / softcap if softcap else 0.0
    return logit_scale / temperature, inner, softcap / temperature


def statistics(
    logits: Tensor, target: Tensor, bias: Tensor | None, previous: Tensor | None, first_column: int, ignore_index: int,
    logit_scale: float, softcap: float, temperature: float, with_total: bool, with_entropy: bool,
) -> Tensor:  # fmt: skip
    logits, target = _rows(logits), target.contiguous()
    rows, columns = logits.shape
    stats = logits.new_empty((5, rows), dtype=torch.float32)
    if rows:
        width = 16 // logits.element_size()
        _statistics_kernel[(rows,)](
            logits, target, logits if bias is None else bias.contiguous(),
            stats if previous is None else previous.contiguous(), stats, rows, columns, logits.stride(0), first_column,
            ignore_index, *_chain(logit_scale, softcap, temperature),
            HAS_BIAS=bias is not None, CAPPED=softcap != 0, HAS_PREVIOUS=previous is not None, TOTAL=with_total,
            ENTROPY=with_entropy, LANES=BLOCK // width, WIDTH=width, num_warps=WARPS,
        )  # fmt: skip
    return stats


def _gradient(
    out: Tensor, logits: Tensor, target: Tensor, bias: Tensor | None, stats: Tensor, grad: Tensor, grad_stride: int,
    grad_entropy: Tensor | None, scale: Tensor | None, first_column: int, vocabulary: int, ignore_index: int,
    logit_scale: float, softcap: float, temperature: float, label_smoothing: float, z_loss: float, sign: float,
) -> Tensor:  # fmt: skip
    rows, columns = logits.shape
    if logits.numel():
        _gradient_kernel[(rows * triton.cdiv(columns, BLOCK),)](
            logits, target.contiguous(), logits if bias is None else bias.contiguous(), stats.contiguous(), grad,
            grad if grad_entropy is None else grad_entropy, grad if scale is None else scale, out, rows, columns,
            logits.stride(0), out.stride(0), grad_stride, 0 if grad_entropy is None else grad_entropy.stride(0),
            first_column, vocabulary, ignore_index, *_chain(logit_scale, softcap, temperature), label_smoothing, z_loss,
            sign,
            HAS_BIAS=bias is not None, CAPPED=softcap != 0, HAS_SCALE=scale is not None,
            ENTROPY=grad_entropy is not None, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


def gradient_(
    logits: Tensor, target: Tensor, bias: Tensor | None, stats: Tensor, grad: Tensor, grad_entropy: Tensor | None,
    first_column: int, vocabulary: int, ignore_index: int, logit_scale: float, softcap: float, temperature: float,
    label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"the last dimension must be contiguous to be written over, got strides {logits.stride()}")
    _gradient(
        logits, logits, target, bias, stats, grad, grad.stride(0), grad_entropy, None, first_column, vocabulary,
        ignore_index, logit_scale, softcap, temperature, label_smoothing, z_loss, 1.0,
    )  # fmt: skip


def cross_entropy(
    logits: Tensor, target: Tensor, num_items: Tensor | None, items: float, ignore_index: int, label_smoothing: float,
    z_loss: float, softcap: float, reduction: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    target = target.contiguous()
    stats = statistics(logits, target, None, None, 0, ignore_index, 1.0, softcap, 1.0, label_smoothing != 0, False)
    rows, vocabulary = logits.shape
    each = reduction == NONE
    loss = stats.new_empty((rows,) if each else ())
    scale = stats.new_ones(()) if each else stats.new_empty(())
    if rows or not each:
        _losses_kernel[(triton.cdiv(rows, LOSSES_BLOCK) if each else 1,)](
            stats, target, stats if num_items is None else num_items, loss, scale, rows, vocabulary, ignore_index,
            label_smoothing, z_loss, items,
            HAS_ITEMS=num_items is not None, EACH=each, MEAN=reduction == MEAN, BLOCK=LOSSES_BLOCK,
        )  # fmt: skip
    return loss, stats, scale


def cross_entropy_backward(
    logits: Tensor, target: Tensor, grad_loss: Tensor, stats: Tensor, scale: Tensor, ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, reduction: int,
) -> Tensor:  # fmt: skip
    return _gradient(
        torch.empty_like(logits, memory_format=torch.contiguous_format), _rows(logits), target, None, stats, grad_loss,
        grad_loss.stride(0) if reduction == NONE else 0, None, scale, 0, logits.shape[1], ignore_index, 1.0, softcap,
        1.0, label_smoothing, z_loss, 1.0,
    )  # fmt: skip


def token_logprobs(
    logits: Tensor, target: Tensor, temperature: float, softcap: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    target = target.contiguous()
    stats = statistics(logits, target, None, None, 0, NO_IGNORE, 1.0, softcap, temperature, False, with_entropy)
    rows, vocabulary = logits.shape
    logprobs, entropy = stats.new_empty((rows,)), stats.new_empty((rows if with_entropy else 0,))
    if rows:
        _logprobs_kernel[(triton.cdiv(rows, LOSSES_BLOCK),)](
            stats, target, logprobs, entropy, rows, vocabulary, ENTROPY=with_entropy, BLOCK=LOSSES_BLOCK
        )
    return logprobs, entropy, stats


def token_logprobs_backward(
    logits: Tensor, target: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None, stats: Tensor,
    temperature: float, softcap: float,
) -> Tensor:  # fmt: skip
    return _gradient(
        torch.empty_like(logits, memory_format=torch.contiguous_format), _rows(logits), target, None, stats,
        grad_logprobs, grad_logprobs.stride(0), grad_entropy, None, 0, logits.shape[1], NO_IGNORE, 1.0, softcap,
        temperature, 0.0, 0.0, -1.0,
    )  # fmt: skip


def configurations() -> list[Configuration]:
    """Each pass in the forms that training and policy gradients run, for vocabularies that are multiples of 16."""
    found = []
    common = {
        "target_ptr": "*i64", "stats_ptr": "*fp32", "rows": "i32", "columns": "i32:16", "stride": "i32:16",
        "first_column": "i32", "factor": "fp32", "inner": "fp32", "outer": "fp32", "vocabulary": "i32:16",
        "label_smoothing": "fp32", "z_loss": "fp32",
    }  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        t, width = triton_type(dtype), 16 // dtype.itemsize
        logits = {**common, "logits_ptr": t, "bias_ptr": t, "out_ptr": t}
        for label, capped, bias, previous, total, entropy in (
            ("cross entropy", False, False, False, False, False),
            ("smoothed capped chunk with bias", True, True, True, True, False),
            ("log-probability and entropy", False, False, False, False, True),
        ):
            ignore = {"ignore_index": "i64" if entropy else "i32"}
            found.append(
                Configuration(
                    _statistics_kernel,
                    {**logits, **ignore, "previous_ptr": "*fp32"},
                    {
                        "HAS_BIAS": bias, "CAPPED": capped, "HAS_PREVIOUS": previous, "TOTAL": total,
                        "ENTROPY": entropy, "LANES": BLOCK // width, "WIDTH": width,
                    },
                    num_warps=WARPS,
                    label=f"softmax statistics {t[1:]}: {label}",
                    work=Work("8192×32000", 8192 * 32000 * dtype.itemsize),
                )
            )  # fmt: skip
            found.append(
                Configuration(
                    _gradient_kernel,
                    {
                        **logits, **ignore, "grad_ptr": "*fp32", "grad_entropy_ptr": "*fp32", "scale_ptr": "*fp32",
                        "out_stride": "i32:16", "grad_stride": "i32", "grad_entropy_stride": "i32", "sign": "fp32",
                    },
                    {"HAS_BIAS": bias, "CAPPED": capped, "HAS_SCALE": not bias, "ENTROPY": entropy, "BLOCK": BLOCK},
                    num_warps=WARPS,
                    label=f"softmax gradient {t[1:]}: {label}",
                    work=Work("8192×32000", 2 * 8192 * 32000 * dtype.itemsize),
                )
            )  # fmt: skip
    small = {**common, "num_items_ptr": "*i64", "loss_ptr": "*fp32", "scale_ptr": "*fp32", "ignore_index": "i32"}
    for each in (False, True):
        constants = {"HAS_ITEMS": not each, "EACH": each, "MEAN": not each, "BLOCK": LOSSES_BLOCK}
        label = f"losses {'of each row' if each else 'summed'}"
        found.append(Configuration(_losses_kernel, {**small, "items": "fp32"}, constants, label=label))
    logprobs = {**common, "logprobs_ptr": "*fp32", "entropy_ptr": "*fp32"}
    constants = {"ENTROPY": True, "BLOCK": LOSSES_BLOCK}
    found.append(Configuration(_logprobs_kernel, logprobs, constants, label="log-probabilities"))
    return found
