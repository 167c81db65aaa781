"""Softmax attention on a GPU, after Dao (arXiv 2307.08691): forward_pass, backward_pass, and decoding over a cache.

A program goes over the blocks that it sees: those that every pair of sees without any arithmetic of masks, the edges of the
diagonal, the window and the sinks with it; of a boolean mask the blocks that `mask_blocks` has listed. No atomics: results
repeat to the last bit. Packed documents are cut into blocks of their own; a table made on the device says which document a
program's block is of. `blocks` is what the passes share on the device, `call` on the host; `tiles` has the sizes of blocks
for each chip and says where they are copied by tensor descriptor.
"""

from __future__ import annotations

from fastllm.kernels.triton.attention.backward_pass import backward
from fastllm.kernels.triton.attention.decoding import decode
from fastllm.kernels.triton.attention.forward_pass import forward
from fastllm.kernels.triton.attention.shipped import configurations

__all__ = ["backward", "configurations", "decode", "forward"]
