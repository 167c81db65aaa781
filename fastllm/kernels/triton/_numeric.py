"""Device functions that several kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from fastllm.kernels.triton import interpreted

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def narrow(x, pointer):
    """x (fp32) in the element type of `pointer`, rounded to nearest even."""
    return narrow_to(x, pointer.dtype.element_ty)


@triton.jit
def narrow_to(x, TYPE: tl.constexpr):
    """x (fp32) in TYPE, rounded to nearest even.

    Hardware rounds a plain cast that way. Triton's interpreter truncates fp32 to bf16, which would be a second meaning
    for the same kernel, so there the rounding is done on the bits.
    """
    if _INTERPRETED and tl.bfloat16 == TYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:  # noqa: RET505 - one constexpr choice, of which Triton compiles one branch
        return x.to(TYPE)


@triton.jit
def product(a, b):
    """The matrix product of two blocks, in fp32, on the matrix units where they take its type. The interpreter multiplies the
    bits of bf16 as if they were whole numbers; there it is widened first."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:  # noqa: RET505 - one constexpr choice, of which Triton compiles one branch
        return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_product(total, a, b):
    """total + product(a, b), in the accumulators of the matrix units."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        return total + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:  # noqa: RET505 - one constexpr choice, of which Triton compiles one branch
        return tl.dot(a, b, total, input_precision="ieee")
