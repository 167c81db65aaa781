"""Layer norm: one program per row forward; backward, programs that walk over rows and sum weight gradients in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, Work, block_for, program_count, triton_type, warps_for
from fastllm.kernels.triton._numeric import narrow


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, channels, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * channels
    y_ptr += row * channels
    columns = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):
        total += tl.load(x_ptr + start + columns, mask=start + columns < channels, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / channels
    squares = tl.zeros([BLOCK], tl.float32)
    rest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, channels, BLOCK):  # the row again, from the cache: a difference of sums would cancel
        inside = start + columns < channels
        d = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) - mean
        d = tl.where(inside, d, 0.0)
        squares += d * d
        rest += d
    lost = tl.sum(rest, 0) / channels  # what the mean lost to rounding
    variance = tl.sum(squares, 0) / channels - lost * lost
    rstd = 1.0 / tl.sqrt(tl.where(variance < 0.0, 0.0, variance) + eps)
    for start in range(0, channels, BLOCK):
        inside = start + columns < channels
        y = (tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) - mean - lost) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_ptr + start + columns, narrow(y, y_ptr), mask=inside)
    tl.store(mean_ptr + row, mean + lost)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    grad_y_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, grad_x_ptr, weight_partial_ptr, bias_partial_ptr, rows, channels,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # With g = grad_y * weight and n = (x - mean) rstd: grad_x = rstd (g - mean(g) - n mean(g n)).
    program = tl.program_id(0).to(tl.int64)  # rows inherit the width, so offsets cannot overflow
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    weight_partial_ptr += program * channels  # this program's own row of partial sums, zeroed by the launcher
    bias_partial_ptr += program * channels
    for row in range(program, rows, programs):
        base = row * channels
        mean = tl.load(mean_ptr + row)
        rstd = tl.load(rstd_ptr + row)
        g_sum = tl.zeros([BLOCK], tl.float32)
        gn_sum = tl.zeros([BLOCK], tl.float32)
        for start in range(0, channels, BLOCK):
            inside = start + columns < channels
            grad = tl.load(grad_y_ptr + base + start + columns, mask=inside, other=0.0).to(tl.float32)
            normed = (tl.load(x_ptr + base + start + columns, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            if HAS_BIAS:
                sums = tl.load(bias_partial_ptr + start + columns, mask=inside, other=0.0)
                tl.store(bias_partial_ptr + start + columns, sums + grad, mask=inside)
            if HAS_WEIGHT:
                sums = tl.load(weight_partial_ptr + start + columns, mask=inside, other=0.0)
                tl.store(weight_partial_ptr + start + columns, sums + grad * normed, mask=inside)
                grad *= tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            g_sum += grad
            gn_sum += grad * normed
        g_mean = tl.sum(g_sum, 0) / channels
        gn_mean = tl.sum(gn_sum, 0) / channels
        for start in range(0, channels, BLOCK):
            inside = start + columns < channels
            grad = tl.load(grad_y_ptr + base + start + columns, mask=inside, other=0.0).to(tl.float32)
            normed = (tl.load(x_ptr + base + start + columns, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
            if HAS_WEIGHT:
                grad *= tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            grad_x = rstd * (grad - g_mean - normed * gn_mean)
            tl.store(grad_x_ptr + base + start + columns, narrow(grad_x, grad_x_ptr), mask=inside)


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = x.contiguous(), *(None if t is None else t.contiguous() for t in (weight, bias))
    channels = x.shape[-1]
    y, mean = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if mean.numel():
        block = block_for(channels)
        _forward_kernel[(mean.numel(),)](
            x, x if weight is None else weight, x if bias is None else bias, y, mean, rstd, channels, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps_for(block),
        )  # fmt: skip
    return y, mean, rstd


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), None if weight is None else weight.contiguous()
    rows, channels = mean.numel(), x.shape[-1]
    programs = program_count(x.device, rows)
    grad_x = torch.empty_like(x)
    partials = [
        torch.zeros(programs if t is not None else 0, channels, dtype=torch.float32, device=x.device)
        for t in (weight, bias)
    ]
    if programs:
        block = _backward_block(channels)
        _backward_kernel[(programs,)](
            grad_y, x, x if weight is None else weight, mean, rstd, grad_x, *partials, rows, channels,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, BLOCK=block, num_warps=warps_for(block, 8),
        )  # fmt: skip
    sums = (x.new_empty(0) if t is None else p.sum(0).to(t.dtype) for t, p in zip((weight, bias), partials))
    return grad_x, *sums  # type: ignore[return-value]


def _backward_block(channels: int) -> int:
    """Both sums and both rows at once want registers: longer rows are read in steps."""
    return min(block_for(channels), 4096)


def configurations() -> list[Configuration]:
    """The specialisations behind common model widths, and the long-row form."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (128, 4096, 8192, 32768):
            block, backward_block = block_for(channels), _backward_block(channels)
            weights = {"HAS_WEIGHT": True, "HAS_BIAS": True}
            t = triton_type(dtype)
            forward_signature = {
                "x_ptr": t, "weight_ptr": t, "bias_ptr": t, "y_ptr": t, "mean_ptr": "*fp32", "rstd_ptr": "*fp32",
                "channels": "i32:16", "eps": "fp32",
            }  # fmt: skip
            backward_signature = {
                "grad_y_ptr": t, "x_ptr": t, "weight_ptr": t, "mean_ptr": "*fp32", "rstd_ptr": "*fp32", "grad_x_ptr": t,
                "weight_partial_ptr": "*fp32", "bias_partial_ptr": "*fp32", "rows": "i32", "channels": "i32:16",
            }  # fmt: skip
            size = 8192 * channels * dtype.itemsize
            found += [
                Configuration(
                    _forward_kernel, forward_signature, {**weights, "BLOCK": block}, num_warps=warps_for(block),
                    label=f"layer_norm forward {t[1:]} C={channels}", work=Work(f"8192×{channels}", 2 * size),
                ),
                Configuration(
                    _backward_kernel, backward_signature, {**weights, "BLOCK": backward_block},
                    num_warps=warps_for(backward_block, 8),
                    label=f"layer_norm backward {t[1:]} C={channels}", work=Work(f"8192×{channels}", 3 * size),
                ),
            ]  # fmt: skip
    return found
