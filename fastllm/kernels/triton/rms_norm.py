"""RMS norm: one program per row forward; backward, programs that walk over rows and sum the weight gradient in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, Work, block_for, program_count, triton_type, warps_for
from fastllm.kernels.triton._numeric import narrow


@triton.jit
def _forward_kernel(
    x_ptr, residual_ptr, sum_ptr, weight_ptr, y_ptr, rstd_ptr, channels, eps, weight_offset,
    HAS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * channels
    y_ptr += row * channels
    if HAS_RESIDUAL:
        residual_ptr += row * channels
        sum_ptr += row * channels
    columns = tl.arange(0, BLOCK)
    if ONE_BLOCK:
        inside = columns < channels
        x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:  # the sum is rounded to its dtype, then normalised
            total = narrow(x + tl.load(residual_ptr + columns, mask=inside, other=0.0).to(tl.float32), sum_ptr)
            tl.store(sum_ptr + columns, total, mask=inside)
            x = total.to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / channels + eps)
        y = x * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
        tl.store(y_ptr + columns, narrow(y, y_ptr), mask=inside)
    else:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, channels, BLOCK):
            inside = start + columns < channels
            x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                total = narrow(
                    x + tl.load(residual_ptr + start + columns, mask=inside, other=0.0).to(tl.float32), sum_ptr
                )
                tl.store(sum_ptr + start + columns, total, mask=inside)
                x = total.to(tl.float32)
            squares += x * x
        rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / channels + eps)
        for start in range(0, channels, BLOCK):
            inside = start + columns < channels
            if HAS_RESIDUAL:  # each thread reads back what it wrote itself
                y = tl.load(sum_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) * rstd
            else:
                y = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) * rstd
            if HAS_WEIGHT:
                y *= tl.load(weight_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) + weight_offset
            tl.store(y_ptr + start + columns, narrow(y, y_ptr), mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _backward_kernel(
    grad_y_ptr, grad_sum_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, rows, channels, weight_offset,
    HAS_WEIGHT: tl.constexpr, HAS_GRAD_SUM: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
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
            grad_x = rstd * (scaled - normed * mean)
            if HAS_GRAD_SUM:
                grad_x += tl.load(grad_sum_ptr + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(grad_x_ptr + at, narrow(grad_x, grad_x_ptr), mask=inside)
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
                if HAS_GRAD_SUM:
                    grad_x += tl.load(grad_sum_ptr + base + start + columns, mask=inside, other=0.0).to(tl.float32)
                tl.store(grad_x_ptr + base + start + columns, narrow(grad_x, grad_x_ptr), mask=inside)


def forward(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, _launch_forward(x, None, None, weight, y, eps, weight_offset)


def forward_out(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, out: Tensor) -> None:
    _launch_forward(x, None, None, weight, out, eps, weight_offset)


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(y)
    return y, total, _launch_forward(x, residual.contiguous(), total, weight, y, eps, weight_offset)


def _launch_forward(
    x: Tensor,
    residual: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    y: Tensor,
    eps: float,
    weight_offset: float,
) -> Tensor:
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    channels = x.shape[-1]
    rstd = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rstd.numel():
        block = block_for(channels)
        _forward_kernel[(rstd.numel(),)](
            x, x if residual is None else residual, x if total is None else total, x if weight is None else weight,
            y, rstd,
            channels, eps, weight_offset, HAS_WEIGHT=weight is not None, HAS_RESIDUAL=residual is not None,
            BLOCK=block, ONE_BLOCK=channels <= block, num_warps=warps_for(block),
        )  # fmt: skip
    return rstd


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    return add_backward(grad_y, None, x, weight, rstd, eps, weight_offset)


def add_backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    eps: float,
    weight_offset: float,
) -> tuple[Tensor, Tensor]:
    grad_y, x, weight = grad_y.contiguous(), x.contiguous(), None if weight is None else weight.contiguous()
    rows, channels = rstd.numel(), x.shape[-1]
    programs = program_count(x.device, rows)
    grad_x = torch.empty_like(x)
    block = block_for(channels)
    partial_shape = (programs if weight is not None else 0, channels)
    make = torch.empty if channels <= block else torch.zeros
    partial = make(partial_shape, dtype=torch.float32, device=x.device)
    if programs:
        _backward_kernel[(programs,)](
            grad_y, x if grad_sum is None else grad_sum.contiguous(), x, x if weight is None else weight,
            rstd, grad_x, partial,
            rows, channels, weight_offset, HAS_WEIGHT=weight is not None, HAS_GRAD_SUM=grad_sum is not None,
            BLOCK=block, ONE_BLOCK=channels <= block, num_warps=warps_for(block, 8),
        )  # fmt: skip
    return grad_x, x.new_empty(0) if weight is None else partial.sum(0).to(weight.dtype)


def configurations() -> list[Configuration]:
    """The specialisations behind common model widths with and without a residual, and the long-row form."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for channels, residual in (
            (128, False),
            (4096, False),
            (4096, True),
            (8192, False),
            (8192, True),
            (32768, True),
        ):
            block = block_for(channels)
            shape = {"HAS_WEIGHT": True, "BLOCK": block, "ONE_BLOCK": channels <= block}
            t = triton_type(dtype)
            name = f"{'add_' * residual}rms_norm"
            forward_signature = {
                "x_ptr": t, "residual_ptr": t, "sum_ptr": t, "weight_ptr": t, "y_ptr": t, "rstd_ptr": "*fp32",
                "channels": "i32:16", "eps": "fp32", "weight_offset": "fp32",
            }  # fmt: skip
            backward_signature = {
                "grad_y_ptr": t, "grad_sum_ptr": t, "x_ptr": t, "weight_ptr": t, "rstd_ptr": "*fp32", "grad_x_ptr": t,
                "partial_ptr": "*fp32", "rows": "i32", "channels": "i32:16", "weight_offset": "fp32",
            }  # fmt: skip
            size = 8192 * channels * dtype.itemsize
            found += [
                Configuration(
                    _forward_kernel, forward_signature, {**shape, "HAS_RESIDUAL": residual},
                    num_warps=warps_for(block), label=f"{name} forward {t[1:]} C={channels}",
                    work=Work(f"8192×{channels}", (4 if residual else 2) * size),
                ),
                Configuration(
                    _backward_kernel, backward_signature, {**shape, "HAS_GRAD_SUM": residual},
                    num_warps=warps_for(block, 8), label=f"{name} backward {t[1:]} C={channels}",
                    work=Work(f"8192×{channels}", (4 if residual else 3) * size),
                ),
            ]  # fmt: skip
    return found
