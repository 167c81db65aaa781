"""RMS norms: x / rms(x), times weight or times (1 + weight), whatever the class is called."""

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

OP = "rms_norm"


def find(model: nn.Module) -> Iterator[Found | Skipped]:
    seen: dict[Any, dict[str, Any] | str] = {}  # one probe per class, width and epsilon
    for path, module in model.named_modules():
        channels = _channels(module)
        if channels is None:
            if "rmsnorm" in type(module).__name__.lower() and not module._modules:
                yield Skipped(path, OP, _why_not(module))
            continue
        slot = slot_of(module)
        if occupied(module, slot):
            yield Skipped(path, OP, "its forward was replaced by other code")
            continue
        kind = (type(module), channels, tuple(sorted(probing.small_numbers(module).items())), tuple(module._parameters))
        if kind not in seen:
            seen[kind] = _recognise(module, channels)
        settings = seen[kind]
        if isinstance(settings, str):
            if "rms" in type(module).__name__.lower():
                yield Skipped(path, OP, settings)
            continue
        yield Found(path, module, slot, settings, kind)


def bind(module: nn.Module, settings: dict[str, Any]) -> Callable[..., Tensor]:
    eps, offset, cast_back = settings["eps"], settings["weight_offset"], settings["cast_back"]
    name = settings["weight"]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        weight = module._parameters[name] if name else None
        y = ops.rms_norm(x, weight, eps, weight_offset=offset)
        return y.to(x.dtype) if cast_back and y.dtype != x.dtype else y

    return forward


def verify(found: Found, dtype: torch.dtype) -> str:
    clone = probing.clone_with_random_parameters(found.module, dtype)
    x = probing.random((3, 5, _channels(found.module) or 1), dtype, probing.device_of(found.module), scale=2.0)
    return probing.disagreement(
        original_forward(clone), bind(clone, found.settings), [x], list(clone.parameters()), dtype
    )


def _why_not(module: nn.Module) -> str:
    if not probing.takes_one_argument(module):
        return "its forward takes more than the hidden states"
    if not probing.small_numbers(module):
        return "none of its attributes is an epsilon (torch.nn.RMSNorm takes the dtype's own unless eps is given)"
    return "it has other parameters or buffers than one weight of one dimension"


def _channels(module: nn.Module) -> int | None:
    """The width of a module that could be a norm: at most one parameter, which is 1-D, no children, no buffers, an
    epsilon, and a forward of one argument. None for any other."""
    if module._modules or any(b is not None for b in module._buffers.values()) or not probing.small_numbers(module):
        return None
    parameters = [p for p in module._parameters.values() if p is not None]
    if len(parameters) > 1 or not probing.takes_one_argument(module):
        return None
    if not parameters:
        return 64  # any width will do: there is no weight to match
    shape = probing.full_shape(parameters[0])
    return shape[0] if len(shape) == 1 else None


def _recognise(module: nn.Module, channels: int) -> dict[str, Any] | str:
    """The settings with which rms_norm reproduces this module, or why there are none."""
    name = next((n for n, p in module._parameters.items() if p is not None), None)
    device = probing.device_of(module)
    clone = probing.clone_with_random_parameters(module, torch.float32)
    weight = clone._parameters[name] if name else None
    # A row of tiny values shows the epsilon, a row of large ones the rest.
    x = probing.random((4, channels), torch.float32, device) * torch.tensor(
        [[1e-3], [1e-2], [1.0], [30.0]], device=device
    )
    try:
        with torch.no_grad():
            expected = original_forward(clone)(x)
            if not isinstance(expected, Tensor) or expected.shape != x.shape:
                return "its output has another shape than its input"
            for eps in dict.fromkeys(probing.small_numbers(module).values()):
                for offset in (0.0, 1.0) if name else (0.0,):
                    if torch.allclose(
                        ops.rms_norm(x, weight, eps, weight_offset=offset), expected, rtol=1e-4, atol=1e-5
                    ):
                        half = x.to(torch.bfloat16)
                        keeps = original_forward(clone)(half).dtype == torch.bfloat16  # with an fp32 weight
                        return {"weight": name, "eps": eps, "weight_offset": offset, "cast_back": keeps}
    except Exception as error:
        return f"a probe of its forward failed: {type(error).__name__}: {error}"
    return "not an RMS norm: on random numbers it computes something else"
