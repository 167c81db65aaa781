"""Other libraries as peers: each function imports one and returns what a case can call, or raises why it cannot."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bench.case import Missing

Peer = dict[str, Callable[[], Callable[..., Any]]]


def liger(name: str, call: Callable[..., Any]) -> Peer:
    """The peer "liger", which calls ``call(function, *arguments)`` with Liger-Kernel's function `name`."""
    return _on_gpu("liger", "liger_kernel.transformers.functional", name, call)


def liger_grpo() -> Callable[..., Any]:
    """Liger's chunked GRPO loss from hidden states: plain torch and torch.compile, so it runs anywhere."""
    module = importlib.import_module("liger_kernel.chunked_loss")
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="bnpo")
    return lambda hidden, weight, tokens, old, advantages, mask: loss(
        hidden, weight, tokens, mask.to(old.dtype), advantages, old_per_token_logps=old
    )[0]


def liger_dpo() -> Callable[..., Any]:
    """Liger's chunked DPO loss from hidden states, reference included; it runs anywhere, too."""
    loss = importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearDPOLoss(beta=0.1)
    return lambda hidden, weight, tokens, mask, ref_hidden, ref_weight: loss(
        weight, hidden, tokens.masked_fill(~mask, -100), ref_input=ref_hidden, ref_weight=ref_weight
    )[0]


def flash_attn(path: str, call: Callable[..., Any]) -> Peer:
    """The peer "flash-attn": the function at `path`, "module:name", among the ops that this library has beside
    attention."""
    module, name = path.split(":")
    return _on_gpu("flash-attn", f"flash_attn.ops.triton.{module}", name, call)


def xformers_rms_norm() -> Callable[..., Any]:
    function = importlib.import_module("xformers.ops.rmsnorm").rms_norm
    return _for_gpu(lambda x, weight: function(x, weight, 1e-6))


def _on_gpu(label: str, module: str, name: str, call: Callable[..., Any]) -> Peer:
    def build() -> Callable[..., Any]:
        importlib.import_module(module.split(".")[0])  # is it there at all? its kernels may not import without a GPU
        if not torch.cuda.is_available():
            raise Missing("its kernels need a GPU")
        function = getattr(importlib.import_module(module), name)
        return _for_gpu(lambda *arguments: call(function, *arguments))

    return {label: build}


def _for_gpu(function: Callable[..., Any], reason: str = "its kernels need a GPU") -> Callable[..., Any]:
    def checked(*arguments: Any) -> Any:
        if not arguments[0].is_cuda:
            raise Missing(reason)
        return function(*arguments)

    return checked


def torch_rms_norm() -> Callable[..., Any]:
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, 1e-6)


def torch_chunked_loss() -> Callable[..., Any]:
    """torch's own chunked linear_cross_entropy, with the options it picks for the machine."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Missing(f"torch {torch.__version__} has none")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, target: F.linear_cross_entropy(hidden, weight, target, options=options)


def attention() -> Peer:
    """Other kernels of dense causal attention, for tensors (B, H, L, D)."""

    def flash() -> Callable[..., Any]:
        function = importlib.import_module("flash_attn").flash_attn_func
        return _for_gpu(
            lambda q, k, v: function(*_tokens_first(q, k, v), causal=True, deterministic=True).transpose(1, 2)
        )

    def xformers() -> Callable[..., Any]:
        library = importlib.import_module("xformers.ops")
        mask = library.LowerTriangularMask()
        return _for_gpu(
            lambda q, k, v: library.memory_efficient_attention(*_tokens_first(q, k, v), attn_bias=mask).transpose(1, 2)
        )

    def cudnn() -> Callable[..., Any]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(q: Any, k: Any, v: Any) -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return _for_gpu(run)

    return {
        "flash-attn": flash, "xformers": xformers, "SDPA cuDNN": cudnn, **flex_attention(lambda b, h, i, j: j <= i)
    }  # fmt: skip


def flex_attention(visible: Callable[..., Any]) -> Peer:
    """PyTorch's FlexAttention, compiled, under the mask ``visible(batch, head, query, key)``."""

    def build() -> Callable[..., Any]:
        from torch.nn.attention import flex_attention as flex

        compiled = torch.compile(flex.flex_attention, dynamic=False)
        masks: dict[int, Any] = {}

        def run(q: Any, k: Any, v: Any) -> Any:
            length = q.shape[2]
            if length not in masks:
                masks[length] = flex.create_block_mask(visible, None, None, length, length, device=q.device.type)
            return compiled(q, k, v, block_mask=masks[length])

        return _for_gpu(run, "its kernels with a backward pass need a GPU")

    return {"FlexAttention": build}


def _tokens_first(*tensors: Any) -> list[Any]:
    return [t.transpose(1, 2) for t in tensors]
