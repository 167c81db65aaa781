"""act(gate) * up and its two gradients: one program per stretch of a row, or of the whole tensor where it is dense."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, Work, triton_type
from fastllm.kernels.triton._numeric import narrow

BLOCK = 1024  # with four warps, eight elements a thread: one 16-byte load of bf16, two of fp32
WARPS = 4


@triton.jit
def _sigmoid_and_rest(z):
    # s and 1 - s, the latter as s e^-z, which does not cancel; the bound keeps 0 times inf from a hugely negative z
    e = tl.exp(-z)
    s = 1.0 / (1.0 + e)
    return s, s * tl.where(e > 3e38, 3e38, e)


@triton.jit
def _activated_and_slope(z, ACTIVATION: tl.constexpr):
    # 0: silu, slope s + z s (1 - s). 1: tanh-gelu, which is z sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z³).
    # 2: gelu by erf, value z P(z), slope P(z) + z p(z) with P and p of the normal distribution.
    if ACTIVATION == 0:
        s, rest = _sigmoid_and_rest(z)
        value = z * s
        slope = s + value * rest
    elif ACTIVATION == 1:
        squared = z * z
        squared = tl.where(squared > 1e30, 1e30, squared)  # keeps a huge finite z from 0 times inf
        s, rest = _sigmoid_and_rest(z * (1.5957691216057308 + 0.0713548162726009 * squared))
        value = z * s
        slope = s + value * rest * (1.5957691216057308 + 0.2140644488178027 * squared)
    else:
        below = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
        value = z * below
        slope = below + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    return value, slope


@triton.jit
def _stretch(channels, blocks, BLOCK: tl.constexpr):
    # Row, first column, columns within the stretch and which of them exist. 64-bit where an offset may pass 2^31.
    program = tl.program_id(0).to(tl.int64)
    row = program // blocks
    start = program % blocks * BLOCK
    columns = tl.arange(0, BLOCK)
    return row, start, columns, columns < channels - start


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, channels, blocks,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, columns, inside = _stretch(channels, blocks, BLOCK)
    z = tl.load(gate_ptr + (row * gate_stride + start) + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_stride + start) + columns, mask=inside, other=0.0).to(tl.float32)
    value, _ = _activated_and_slope(z, ACTIVATION)
    tl.store(y_ptr + (row * channels + start) + columns, narrow(value * up, y_ptr), mask=inside)


@triton.jit
def _backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, grad_stride, gate_stride, up_stride, channels, blocks,
    ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, columns, inside = _stretch(channels, blocks, BLOCK)
    z = tl.load(gate_ptr + (row * gate_stride + start) + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + (row * up_stride + start) + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + (row * grad_stride + start) + columns, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activated_and_slope(z, ACTIVATION)
    at = (row * channels + start) + columns
    tl.store(grad_gate_ptr + at, narrow(grad * up * slope, grad_gate_ptr), mask=inside)
    tl.store(grad_up_ptr + at, narrow(grad * value, grad_up_ptr), mask=inside)


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """`t` as rows of contiguous channels and the stride between them; copied only where its layout is not that."""
    if t.is_contiguous():
        return t, t.shape[-1] if t.dim() else 1
    if t.stride(-1) == 1 or t.shape[-1] == 1:
        stride, inner_rows = t.shape[-1], 1
        for size, s in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1])):
            if size == 1:
                continue
            if inner_rows == 1:
                stride = s
            elif s != stride * inner_rows:
                break
            inner_rows *= size
        else:
            return t, stride
    return t.contiguous(), t.shape[-1]


def _grid(like: Tensor, strides: tuple[int, ...]) -> tuple[int, int, int]:
    """Channels a row, blocks a row and programs. Dense tensors are one long row, so no block inside is cut short."""
    channels = like.shape[-1] if like.dim() else 1
    if all(s == channels for s in strides):
        channels = like.numel()
    blocks = triton.cdiv(channels, BLOCK)
    return channels, blocks, like.numel() // channels * blocks


def forward(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if y.numel():
        gate, gate_stride = _rows(gate)
        up, up_stride = _rows(up)
        channels, blocks, programs = _grid(y, (gate_stride, up_stride))
        _forward_kernel[(programs,)](
            gate, up, y, gate_stride, up_stride, channels, blocks, ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS
        )
    return y


def backward(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    grad_up = torch.empty_like(gate, memory_format=torch.contiguous_format)
    if grad_up.numel():
        grad, grad_stride = _rows(grad)
        gate, gate_stride = _rows(gate)
        up, up_stride = _rows(up)
        channels, blocks, programs = _grid(grad_up, (grad_stride, gate_stride, up_stride))
        _backward_kernel[(programs,)](
            grad, gate, up, grad_gate, grad_up, grad_stride, gate_stride, up_stride, channels, blocks,
            ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return grad_gate, grad_up


def configurations() -> list[Configuration]:
    """Each activation and dtype; widths and strides only have to be multiples of 16, as those of models are."""
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for activation, name in enumerate(("silu", "gelu tanh", "gelu erf")):
            t = triton_type(dtype)
            constants = {"ACTIVATION": activation, "BLOCK": BLOCK}
            common = {"gate_ptr": t, "up_ptr": t, "gate_stride": "i32:16", "up_stride": "i32:16"}
            shape = {"channels": "i32:16", "blocks": "i32"}
            found.append(
                Configuration(
                    _forward_kernel,
                    {**common, "y_ptr": t, **shape},
                    constants,
                    num_warps=WARPS,
                    label=f"glu forward {name} {t[1:]}",
                    work=Work("8192×11008", 3 * 8192 * 11008 * dtype.itemsize),
                )
            )
            found.append(
                Configuration(
                    _backward_kernel,
                    {**common, "grad_ptr": t, "grad_gate_ptr": t, "grad_up_ptr": t, "grad_stride": "i32:16", **shape},
                    constants,
                    num_warps=WARPS,
                    label=f"glu backward {name} {t[1:]}",
                    work=Work("8192×11008", 5 * 8192 * 11008 * dtype.itemsize),
                )
            )
    return found
