"""Tiny random Transformers models and one way to run them, shared by the tests of patching."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

LLAMA = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return _stir(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes}))).to(dtype).train()


def of(config: Any) -> nn.Module:
    torch.manual_seed(0)
    return _stir(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).train()


def _stir(model: Any) -> Any:
    """Norm weights of exactly one would hide a weight that is not applied."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokens(batch: int = 2, length: int = 16, vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(5))


def step(model: nn.Module, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, logits and gradients of a training step with some labels ignored."""
    ids = tokens()
    labels = ids.clone()
    labels[0, :5] = -100
    model.zero_grad()
    output = model(**{"input_ids": ids, "labels": labels, **inputs})
    output.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), (output.logits * 1).detach(), gradients


def assert_same_step(found: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=atol)
    assert found[2].keys() == expected[2].keys()
    scale = max(g.abs().max() for g in expected[2].values())
    for name, gradient in expected[2].items():
        difference = (found[2][name] - gradient).abs().max()
        assert difference <= rtol * gradient.abs().max().clamp(min=1e-2 * scale) + 1e-9, f"{name}: {difference}"
