"""A kernel that must spill, for the test that the static check notices: 256 live fp32 values a thread, and more."""

import sys

import triton
import triton.language as tl

from bench import static
from fastllm.kernels.triton._launch import Configuration


@triton.jit
def _hoarding_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns)
    scale = tl.sum(x, 0)  # every x must be kept until the sum is known
    y = tl.load(y_ptr + columns)
    tl.store(x_ptr + columns, x * scale + y * tl.sum(y, 0))


if __name__ == "__main__":
    hoarder = Configuration(_hoarding_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"BLOCK": 32768}, label="hoarder")
    sys.exit(static.main(sys.argv[1:], [hoarder]))
