"""Layer norms: (x - mean) / std, times a weight, plus a bias, whatever the class is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import probing
from fastllm.patching.replacement import occupied, original_forward, slot_of
from fastllm.patching.report import Skipped
from fastllm.patching.rules import Found

OP = "layer_norm"


def find(model: nn.Module) -> Iterator[Found | Skipped]:
    seen: dict[Any, dict[str, Any] | None] = {}  # one probe per class, width and epsilon
    for path, module in model.named_modules():
        width = _width(module)
        if width is None:
            continue
        kind = (
            type(module),
            width,
            tuple(sorted(probing.small_numbers(module).items())),
            module._parameters.get("bias") is None,
        )
        if kind not in seen:
            seen[kind] = _recognise(module, width)
        settings = seen[kind]
        if settings is None:
            continue
        slot = slot_of(module)
        if occupied(module, slot):
            yield Skipped(path, OP, "its forward was replaced by other code")
        else:
            yield Found(path, module, slot, settings, kind)


def bind(module: nn.Module, settings: dict[str, Any]) -> Callable[..., Tensor]:
    eps = settings["eps"]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        y = ops.layer_norm(x, module._parameters.get("weight"), module._parameters.get("bias"), eps)
        return y.to(x.dtype) if settings["cast_back"] and y.dtype != x.dtype else y

    return forward


def verify(found: Found, dtype: torch.dtype) -> str:
    clone = probing.clone_with_random_parameters(found.module, dtype)
    x = probing.random((3, 5, _width(found.module) or 1), dtype, probing.device_of(found.module), scale=2.0)
    return probing.disagreement(
        original_forward(clone), bind(clone, found.settings), [x], list(clone.parameters()), dtype
    )


def _width(module: nn.Module) -> int | None:
    """The width of a module that could be a layer norm: a 1-D weight, perhaps a bias like it, an epsilon, one input."""
    parameters = {n: p for n, p in module._parameters.items() if p is not None}
    if module._modules or "weight" not in parameters or not set(parameters) <= {"weight", "bias"}:
        return None
    shapes = {probing.full_shape(p) for p in parameters.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not probing.small_numbers(module):
        return None
    return next(iter(shapes))[0] if probing.takes_one_argument(module) else None


def _recognise(module: nn.Module, width: int) -> dict[str, Any] | None:
    device = probing.device_of(module)
    clone = probing.clone_with_random_parameters(module, torch.float32)
    x = (
        probing.random((4, width), torch.float32, device) * torch.tensor([[1e-3], [1e-2], [1.0], [30.0]], device=device)
        + 0.01
    )
    try:
        with torch.no_grad():
            expected = original_forward(clone)(x)
            for eps in dict.fromkeys(probing.small_numbers(module).values()):
                found = ops.layer_norm(x, clone._parameters.get("weight"), clone._parameters.get("bias"), eps)
                if expected.shape == found.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-4):
                    return {"eps": eps, "cast_back": _keeps_half(clone, x)}
    except Exception:  # whatever a module raises that is no norm of its one input
        return None
    return None


def _keeps_half(clone: nn.Module, x: Tensor) -> bool:
    """True when a bf16 input with fp32 weights gives a bf16 output; PyTorch's own layer norm refuses the mixture."""
    try:
        return original_forward(clone)(x.to(torch.bfloat16)).dtype == torch.bfloat16
    except RuntimeError:
        return True
