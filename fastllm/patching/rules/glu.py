"""Gated linear units: an activation module whose result some method of its parent multiplies.

The activation returns a deferred tensor; a product with the other half fuses, anything else computes it. So every form
works: separate or fused projections, experts, LoRA inside the projections.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import probing
from fastllm.patching.deferred import DeferredActivation
from fastllm.patching.replacement import occupied, original_forward, slot_of
from fastllm.patching.report import Skipped
from fastllm.patching.rules import Found, has_hooks

OP = "glu"
KERNEL = "swiglu"

_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": ops.swiglu,
    "gelu_tanh": functools.partial(ops.geglu, approximate="tanh"),
    "gelu": functools.partial(ops.geglu, approximate="none"),
}


def find(model: nn.Module) -> Iterator[Found | Skipped]:
    for path, parent in model.named_modules():
        for name, module in parent._modules.items():
            if module is None or not _could_be_activation(module) or name not in _multiplied(parent.__class__):
                continue
            here = f"{path}.{name}" if path else name
            slot = slot_of(module)
            if occupied(module, slot):
                yield Skipped(here, OP, "its forward was replaced by other code")
            elif has_hooks(module):
                yield Skipped(here, OP, "hooks watch its activation")
            elif activation := _recognise(module):
                yield Found(here, module, slot, {"activation": activation}, (type(module), activation))
            else:
                yield Skipped(here, OP, f"{type(module).__name__} is neither SiLU nor GELU")


def bind(module: nn.Module, settings: dict[str, Any]) -> Callable[[Tensor], Any]:
    act, product = original_forward(module), _PRODUCTS[settings["activation"]]

    def forward(gate: Tensor) -> Any:
        return DeferredActivation(gate, act, product)

    return forward


def verify(found: Found, dtype: torch.dtype) -> str:
    act, replaced = original_forward(found.module), bind(found.module, found.settings)
    gate, up = (probing.random((3, 5, 67), dtype, torch.device("cpu"), scale=3.0, seed=s) for s in (3, 4))
    return probing.disagreement(lambda g, u: act(g) * u, lambda g, u: replaced(g) * u, [gate, up], [], dtype)


def _could_be_activation(module: nn.Module) -> bool:
    return not any(True for _ in module.parameters()) and not module._modules and probing.takes_one_argument(module)


@functools.cache
def _multiplied(parent: Any) -> frozenset[str]:
    """Names of ``self.<name>`` whose call some method of the class multiplies: ``self.act(x) * y`` or ``y * self.act(x)``,
    directly or through a variable."""
    found: set[str] = set()
    for method in [m for cls in parent.__mro__[:-1] if cls is not nn.Module for m in vars(cls).values()]:
        function = inspect.unwrap(method) if inspect.isfunction(method) else None
        if function is None or not any("act" in n or "glu" in n for n in function.__code__.co_names):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, SyntaxError, TypeError):
            continue
        variables: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and (name := _called(node.value)):
                variables[node.targets[0].id] = name
        for node in ast.walk(tree):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                for side in (node.left, node.right):
                    name = _called(side) or (variables.get(side.id) if isinstance(side, ast.Name) else None)
                    if name:
                        found.add(name)
    return frozenset(found)


def _called(node: ast.AST) -> str | None:
    """ "act_fn" for the expression ``self.act_fn(...)``."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
        return node.func.attr if node.func.value.id == "self" else None
    return None


def _recognise(module: nn.Module) -> str:
    """Which of our activations the module computes; "" for another."""
    x = torch.cat([torch.linspace(-12, 12, 301), probing.random((64,), torch.float32, torch.device("cpu"))])
    ones = torch.ones_like(x)
    try:
        with torch.no_grad():
            y = original_forward(module)(x)
            return next((n for n, f in _PRODUCTS.items() if torch.allclose(f(x, ones), y, rtol=1e-5, atol=1e-6)), "")
    except Exception:  # whatever a module raises that is no activation
        return ""
