"""The softmax of long rows of logits without storing it: what cross entropy, token log-probabilities and their fused
linear forms have in common.

A logit u becomes ``s = softcap * tanh(logit_scale * (u + bias) / softcap) / temperature`` (softcap 0.0: no capping).
`statistics` reads a chunk of logits once and yields five numbers a row, which continue from chunk to chunk of the
vocabulary; `losses`, `logprobs` and `entropy` are formulas in those; `gradient_` writes their gradient over the chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm import backends
from fastllm.ops import _check
from fastllm.ops._op import Op

NO_IGNORE = -(2**63)  # an ignore_index that no target equals


def transform(logits: Tensor, bias: Tensor | None, logit_scale: float, softcap: float, temperature: float) -> Tensor:
    """The logits as the softmax sees them, in fp32 or fp64: bias, then scale, then soft cap, then temperature."""
    s = logits.double() if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        s = s + bias.to(s.dtype)
    if logit_scale != 1.0:
        s = s * logit_scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    return s / temperature if temperature != 1.0 else s


def losses(
    stats: Tensor, target: Tensor, vocabulary: int, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """(rows,) loss of each row from its (5, rows) `statistics` over the whole vocabulary; 0 where it is ignored.

    ``(1 - label_smoothing) * -log p[target] + label_smoothing * mean(-log p) + z_loss * lse²``
    """
    top, total, log_sum = stats[0], stats[3], stats[1].log()
    loss = log_sum + (top - stats[2])
    if label_smoothing:
        uniform = log_sum + (top - total / vocabulary)
        loss = (1 - label_smoothing) * loss + label_smoothing * uniform
    if z_loss:
        loss = loss + z_loss * (top + log_sum).square()
    return loss.where(target != ignore_index, 0.0)


def logprobs(stats: Tensor) -> Tensor:
    """(rows,) log-probability of the targets; the sum is at least 1, so never above 0."""
    return (stats[2] - stats[0]) - stats[1].log()


def entropy(stats: Tensor) -> Tensor:
    """(rows,) entropy ``lse - E_p[s]`` of rows whose statistics were taken with_entropy."""
    return stats[1].log() - stats[4] / stats[1]


def divisor(
    target: Tensor, ignore_index: int, num_items: Tensor | float | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """0-d: what the summed loss is divided by, `num_items` or the number of targets that are not ignored.

    inf where no target is left, so that loss and gradients become 0; no host synchronisation.
    """
    kept = (target != ignore_index).sum()
    if num_items is None:
        count = kept.to(dtype)
    elif isinstance(num_items, Tensor):
        count = num_items.detach().reshape(()).to(target.device, dtype)
    else:
        count = torch.full((), float(num_items), dtype=dtype, device=target.device)
    return count.where(kept > 0, float("inf"))


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and losses of such logits have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pick(x: Tensor, target: Tensor) -> Tensor:
    """x[row, target[row]]."""
    return x.gather(1, target.unsqueeze(-1)).squeeze(-1)


def check_target(target: Any, shape: tuple[int, ...], logits: Tensor, name: str = "logits") -> Tensor:
    """target as int64, after its type, shape and device have been checked; its values are not read."""
    _check.is_tensor("target", target)
    if target.dtype != torch.int64:
        if target.dtype == torch.bool or target.is_floating_point() or target.is_complex():
            raise TypeError(f"target must hold class indices (an integer tensor), got dtype {target.dtype}")
        target = target.long()
    if target.shape != shape:
        _check.has_shape("target", target, shape, f"the leading dimensions of {name}")
    if target.device != logits.device:
        _check.same_device("target", target, name, logits)
    return target


def check_range(target: Tensor, vocabulary: int, ignore_index: int = NO_IGNORE) -> None:
    """Raises IndexError for a class index outside [0, vocabulary). Reads the data: for CPU tensors only."""
    outside = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if outside.any():
        value = int(target[outside][0])
        besides = "" if ignore_index == NO_IGNORE else f" or be ignore_index ({ignore_index})"
        raise IndexError(f"target must lie in [0, {vocabulary}) for V = {vocabulary} classes{besides}, got {value}")


def call_checked(op: Op, target: Tensor, vocabulary: int, ignore_index: int, *args: Any) -> Any:
    """op(*args), where on the CPU a target out of range becomes an IndexError.

    The C++ kernels and the definition refuse such a target before they read anything with it; looking at it here only
    afterwards keeps the check out of every call that is right.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if backends.forced == "triton" and target.device.type == "cpu":
        check_range(target, vocabulary, ignore_index)
    try:
        return op(*args)
    except RuntimeError:
        if target.device.type == "cpu":
            check_range(target, vocabulary, ignore_index)
        raise


