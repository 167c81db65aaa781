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
_ENTROPY_COEF = 10  # its place among the arguments of the op that follow entropy


@triton.jit
def _scale_kernel(grads_ptr, grad_loss_ptr, scale_ptr, out_ptr, tokens, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad_loss_ptr) * tl.load(scale_ptr)
    grad = tl.load(grads_ptr + at, mask=at < tokens, other=0.0)
    # A 0 stays one, whatever the normaliser is: masked tokens have no gradient.
    tl.store(out_ptr + at, narrow(tl.where(grad == 0, 0.0, grad * factor), out_ptr), mask=at < tokens)


@triton.jit
def _spread_kernel(mask_ptr, grad_loss_ptr, scale_ptr, out_ptr, tokens, coef, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad_loss_ptr) * tl.load(scale_ptr)
    valid = tl.load(mask_ptr + at, mask=at < tokens, other=0) != 0
    grad = tl.where(valid & (coef != 0), coef * factor, 0.0)
    tl.store(out_ptr + at, narrow(grad, out_ptr), mask=at < tokens)


def ppo_loss_backward(
    grad_loss: Tensor, grads: Tensor, scale: Tensor, logprobs: Tensor, _old: Tensor, _advantages: Tensor, mask: Tensor,
    values: Tensor | None, _old_values: Tensor | None, _returns: Tensor | None, entropy: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, place = mask.numel(), 0
    programs = (triton.cdiv(tokens, BLOCK),)
    found = []
    for like in (logprobs, values, entropy):
        if like is None:
            found.append(grad_loss.new_empty(0))
            continue
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        if tokens and place < grads.shape[0]:
            _scale_kernel[programs](grads[place], grad_loss, scale, out, tokens, BLOCK=BLOCK)
        elif tokens:
            valid, entropy_coef = mask.contiguous().view(torch.uint8), float(rest[_ENTROPY_COEF])
            _spread_kernel[programs](valid, grad_loss, scale, out, tokens, -entropy_coef, BLOCK=BLOCK)
        found.append(out)
        place += 1
    return tuple(found)  # type: ignore[return-value]


def configurations() -> list[Configuration]:
    """Gradients scaled, and the entropy's, which is one number for all valid tokens."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        t = triton_type(dtype)
        signature = {
            "grads_ptr": "*fp32", "mask_ptr": "*u8", "grad_loss_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": t,
            "tokens": "i32:16", "coef": "fp32",
        }  # fmt: skip
        for kernel, label in ((_scale_kernel, "ppo_loss backward"), (_spread_kernel, "ppo_loss backward of entropy")):
            found.append(Configuration(kernel, signature, {"BLOCK": BLOCK}, label=f"{label} {t[1:]}"))
    return found
