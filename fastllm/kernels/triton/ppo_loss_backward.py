"""The gradients of the policy-gradient loss: those that its forward pass left behind, times its normaliser and its own gradient."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, triton_type
from fastllm.kernels.triton._numeric import narrow

BLOCK = 1024


@triton.jit
def _scale_kernel(grads_ptr, grad_loss_ptr, scale_ptr, out_ptr, tokens, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad_loss_ptr) * tl.load(scale_ptr)
    grad = tl.load(grads_ptr + at, mask=at < tokens, other=0.0)
    # A 0 stays one, whatever the normaliser is: masked tokens have no gradient.
    tl.store(out_ptr + at, narrow(tl.where(grad == 0, 0.0, grad * factor), out_ptr), mask=at < tokens)


def ppo_loss_backward(
    grad_loss: Tensor, scale: Tensor, stored_logprobs: Tensor, stored_values: Tensor, stored_entropy: Tensor,
    logprobs: Tensor, _old: Tensor, _advantages: Tensor, mask: Tensor, values: Tensor | None, _old_values: Tensor | None,
    _returns: Tensor | None, entropy: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens = mask.numel()

    def scaled(stored: Tensor, like: Tensor | None) -> Tensor:
        if like is None:
            return grad_loss.new_empty(0)
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        if tokens:
            _scale_kernel[(triton.cdiv(tokens, BLOCK),)](stored, grad_loss, scale, out, tokens, BLOCK=BLOCK)
        return out

    return scaled(stored_logprobs, logprobs), scaled(stored_values, values), scaled(stored_entropy, entropy)


def configurations() -> list[Configuration]:
    """Gradients scaled, in the dtypes of what they are for."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        t = triton_type(dtype)
        pointers = {"grads_ptr": "*fp32", "grad_loss_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": t}
        found.append(
            Configuration(
                _scale_kernel, {**pointers, "tokens": "i32:16"}, {"BLOCK": BLOCK}, label=f"ppo_loss backward {t[1:]}"
            )
        )
    return found
