"""Kernels that `python -m bench static` must find fault with, and one that it must not, for its tests."""

import os
import sys

import triton
import triton.language as tl

from bench import static
from fastllm.kernels.triton import _static
from fastllm.kernels.triton._launch import Configuration, Work


@triton.jit
def _hoarding_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns)
    scale = tl.sum(x, 0)  # every x must be kept until the sum is known: 256 a thread, and as many of y
    y = tl.load(y_ptr + columns)
    tl.store(x_ptr + columns, x * scale + y * tl.sum(y, 0))


@triton.jit
def _matmul_kernel(a_ptr, b_ptr, c_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, BLOCK_K)
    total = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k[:, None]) * N + n)
        total = tl.dot(a, b, total)
    tl.store(c_ptr + m * N + n, total)


@triton.jit
def _copy_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + columns, tl.load(x_ptr + columns))


def configurations():
    pair = {"x_ptr": "*fp32", "y_ptr": "*fp32"}
    product = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32", "K": "i32:16"}
    tile = {"M": 128, "N": 128, "BLOCK_K": 64}
    return [
        Configuration(_hoarding_kernel, pair, {"BLOCK": 32768}, label="hoarder"),
        Configuration(_copy_kernel, pair, {"BLOCK": 1024}, label="copy as matrix", matrix=True),
        Configuration(  # 128 kB a stage
            _matmul_kernel, product, tile | {"BLOCK_K": 256}, num_stages=3, label="large tiles", matrix=True
        ),
        Configuration(_matmul_kernel, product, {"M": 16, "N": 16, "BLOCK_K": 64}, label="small tiles", matrix=True),
        Configuration(
            _matmul_kernel, product, tile, label="matmul", matrix=True,
            work=Work("128×128×4096", 2 * 2 * 128 * 4096, 2 * 128 * 128 * 4096),
        ),
        Configuration(_copy_kernel, pair, {"BLOCK": 1024}, label="copy", work=Work("1 GB", 10**9)),
        Configuration(_copy_kernel, pair, {"BLOCK": 1000}, label="no power of two"),
    ]  # fmt: skip


def crash_on_copy():
    """As an assertion in LLVM does: the process is gone, with no Python exception."""
    compile_for = _static.compile_for

    def crashing(configuration, target):
        if configuration.label == "copy":
            os.abort()
        return compile_for(configuration, target)

    _static.compile_for = crashing


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--crash"]
    if len(arguments) < len(sys.argv) - 1:
        crash_on_copy()
    sys.exit(static.main(arguments, configurations()))