def _statistics_definition(
    logits: Tensor, target: Tensor, bias: Tensor | None, previous: Tensor | None, first_column: int, ignore_index: int,
    logit_scale: float, softcap: float, temperature: float, with_total: bool, with_entropy: bool,
) -> Tensor:  # fmt: skip
    s = transform(logits, bias, logit_scale, softcap, temperature)
    rows, columns = s.shape
    at = target - first_column
    here = (at >= 0) & (at < columns)
    none = s.new_full((rows,), float("-inf"))
    top = s.amax(-1) if columns else none
    base = top.where(top != float("-inf"), 0.0)
    below = (s - base.unsqueeze(-1)).clamp(min=-104.0)  # a -inf counts as probability 0 and as 0 in the entropy
    e = below.exp().masked_fill(below == -104.0, 0.0)
    logit = pick(s, at.clamp(0, columns - 1)).where(here, none) if columns else none
    stats = torch.stack([top, e.sum(-1), logit, s.sum(-1), (e * below).sum(-1)])
    if previous is not None:
        stats = _merge(previous.to(s.dtype), stats)
    ignored = target == ignore_index
    nothing = s.new_tensor([0.0, 1.0, 0.0, 0.0, 0.0]).unsqueeze(-1)
    wanted = s.new_tensor([1.0, 1.0, 1.0, float(with_total), float(with_entropy)]).unsqueeze(-1)
    return nothing.where(ignored, stats.where(wanted > 0, 0.0))


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """The statistics of two chunks of columns together."""
    top = torch.maximum(a[0], b[0])
    steps = [(c[0] - top).nan_to_num(nan=0.0).clamp(min=-104.0) for c in (a, b)]
    factors = [step.exp() for step in steps]
    sums = a[1] * factors[0] + b[1] * factors[1]
    weighted_a, weighted_b = ((c[4] + c[1] * step) * f for c, step, f in zip((a, b), steps, factors))
    return torch.stack([top, sums, torch.maximum(a[2], b[2]), a[3] + b[3], weighted_a + weighted_b])


def _statistics_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty((5, logits.shape[0]), dtype=wide(logits.dtype))


def _gradient_definition(
    logits: Tensor, target: Tensor, bias: Tensor | None, stats: Tensor, grad: Tensor, grad_entropy: Tensor | None,
    first_column: int, vocabulary: int, ignore_index: int, logit_scale: float, softcap: float, temperature: float,
    label_smoothing: float, z_loss: float,
) -> None:  # fmt: skip
    s = transform(logits, bias, logit_scale, softcap, temperature)
    top, total, weighted = stats[0].unsqueeze(-1), stats[1].unsqueeze(-1), stats[4].unsqueeze(-1)
    grad = grad.to(s.dtype).unsqueeze(-1)
    below = (s - top).clamp(min=-104.0)
    p = below.exp() / total
    at_p = grad * (1 + 2 * z_loss * (top + total.log())) if z_loss else grad
    if grad_entropy is not None:
        at_p = at_p - grad_entropy.to(s.dtype).unsqueeze(-1) * (below - weighted / total)
    classes = first_column + torch.arange(s.shape[1], device=s.device)
    ds = p * at_p - grad * label_smoothing / vocabulary
    ds = ds - (grad * (1 - label_smoothing)).where(classes == target.unsqueeze(-1), 0.0)
    if softcap:
        ds = ds * (1 - (s * temperature / softcap).square())
    ds = ds * (logit_scale / temperature)
    logits.copy_(ds.masked_fill((target == ignore_index).unsqueeze(-1), 0.0))


def _gradient_fake(*_: Any) -> None:
    return None


statistics = Op(
    "softmax_statistics(Tensor logits, Tensor target, Tensor? bias, Tensor? previous, int first_column,"
    " int ignore_index, float logit_scale, float softcap, float temperature, bool with_total, bool with_entropy)"
    " -> Tensor",
    _statistics_definition,
    fake=_statistics_fake,
    triton="softmax_rows:statistics",
)
gradient_ = Op(
    "softmax_gradient_(Tensor(a!) logits, Tensor target, Tensor? bias, Tensor stats, Tensor grad, Tensor? grad_entropy,"
    " int first_column, int vocabulary, int ignore_index, float logit_scale, float softcap, float temperature,"
    " float label_smoothing, float z_loss) -> ()",
    _gradient_definition,
    fake=_gradient_fake,
    triton="softmax_rows:gradient_",
)
