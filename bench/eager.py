"""The peers in plain PyTorch: what a Transformers model or a training script does without fastllm, step by step and
dtype by dtype, restated so that a benchmark needs torch alone. torch.compile is given the same functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As LlamaRMSNorm: normalised in fp32, rounded, then scaled."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normed.to(x.dtype)


def rms_norm_into(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return out.copy_(rms_norm(x, weight))


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm(total, weight), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, 1e-5)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As apply_rotary_pos_emb of Llama, in the dtype of its inputs."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """As ForCausalLMLoss, which takes the logits to fp32 first."""
    return F.cross_entropy(logits.float(), target)


def token_logprobs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _token_logprobs(logits.float(), target)


def _token_logprobs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and the entropy of its distribution."""
    logp = logits.log_softmax(-1)
    return logp.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(hidden @ weight.T, target)


def linear_token_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return token_logprobs(hidden @ weight.T, target)


def exact_rms_norm(x: Tensor, weight: Tensor, *_: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def exact_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return exact_rms_norm(x + residual, weight), x + residual


def exact_linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, target)


def exact_token_logprobs(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _token_logprobs(logits, target)


def exact_linear_token_logprobs(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return _token_logprobs(hidden @ weight.T, target)
