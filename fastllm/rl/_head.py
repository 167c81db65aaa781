"""The LM head as the losses take it: a weight, or the module itself, with adapters and with hooks that gather its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
# (hidden, weight, bias, low rank): logits are hidden @ weight.T + bias, and where there are adapters also + u @ b.T of (u, b)
Body = Callable[[Tensor, Tensor, "Tensor | None", "tuple[Tensor, Tensor] | None"], T]


class _Adapter(NamedTuple):
    down: nn.Module
    up: nn.Linear
    dropout: nn.Module
    scaling: float


def with_head(head: Any, bias: Tensor | None, hidden: Tensor, body: Body[T]) -> T:
    """``body(hidden, weight, bias, low_rank)`` with the weights of `head`, at a moment when they are whole.

    A module with hooks is called as ever, `body` standing in for its forward: what DeepSpeed's ZeRO-3 or FSDP hooks gather is
    there in `body` and, for the tensors that `body` returns, again in the backward pass.
    """
    if not isinstance(head, nn.Module):
        if not isinstance(head, Tensor):
            raise TypeError(f"weight must be a tensor (V, C) or a linear layer, got {type(head).__name__}")
        if hasattr(head, "ds_id") and head.numel() == 0:
            raise ValueError("weight is partitioned by ZeRO-3: give the head as a module, or gather its weight first")
        return body(hidden, head, bias, None)
    if bias is not None:
        raise ValueError("bias must be None where weight is a module, whose own bias is used")
    linear, adapters = _parts(head)

    def descend(hidden: Tensor, left: list[_Adapter], found: list[tuple[Tensor, _Adapter]]) -> T:
        if left:
            down, up, dropout, scaling = left[0]
            x = hidden.to(next(down.parameters()).dtype)
            return _inside(up, down(dropout(x)) * scaling, lambda u: descend(hidden, left[1:], [*found, (u, left[0])]))
        if not found:
            return body(hidden, linear.weight, linear.bias, None)
        total: Tensor | None = linear.bias
        for _, adapter in found:
            if adapter.up.bias is not None:
                own = adapter.up.bias * adapter.scaling
                total = own if total is None else total + own.to(total.dtype)
        u, b = (torch.cat(parts, -1) for parts in zip(*((u, adapter.up.weight) for u, adapter in found)))
        if torch.is_autocast_enabled(hidden.device.type):
            u, b = (t.to(torch.get_autocast_dtype(hidden.device.type)) for t in (u, b))
        return body(hidden, linear.weight, total, (u, b))

    return _inside(linear, hidden, lambda h: descend(h, adapters, []))


def _parts(head: nn.Module) -> tuple[nn.Linear, list[_Adapter]]:
    """The linear layer and its active LoRA adapters, recognised by structure (PEFT's layers)."""
    layer: Any = head
    if hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
        active = [] if layer.disable_adapters else list(layer.active_adapters)
        layer = layer.modules_to_save[active[0]] if active else layer.original_module
    adapters = []
    if all(hasattr(layer, name) for name in ("base_layer", "lora_A", "lora_B", "scaling")):
        active = (
            [] if layer.disable_adapters or layer.merged else [a for a in layer.active_adapters if a in layer.lora_A]
        )
        for name in active:
            if variant := getattr(layer, "lora_variant", {}).get(name):
                raise ValueError(
                    f"weight must be a linear layer with plain LoRA adapters, got adapter {name!r} of variant "
                    f"{type(variant).__name__}: give its effective weight as a tensor"
                )
            adapters.append(
                _Adapter(layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name], layer.scaling[name])
            )
        layer = layer.base_layer
    for part in (layer, *(a.up for a in adapters)):
        _check_linear(part)
    return layer, adapters


def _check_linear(module: Any) -> None:
    own = module.__dict__.get("forward")
    remedy = "give its effective weight as a tensor"
    if callable(getattr(module, "get_output_embeddings", None)):  # a model
        remedy = "give its head, model.get_output_embeddings()"
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        what = f"a {type(module).__name__}"
    elif "_hf_hook" in module.__dict__ or (own is not None and not type(own).__module__.startswith("fastllm.")):
        what = "one whose forward was replaced by other code"
    else:
        return
    raise ValueError(
        f"weight must be a tensor (V, C) or a linear layer, with LoRA adapters or without, got {what}: {remedy}"
    )


def _inside(module: nn.Module, x: Tensor, body: Callable[[Tensor], T]) -> T:
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    if not any(hooks):
        return body(x)
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = body
    try:
        return module(x)
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
