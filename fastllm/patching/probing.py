"""Running a module against its original on random inputs, without touching the model, its gradients or the random state."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.patching.replacement import Replacement


def random(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, scale: float = 1.0, seed: int = 0
) -> Tensor:
    """Normal values from a generator of their own."""
    values = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed + sum(shape))) * scale
    return values.to(device=device, dtype=dtype)


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, that of the whole where ZeRO-3 holds a shard."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def small_numbers(module: nn.Module) -> dict[str, float]:
    """Small positive attributes: one of them is a norm's epsilon."""
    return {n: v for n, v in vars(module).items() if isinstance(v, float) and 0 < v <= 1e-2}


def device_of(module: nn.Module) -> torch.device:
    """Where to probe: where the parameters are, the CPU when they are nowhere (meta) or absent."""
    parameter = next(iter(module.parameters()), None)
    return torch.device("cpu") if parameter is None or parameter.device.type == "meta" else parameter.device


def clone_with_random_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A module of the same class and attributes, unpatched, with its own random parameters; for modules without children."""
    clone = copy.copy(module)
    clone.__dict__ = {n: v for n, v in module.__dict__.items() if not isinstance(v, Replacement) and n != "forward"}
    clone._parameters = {
        name: None if p is None else nn.Parameter(random(full_shape(p), dtype, device_of(module), seed=1))
        for name, p in module._parameters.items()
    }
    return clone


def takes_one_argument(module: nn.Module) -> bool:
    """True when the class's forward has one parameter besides self and no other, optional ones included: a second one (the
    gate of a gated norm) would change what it computes."""
    try:
        return len(inspect.signature(type(module).forward).parameters) == 2
    except (TypeError, ValueError):
        return False


def disagreement(
    original: Callable[..., Any],
    replaced: Callable[..., Any],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    dtype: torch.dtype,
) -> str:
    """What differs between two functions, forward and backward; "" when nothing does beyond twice the original's own
    rounding error, which is judged against the original in fp32 on the same values."""
    found = {}
    for name, function in (("original", original), ("replaced", replaced)):
        found[name] = _run(function, inputs, parameters)
    wide = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.data = p.data.float()
    try:
        exact = _run(original, [i.float() for i in inputs], parameters)
    finally:
        for p, kept in zip(parameters, wide):
            p.data = kept
    atol = 2e-5 if dtype == torch.float32 else 1e-3
    for i, (a, b, c) in enumerate(zip(found["original"], found["replaced"], exact)):
        what = "output" if i == 0 else f"gradient {i - 1}"
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{what} is {b.dtype} {tuple(b.shape)}, the original's {a.dtype} {tuple(a.shape)}"
        error = (b.float() - c).abs().max()
        bound = 2 * (a.float() - c).abs().max() + atol * c.abs().max().clamp(min=1)
        if not bool(error <= bound):
            return f"{what} differs by {float(error):.2g}, {float(bound):.2g} allowed"
    return ""


def _run(function: Callable[..., Any], inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    with torch.enable_grad():
        leaves = [i.detach().clone().requires_grad_() for i in inputs]
        output = function(*leaves)
        weights = random(output.shape, output.dtype, output.device, seed=2)
        # gradients in a parameter that was frozen or cast are asked for all the same: nothing here is the model's own
        wanted = [*leaves, *parameters]
        grads = torch.autograd.grad(output, wanted, weights, allow_unused=True)
    return [output.detach(), *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads))]
