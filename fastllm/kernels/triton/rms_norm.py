"""RMS norm: one program per row forward; backward, programs that walk over rows and sum the weight gradient in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, block_for, program_count, triton_type, warps_for
from fastllm.kernels.triton._numeric import narrow


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, y_ptr, rstd_ptr, channels, eps, weight_offset,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * channels
    y_ptr += row * channels
    columns = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        inside = columns < channels
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / channels + eps)
        y = x * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
        tl.store(y_ptr + columns, narrow(y, y_ptr), mask=inside)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, channels, BLOCK):
            x = tl.load(x_ptr + start + columns, mask=start + columns < channels, other=0.0).to(tl.float32)
            squares += x * x
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / channels + eps)
        for start in range(0, channels, BLOCK):
            inside = start + columns < channels
            y = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) * rstd
            if HAS_WEIGHT:
                y *= tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
            tl.store(y_ptr + start + columns, narrow(y, y_ptr), mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    grad_y_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, rows, channels, weight_offset,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    # With g = grad_y * weight and n = x * rstd: grad_x = rstd * (g - n * mean(g n)), grad_weight = sum_rows(grad_y n).
    program = tl.program_id(0).to(tl.int64)  # rows inherit the width, so offsets cannot overflow
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    partial_ptr += program * channels
    if ONE_BLOCK:
        inside = columns < channels
        weight = tl.full([BLOCK], 1.0, tl.float32)
        if HAS_WEIGHT:
            weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
        total = tl.zeros([BLOCK], tl.float32)
        for row in range(program, rows, programs):
            at = row * channels + columns
            rstd = tl.load(rstd_ptr + row)
            grad = tl.load(grad_y_ptr + at, mask=inside, other=0.0).to(tl.float32)
            normed = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
            scaled = grad * weight
            mean = tl.sum(scaled * normed, 0) / channels
            tl.store(grad_x_ptr + at, narrow(rstd * (scaled - normed * mean), grad_x_ptr), mask=inside)
            total += grad * normed
        if HAS_WEIGHT:
            tl.store(partial_ptr + columns, total, mask=inside)
    else:
        for row in range(program, rows, programs):
            base = row * channels
            rstd = tl.load(rstd_ptr + row)
            dot = tl.zeros([BLOCK], tl.float32)
            for start in range(0, channels, BLOCK):
                inside = start + columns < channels
                grad = tl.load(grad_y_ptr + base + start + columns, mask=inside, other=0.0).to(tl.float32)
                normed = tl.load(x_ptr + base + start + columns, mask=inside, other=0.0).to(tl.float32) * rstd
                product = grad * normed
                if HAS_WEIGHT:  # this program's own row of partial sums, zeroed by the launcher
                    sums = tl.load(partial_ptr + start + columns, mask=inside, other=0.0)
                    tl.store(partial_ptr + start + columns, sums + product, mask=inside)
                    product *= (
                        tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
                    )
                dot += product
            mean = tl.sum(dot, 0) / channels
            for start in range(0, channels, BLOCK):
                inside = start + columns < channels
                grad = tl.load(grad_y_ptr + base + start + columns, mask=inside, other=0.0).to(tl.float32)
                if HAS_WEIGHT:
                    grad *= tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
                normed = tl.load(x_ptr + base + start + columns, mask=inside, other=0.0).to(tl.float32) * rstd
                grad_x = rstd * (grad - normed * mean)
                tl.store(grad_x_ptr + base + start + columns, narrow(grad_x, grad_x_ptr), mask=inside)


def forward(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    channels = x.shape[-1]
    y, rstd = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rstd.numel():
        block = block_for(channels)
        _forward_kernel[(rstd.numel(),)](
            x, weight if weight is not None else x, y, rstd, channels, eps, weight_offset,
            HAS_WEIGHT=weight is not None, BLOCK=block, ONE_BLOCK=channels <= block, num_warps=warps_for(block),
        )  # fmt: skip
    return y, rstd


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    grad_y, x = grad_y.contiguous(), x.contiguous()
    rows, channels = rstd.numel(), x.shape[-1]
    programs = program_count(x.device, rows)
    grad_x = torch.empty_like(x)
    block = block_for(channels)
    partial_shape = (programs if weight is not None else 0, channels)
    make = torch.empty if channels <= block else torch.zeros
    partial = make(partial_shape, dtype=torch.float32, device=x.device)
    if programs:
        _backward_kernel[(programs,)](
            grad_y, x, weight if weight is not None else x, rstd, grad_x, partial, rows, channels, weight_offset,
            HAS_WEIGHT=weight is not None, BLOCK=block, ONE_BLOCK=channels <= block, num_warps=warps_for(block, 8),
        )  # fmt: skip
    return grad_x, x.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)


def configurations() -> list[Configuration]:
    """The specialisations behind common model widths, and the long-row form."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (128, 4096, 8192, 32768):
            block = block_for(channels)
            constants = {"HAS_WEIGHT": True, "BLOCK": block, "ONE_BLOCK": channels <= block}
            t = triton_type(dtype)
            common = {"x_ptr": t, "weight_ptr": t}
            found.append(
                Configuration(
                    _forward_kernel,
                    {
                        **common,
                        "y_ptr": t,
                        "rstd_ptr": "*fp32",
                        "channels": "i32:16",
                        "eps": "fp32",
                        "weight_offset": "fp32",
                    },
                    constants,
                    num_warps=warps_for(block),
                    label=f"rms_norm forward {t[1:]} C={channels}",
                )
            )
            found.append(
                Configuration(
                    _backward_kernel,
                    {
                        "grad_y_ptr": t,
                        **common,
                        "rstd_ptr": "*fp32",
                        "grad_x_ptr": t,
                        "partial_ptr": "*fp32",
                        "rows": "i32",
                        "channels": "i32:16",
                        "weight_offset": "fp32",
                    },
                    constants,
                    num_warps=warps_for(block, 8),
                    label=f"rms_norm backward {t[1:]} C={channels}",
                )
            )
    return found
