"""The policy-gradient loss: one kernel over blocks of tokens that sums and writes gradients, one that adds up the sums.

Where rows matter (averages over sequences, one ratio a sequence) a kernel with a program a row looks at them first. The
sums of a program over its blocks are fp32; those of the programs are added in fp64, in an order that does not vary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, Work, triton_type

BLOCK = 512
ROW_BLOCK = 1024
MAX_PROGRAMS = 2048
STATS = 14
TOKEN_MEAN, SEQ_TOKEN_SUM, SEQ_TOKEN_MEAN, SUM_NORM = range(4)
PPO, CISPO, REINFORCE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
K1, K2 = tl.constexpr(0), tl.constexpr(1)
BOUND = tl.constexpr(20.0)  # of a log-ratio
# Columns of the partial sums, (programs, WIDTH).
WIDTH = tl.constexpr(32)
COUNT, RATIO_MAX, RETURNS, ERRORS, SPREAD_RETURNS, SPREAD_ERRORS = (tl.constexpr(i) for i in (0, 1, 2, 3, 4, 5))
POLICY, VALUE, ENTROPY, KL = (tl.constexpr(i) for i in (6, 7, 8, 9))
DIFFERENCE, THIRD, CLIPPED, VALUE_CLIPPED, RATIO, ADVANTAGES, VALUES = (tl.constexpr(i) for i in range(10, 17))


@triton.jit
def _clamp(x, lowest, highest):
    """NaN stays."""
    return tl.where(x > highest, highest, tl.where(x < lowest, lowest, x))


@triton.jit
def _beyond_linear(x, e):
    """e^x - 1 - x, given e^x: below 1/2, where that difference would cancel, its series, to 4e-8 of it."""
    s = 1.0 / 720 + x * (1.0 / 5040 + x * (1.0 / 40320))
    s = 1.0 / 2 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * s)))
    return tl.where(x * x < 0.25, x * x * s, e - 1.0 - x)


@triton.jit
def _read(pointer, at, inside, valid):
    """Valid tokens as fp32, 0 for the others: read as whole vectors, which a mask of single tokens would forbid."""
    return tl.where(valid, tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _policy(a, logp, ratio, lowest, highest, dual_clip, VARIANT: tl.constexpr, DUAL: tl.constexpr):
    """(loss, its derivative by the log-ratio (ppo) or the log-probability, whether it was clipped) of tokens."""
    kept = _clamp(ratio, lowest, highest)
    if VARIANT == PPO:
        free = -a * ratio
        cut = -a * kept
        clipped = cut > free
        loss = tl.where(clipped, cut, free)
        slope = tl.where(clipped, 0.0, free)
        if DUAL:
            most = tl.where(a < 0, -a * dual_clip, float("inf"))
            slope = tl.where(loss > most, 0.0, slope)
            loss = tl.where(loss > most, most, loss)
    elif VARIANT == CISPO:
        slope = -kept * a
        loss = slope * logp
        clipped = (kept < ratio) | (kept > ratio)
    else:
        slope = -a
        loss = slope * logp
        clipped = a < a  # never
    return loss, slope, clipped


@triton.jit
def _rows_kernel(
    logprobs_ptr, old_ptr, advantages_ptr, weights_ptr, mask_ptr, bounds_ptr, rows_ptr, rows, length, lowest, highest,
    dual_clip,
    SEQUENCE: tl.constexpr, SLOPE: tl.constexpr, DUAL: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ADVANTAGE_BY_ROW: tl.constexpr,
    WEIGHT_BY_ROW: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # rows_ptr (3, rows): valid tokens, mean log-ratio, gradient of each valid token by the sequence's ratio.
    row = tl.program_id(0).to(tl.int64)
    if PACKED:
        begin = tl.load(bounds_ptr + row).to(tl.int64)
        length = (tl.load(bounds_ptr + row + 1) - begin).to(tl.int32)
    else:
        begin = row * length
    counts = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        at = begin + lanes
        inside = lanes < length
        valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        counts += valid.to(tl.float32)
        if SEQUENCE:
            sums += _read(logprobs_ptr, at, inside, valid) - _read(old_ptr, at, inside, valid)
    count = tl.sum(counts, 0)
    tl.store(rows_ptr + row, count)
    if SEQUENCE:
        log_ratio = tl.sum(sums, 0) / tl.maximum(count, 1.0)
        tl.store(rows_ptr + rows + row, log_ratio)
        if SLOPE:
            ratio = tl.exp(_clamp(log_ratio, -BOUND, BOUND))
            slopes = tl.zeros([BLOCK], tl.float32)
            for start in range(0, length, BLOCK):
                lanes = start + tl.arange(0, BLOCK)
                at = begin + lanes
                inside = lanes < length
                valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
                if ADVANTAGE_BY_ROW:
                    a = tl.where(valid, tl.load(advantages_ptr + row).to(tl.float32), 0.0)
                else:
                    a = _read(advantages_ptr, at, inside, valid)
                _, slope, _ = _policy(a, 0.0, ratio, lowest, highest, dual_clip, PPO, DUAL)
                if HAS_WEIGHTS:
                    if WEIGHT_BY_ROW:
                        slope *= tl.load(weights_ptr + row).to(tl.float32)
                    else:
                        slope *= _read(weights_ptr, at, inside, valid)
                slopes += tl.where(valid, slope, 0.0)
            slope = tl.sum(slopes, 0) / tl.maximum(count, 1.0)
            tl.store(rows_ptr + 2 * rows + row, tl.where((log_ratio > BOUND) | (log_ratio < -BOUND), 0.0, slope))


@triton.jit
def _tokens_kernel(
    logprobs_ptr, old_ptr, advantages_ptr, weights_ptr, mask_ptr, values_ptr, old_values_ptr, returns_ptr, entropy_ptr, ref_ptr,
    row_ptr, rows_ptr, grad_logprobs_ptr, grad_values_ptr, grad_entropy_ptr, partial_ptr, tokens, rows, length, lowest, highest,
    dual_clip, value_clip, value_coef, entropy_coef, kl_coef,
    VARIANT: tl.constexpr, SEQUENCE: tl.constexpr, DUAL: tl.constexpr, TOKEN_AVERAGE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    ADVANTAGE_BY_ROW: tl.constexpr, WEIGHT_BY_ROW: tl.constexpr, PACKED: tl.constexpr, HAS_VALUES: tl.constexpr,
    HAS_OLD_VALUES: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_REF: tl.constexpr, ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # TOKEN_AVERAGE: a token weighs 1 / valid tokens of its row.
    program = tl.program_id(0).to(tl.int64)
    count = 0.0
    policy_sum = 0.0
    value_loss_sum = 0.0
    entropy_sum = 0.0
    kl_sum = 0.0
    difference_sum = 0.0
    third_sum = 0.0
    clipped_sum = 0.0
    value_clipped_sum = 0.0
    value_sum = 0.0
    ratio_sum = 0.0
    ratio_max = 0.0
    advantage_sum = 0.0
    return_sum = 0.0
    error_sum = 0.0
    return_spread = 0.0
    error_spread = 0.0
    for start in range(program * BLOCK, tokens, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tokens
        valid = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        here = tl.sum(valid.to(tl.float32), 0)
        weight = tl.where(valid, 1.0, 0.0)
        row = at
        if SEQUENCE or TOKEN_AVERAGE or ADVANTAGE_BY_ROW or WEIGHT_BY_ROW:
            if PACKED:
                row = tl.load(row_ptr + at, mask=valid, other=0).to(tl.int64)
            else:
                row = at // length
        if TOKEN_AVERAGE:
            weight /= tl.load(rows_ptr + row, mask=valid, other=1.0)
        new = _read(logprobs_ptr, at, inside, valid)
        if ADVANTAGE_BY_ROW:
            a = tl.load(advantages_ptr + row, mask=valid, other=0.0).to(tl.float32)
        else:
            a = _read(advantages_ptr, at, inside, valid)
        difference = new - _read(old_ptr, at, inside, valid)
        bounded = _clamp(difference, -BOUND, BOUND)
        token_ratio = tl.exp(bounded)
        ratio = token_ratio
        if SEQUENCE:
            ratio = tl.exp(_clamp(tl.load(rows_ptr + rows + row, mask=valid, other=0.0), -BOUND, BOUND))
        loss, slope, clipped = _policy(a, new, ratio, lowest, highest, dual_clip, VARIANT, DUAL)
        if VARIANT == PPO:  # no gradient through a log-ratio beyond its bounds
            slope = tl.where((difference > BOUND) | (difference < -BOUND), 0.0, slope)
        if HAS_WEIGHTS:
            if WEIGHT_BY_ROW:
                factor = tl.load(weights_ptr + row, mask=valid, other=0.0).to(tl.float32)
            else:
                factor = _read(weights_ptr, at, inside, valid)
            loss *= factor
            slope *= factor
        if SEQUENCE and VARIANT == PPO:
            slope = tl.load(rows_ptr + 2 * rows + row, mask=valid, other=0.0)
        grad = slope * weight
        policy_sum += tl.sum(loss * weight, 0)
        difference_sum += tl.sum(difference, 0)
        third_sum += tl.sum(_beyond_linear(bounded, token_ratio), 0)
        clipped_sum += tl.sum(tl.where(clipped & valid, 1.0, 0.0), 0)
        ratio = tl.where(valid, ratio, 0.0)
        ratio_sum += tl.sum(ratio, 0)
        ratio_max = tl.maximum(ratio_max, tl.max(ratio, 0))
        advantage_sum += tl.sum(a, 0)
        if HAS_REF:
            d = new - _read(ref_ptr, at, inside, valid)
            if ESTIMATOR == K1:
                kl = d
                kl_slope = tl.full([BLOCK], 1.0, tl.float32)
            elif ESTIMATOR == K2:
                kl = 0.5 * d * d
                kl_slope = d
            else:
                e = tl.exp(-d)
                kl = _beyond_linear(-d, e)
                kl_slope = tl.where(d * d < 0.25, d - kl, 1.0 - e)
            kl_sum += tl.sum(kl * weight, 0)
            if kl_coef != 0:
                grad += kl_coef * kl_slope * weight
        tl.store(grad_logprobs_ptr + at, grad, mask=inside)
        if HAS_VALUES:
            value = _read(values_ptr, at, inside, valid)
            target = _read(returns_ptr, at, inside, valid)
            error = value - target
            square = error * error
            slope = error
            if HAS_OLD_VALUES:
                old = _read(old_values_ptr, at, inside, valid)
                e = _clamp(value, old - value_clip, old + value_clip) - target
                larger = e * e > square
                value_clipped_sum += tl.sum(tl.where(larger, 1.0, 0.0), 0)
                # A NaN among the old values, which comparisons pass over, comes out as it does from the definition.
                square = tl.where(old == old, tl.where(larger, e * e, square), old)
                slope = tl.where(larger, 0.0, slope)
            value_loss_sum += tl.sum(0.5 * square * weight, 0)
            if value_coef == 0:  # whatever the values are
                slope = tl.zeros([BLOCK], tl.float32)
            tl.store(grad_values_ptr + at, value_coef * slope * weight, mask=inside)
            returns_here = tl.sum(target, 0)
            errors_here = -tl.sum(error, 0)
            some = tl.maximum(here, 1.0)
            from_mean = tl.where(valid, target - returns_here / some, 0.0)
            error_from_mean = tl.where(valid, error + errors_here / some, 0.0)
            # Chan's update of sums of squared distances, from the means of both parts.
            earlier = tl.maximum(count, 1.0)
            share = count * here / tl.maximum(count + here, 1.0)
            apart = returns_here / some - return_sum / earlier
            return_spread += tl.sum(from_mean * from_mean, 0) + share * apart * apart
            apart = errors_here / some - error_sum / earlier
            error_spread += tl.sum(error_from_mean * error_from_mean, 0) + share * apart * apart
            value_sum += tl.sum(value, 0)
            return_sum += returns_here
            error_sum += errors_here
        if HAS_ENTROPY:
            entropy = _read(entropy_ptr, at, inside, valid)
            entropy_sum += tl.sum(entropy * weight, 0)
            tl.store(grad_entropy_ptr + at, -entropy_coef * weight, mask=inside)
        count += here
    partial_ptr += program * WIDTH
    tl.store(partial_ptr + COUNT, count)
    tl.store(partial_ptr + RATIO_MAX, ratio_max)
    tl.store(partial_ptr + RETURNS, return_sum)
    tl.store(partial_ptr + ERRORS, error_sum)
    tl.store(partial_ptr + SPREAD_RETURNS, return_spread)
    tl.store(partial_ptr + SPREAD_ERRORS, error_spread)
    tl.store(partial_ptr + POLICY, policy_sum)
    tl.store(partial_ptr + VALUE, value_loss_sum)
    tl.store(partial_ptr + ENTROPY, entropy_sum)
    tl.store(partial_ptr + KL, kl_sum)
    tl.store(partial_ptr + DIFFERENCE, difference_sum)
    tl.store(partial_ptr + THIRD, third_sum)
    tl.store(partial_ptr + CLIPPED, clipped_sum)
    tl.store(partial_ptr + VALUE_CLIPPED, value_clipped_sum)
    tl.store(partial_ptr + RATIO, ratio_sum)
    tl.store(partial_ptr + ADVANTAGES, advantage_sum)
    tl.store(partial_ptr + VALUES, value_sum)


@triton.jit
def _column(x, columns, column: tl.constexpr):
    return tl.sum(tl.where(columns == column, x, 0.0), 0)


@triton.jit
def _total_kernel(
    partial_ptr, rows_ptr, num_items_ptr, loss_ptr, stats_ptr, scale_ptr, programs, rows, items, value_coef, entropy_coef,
    kl_coef, HAS_ITEMS: tl.constexpr, OVER_SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, WIDTH)
    used = columns <= VALUES
    totals = tl.zeros([WIDTH], tl.float64)
    highest = 0.0
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        at = program[:, None] * WIDTH + columns[None, :]
        part = tl.load(partial_ptr + at, mask=(program < programs)[:, None] & used[None, :], other=0.0)
        totals += tl.sum(part.to(tl.float64), 0)
        maxima = tl.load(partial_ptr + program * WIDTH + RATIO_MAX, mask=program < programs, other=0.0)
        highest = tl.maximum(highest, tl.max(maxima, 0))
    count = _column(totals, columns, COUNT)
    n = tl.where(count > 0, count, 1.0)
    mean_return = _column(totals, columns, RETURNS) / n
    mean_error = _column(totals, columns, ERRORS) / n
    return_spread = _column(totals, columns, SPREAD_RETURNS)
    error_spread = _column(totals, columns, SPREAD_ERRORS)
    for start in range(0, programs, BLOCK):
        program = start + tl.arange(0, BLOCK)
        inside = program < programs
        place = partial_ptr + program * WIDTH
        counts = tl.load(place + COUNT, mask=inside, other=0.0).to(tl.float64)
        some = tl.where(counts > 0, counts, 1.0)
        apart = tl.load(place + RETURNS, mask=inside, other=0.0).to(tl.float64) / some - mean_return
        return_spread += tl.sum(counts * apart * apart, 0)
        apart = tl.load(place + ERRORS, mask=inside, other=0.0).to(tl.float64) / some - mean_error
        error_spread += tl.sum(counts * apart * apart, 0)
    divisor = count
    if OVER_SEQUENCES:
        sequences = tl.zeros([BLOCK], tl.int32)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            sequences += (tl.load(rows_ptr + row, mask=row < rows, other=0.0) > 0).to(tl.int32)
        divisor = tl.sum(sequences, 0).to(tl.float64)
    if HAS_ITEMS:
        divisor = tl.load(num_items_ptr).to(tl.float64)
    elif items >= 0:
        divisor = divisor * 0.0 + items
    scale = tl.where(count > 0, 1.0 / tl.where(count > 0, divisor, 1.0), 0.0)
    policy = _column(totals, columns, POLICY) * scale
    value = _column(totals, columns, VALUE) * scale
    entropy = _column(totals, columns, ENTROPY) * scale
    kl = _column(totals, columns, KL) * scale
    loss = policy
    if value_coef != 0:
        loss += value_coef * value
    if entropy_coef != 0:
        loss -= entropy_coef * entropy
    if kl_coef != 0:
        loss += kl_coef * kl
    ratio = _column(totals, columns, RATIO) / n
    tl.store(loss_ptr, loss.to(tl.float32))
    tl.store(scale_ptr, scale.to(tl.float32))
    tl.store(stats_ptr + 0, policy.to(tl.float32))
    tl.store(stats_ptr + 1, value.to(tl.float32))
    tl.store(stats_ptr + 2, entropy.to(tl.float32))
    tl.store(stats_ptr + 3, kl.to(tl.float32))
    tl.store(stats_ptr + 4, (-_column(totals, columns, DIFFERENCE) / n).to(tl.float32))
    tl.store(stats_ptr + 5, (_column(totals, columns, THIRD) / n).to(tl.float32))
    tl.store(stats_ptr + 6, (_column(totals, columns, CLIPPED) / n).to(tl.float32))
    tl.store(stats_ptr + 7, (_column(totals, columns, VALUE_CLIPPED) / n).to(tl.float32))
    tl.store(stats_ptr + 8, ratio.to(tl.float32))
    # A maximum may pass a NaN over; the mean does not.
    tl.store(stats_ptr + 9, tl.where(ratio == ratio, highest, ratio.to(tl.float32)))
    tl.store(stats_ptr + 10, (_column(totals, columns, ADVANTAGES) / n).to(tl.float32))
    tl.store(stats_ptr + 11, mean_return.to(tl.float32))
    tl.store(stats_ptr + 12, (_column(totals, columns, VALUES) / n).to(tl.float32))
    explained = 1.0 - error_spread / tl.where(return_spread == 0, 1.0, return_spread)
    tl.store(stats_ptr + 13, tl.where(return_spread == 0, 0.0, explained).to(tl.float32))


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, values: Tensor | None,
    old_values: Tensor | None, returns: Tensor | None, entropy: Tensor | None, ref_logprobs: Tensor | None,
    importance_weights: Tensor | None, cu_seqlens: Tensor | None, num_items: Tensor | None, items: float, clip_low: float,
    clip_high: float, dual_clip: float, value_clip: float, value_coef: float, entropy_coef: float, kl_coef: float,
    kl_estimator: int, level: int, aggregation: int, variant: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    tokens, length = mask.numel(), max(mask.shape[-1], 1)
    rows = tokens // length if cu_seqlens is None else cu_seqlens.shape[0] - 1
    over_sequences = aggregation in (SEQ_TOKEN_SUM, SEQ_TOKEN_MEAN)
    sequence = level == 1

    def fresh(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=logprobs.device)

    def dense(t: Tensor | None) -> Tensor:
        return logprobs if t is None else t.contiguous()

    grads = [fresh(0) if x is None else fresh(*mask.shape) for x in (logprobs, values, entropy)]
    loss, stats, scale = fresh(), fresh(STATS), fresh()
    programs = min(MAX_PROGRAMS, triton.cdiv(tokens, BLOCK))
    partial = fresh(programs, WIDTH.value)
    policy = (dense(logprobs), dense(old_logprobs), dense(advantages), dense(importance_weights))
    mask = mask.contiguous().view(torch.uint8)
    bounds = mask if cu_seqlens is None else cu_seqlens.contiguous()
    ratios = (1 - clip_low, 1 + clip_high, dual_clip)
    how: dict[str, Any] = {
        "SEQUENCE": sequence,
        "DUAL": dual_clip != 0,
        "HAS_WEIGHTS": importance_weights is not None,
        "ADVANTAGE_BY_ROW": advantages.dim() < mask.dim(),
        "WEIGHT_BY_ROW": importance_weights is not None and importance_weights.dim() < mask.dim(),
        "PACKED": cu_seqlens is not None,
    }
    of_rows, row = partial, mask
    if over_sequences or sequence:
        of_rows = fresh(3, rows)
        if rows:
            _rows_kernel[(rows,)](
                *policy, mask, bounds, of_rows, rows, length, *ratios, **how,
                SLOPE=sequence and variant == PPO.value, BLOCK=ROW_BLOCK,
            )  # fmt: skip
        if cu_seqlens is not None:
            at = torch.arange(tokens, dtype=torch.int32, device=mask.device)
            row = torch.searchsorted(bounds[1:].contiguous(), at, right=True, out_int32=True)
    if programs:
        _tokens_kernel[(programs,)](
            *policy, mask, dense(values), dense(old_values), dense(returns), dense(entropy), dense(ref_logprobs), row, of_rows,
            *grads, partial, tokens, rows, length, *ratios, value_clip, value_coef, entropy_coef, kl_coef,
            VARIANT=variant, TOKEN_AVERAGE=aggregation == SEQ_TOKEN_MEAN, HAS_VALUES=values is not None,
            HAS_OLD_VALUES=old_values is not None, HAS_ENTROPY=entropy is not None, HAS_REF=ref_logprobs is not None,
            ESTIMATOR=kl_estimator, BLOCK=BLOCK, **how,
        )  # fmt: skip
    _total_kernel[(1,)](
        partial, of_rows, loss if num_items is None else num_items, loss, stats, scale, programs, rows, items, value_coef,
        entropy_coef, kl_coef, HAS_ITEMS=num_items is not None, OVER_SEQUENCES=over_sequences, BLOCK=64,
    )  # fmt: skip
    return loss, stats, scale, *grads


def configurations() -> list[Configuration]:
    """The full loss with a value head, GRPO's without, GSPO over padded rows; float32 log-probabilities, bfloat16 values."""
    numbers = ("lowest", "highest", "dual_clip", "value_clip", "value_coef", "entropy_coef", "kl_coef", "items")
    names = (
        "logprobs",
        "old",
        "advantages",
        "weights",
        "returns",
        "entropy",
        "ref",
        "rows",
        "grad_logprobs",
        "grad_values",
        "grad_entropy",
        "partial",
        "num_items",
    )
    signature = {f"{name}_ptr": "*fp32" for name in (*names, "loss", "stats", "scale")}
    signature |= {name: "fp32" for name in numbers} | {
        "mask_ptr": "*u8",
        "bounds_ptr": "*i32",
        "row_ptr": "*i32",
    }
    signature |= {"rows": "i32", "length": "i32:16", "tokens": "i32:16", "programs": "i32"}
    found = []
    tokens = 4096 * 2048
    plain = dict.fromkeys(("SEQUENCE", "DUAL", "HAS_WEIGHTS", "ADVANTAGE_BY_ROW", "WEIGHT_BY_ROW", "PACKED"), False)
    for label, values, how, terms in (
        ("ppo with values", torch.bfloat16, {"DUAL": True}, (True, False)),
        ("ppo with values", torch.float32, {}, (True, False)),
        ("grpo", torch.float32, {"ADVANTAGE_BY_ROW": True}, (False, False)),
        ("gspo", torch.float32, {"ADVANTAGE_BY_ROW": True, "SEQUENCE": True}, (False, True)),
    ):  # fmt: skip
        how = {**plain, **how}
        typed = {**signature, "values_ptr": triton_type(values), "old_values_ptr": triton_type(values)}
        has_values, average = terms
        constants = {
            **how, "VARIANT": 0, "TOKEN_AVERAGE": average, "HAS_VALUES": has_values, "HAS_OLD_VALUES": has_values,
            "HAS_ENTROPY": has_values, "HAS_REF": True, "ESTIMATOR": 2, "BLOCK": BLOCK,
        }  # fmt: skip
        moved = tokens * (1 + 12 + 4 + has_values * (4 + 2 * values.itemsize + 4 + 8 + 4))
        found.append(
            Configuration(
                _tokens_kernel, typed, constants, label=f"ppo_loss {label} {triton_type(values)[1:]}",
                work=Work("4096×2048", moved),
            )
        )  # fmt: skip
        if how["SEQUENCE"]:
            constants = {**how, "SLOPE": True, "BLOCK": ROW_BLOCK}
            found.append(Configuration(_rows_kernel, signature, constants, label=f"ppo_loss rows of {label}"))
    constants = {"HAS_ITEMS": True, "OVER_SEQUENCES": True, "BLOCK": 64}
    found.append(
        Configuration(_total_kernel, {**signature, "num_items_ptr": "*i64"}, constants, label="ppo_loss total")
    )
    return found
