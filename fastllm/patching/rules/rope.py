"""Rotary embeddings: attention forwards that call a module-global ``apply_rotary_pos_emb``-like function.

The forward of such an instance becomes a copy of its class's forward whose globals hold ours under that name; class and
module globals stay as they are. A family's function is probed: half-split or interleaved, whole or partial.

The rotary module then hands on its angles instead of a table, and the kernel computes what it needs of them, right at any
position. To whoever else reads them they are the table, from exact angles.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import probing
from fastllm.patching.deferred import materialized
from fastllm.patching.replacement import occupied, replaced_by, slot_of
from fastllm.patching.report import Skipped
from fastllm.patching.rules import Found
from fastllm.rope import angles

OP = "rope"
KERNEL = "apply_rope"


def find(model: nn.Module) -> Iterator[Found | Skipped]:
    for path, module in model.named_modules():
        forward = type(module).forward
        plain = inspect.unwrap(forward)
        names = [n for n in _globals_called(plain) if n.startswith("apply_") and "rot" in n]
        if not names:
            continue
        slot = slot_of(module)
        layouts = {n: _layout(plain.__globals__[n]) for n in names}
        if occupied(module, slot):
            yield Skipped(path, OP, "its forward was replaced by other code")
        elif plain is not forward:
            yield Skipped(path, OP, "its forward is wrapped by a decorator, which a copy would lose")
        elif not any(layouts.values()):
            yield Skipped(path, OP, f"{names[0]} computes something else on random numbers than apply_rope can")
        else:
            layouts = {n: layout for n, layout in layouts.items() if layout}
            yield Found(path, module, slot, {"layouts": layouts}, (plain, tuple(layouts.items())))
    # The functions above have been replaced by now, those that are.
    if any("rope" in replaced_by(module) for module in model.modules()):
        yield from _rotary_modules(model)


def bind(module: nn.Module, settings: dict[str, Any]) -> Callable[..., Any]:
    if "table" in settings:
        return functools.partial(_hand_on, angles.Table(module, *settings["table"]))
    return types.MethodType(_rebound(type(module).forward, tuple(sorted(settings["layouts"].items()))), module)


def verify(found: Found, dtype: torch.dtype) -> str:
    if "table" in found.settings:
        return ""  # it was found by comparing it
    device = probing.device_of(found.module)
    q, k = (probing.random((2, heads, 7, 16), dtype, device, seed=heads) for heads in (4, 2))
    scope = type(found.module).forward.__globals__
    for name, layout in found.settings["layouts"].items():
        original, replaced = scope[name], _rotation(scope[name], layout)
        for rotated in (16, 8):
            cos, sin = _table(7, rotated, torch.float32, device)
            cos, sin = cos.to(dtype), sin.to(dtype)
            if _fails(original, q, k, cos, sin):
                continue  # a family that does not rotate a part of the head inside this function

            one, other = (functools.partial(_both, rotate, cos, sin) for rotate in (original, replaced))
            problem = probing.disagreement(one, other, [q, k], [], dtype)
            if problem:
                return f"{name}: {problem}"
    return ""


def _both(rotate: Callable[..., Any], cos: Tensor, sin: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """q and k rotated, as one tensor. The tables follow q into fp32: the reference is exact for the very same angles."""
    return torch.cat(rotate(q, k, cos.to(q.dtype), sin.to(q.dtype)), dim=1)


def _globals_called(function: Any) -> list[str]:
    """Names a function's code uses that are functions among its globals."""
    if not isinstance(function, types.FunctionType):
        return []
    return [n for n in function.__code__.co_names if isinstance(function.__globals__.get(n), types.FunctionType)]


@functools.cache
def _layout(function: Callable[..., Any]) -> str:
    """Which rotation ``function(q, k, cos, sin)`` is: "half" (pairs i and i + R/2), "interleaved" (pairs 2i and 2i + 1, the
    table in half-split order all the same), "pairs" (the same pairs, the table in their order), or "" for another."""
    parameters = list(inspect.signature(function).parameters)
    if parameters[:4] != ["q", "k", "cos", "sin"]:
        return ""
    q, k = (probing.random((2, heads, 7, 16), torch.float32, torch.device("cpu"), seed=heads) for heads in (4, 2))
    for layout in ("half", "interleaved", "pairs"):
        agree = []
        for rotated in (16, 8):
            cos, sin = _table(7, rotated, torch.float32, q.device)
            if _fails(function, q, k, cos, sin):
                continue
            with torch.no_grad():
                pairs = list(zip(function(q, k, cos, sin), _rotation(function, layout)(q, k, cos, sin)))
            agree.append(all(a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in pairs))
        if agree and all(agree):
            return layout
    return ""


def _fails(function: Callable[..., Any], *arguments: Any) -> bool:
    try:
        with torch.no_grad():
            return len(function(*arguments)) != 2
    except Exception:  # whatever a family's function raises for a table it does not take
        return True


def _table(length: int, rotated: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length) + 3.0, 10000.0 ** (-torch.arange(rotated // 2) * 2.0 / rotated))
    angles = torch.cat((angles, angles), dim=-1)[None].to(device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@functools.cache
def _rotation(original: Callable[..., Any], layout: str) -> Callable[..., Any]:
    """A function with the original's signature that runs the kernel, and the original for what the kernel does not take."""
    signature = inspect.signature(original)
    default = signature.parameters["unsqueeze_dim"].default if "unsqueeze_dim" in signature.parameters else 1
    place = list(signature.parameters).index("unsqueeze_dim") if "unsqueeze_dim" in signature.parameters else -1
    keeps = _keeps_dtype(original)

    def rotate(q: Tensor, k: Tensor, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        heads_at = kwargs.get("unsqueeze_dim", args[place - 4] if 0 <= place - 4 < len(args) else default)
        if isinstance(cos, angles.Angles):
            rotary = 2 * cos.inv_freq.shape[0]
            fits = q.dim() == 4 and k.dim() == 4 and q.shape[-1] == k.shape[-1] >= rotary and q.dtype == k.dtype
            if fits and heads_at in (1, 2) and cos.layout == ("pairs" if layout == "pairs" else "half"):
                wide = q.dtype if keeps else torch.promote_types(q.dtype, cos.of_table)
                return _by_angles(q, k, cos, layout != "half", heads_at, wide)
        cos, sin = materialized((cos, sin))
        fits = q.dim() == 4 and k.dim() == 4 and cos.dim() == 3 and sin.dim() == 3 and heads_at in (1, 2)
        if not fits or q.dtype != k.dtype or q.shape[-1] != k.shape[-1] or cos.shape[-1] > q.shape[-1]:
            return original(q, k, cos, sin, *args, **kwargs)
        if layout == "interleaved":  # families store each angle once per half; the op wants it once per pair
            half = cos.shape[-1] // 2
            cos, sin = (t[..., :half].repeat_interleave(2, dim=-1) for t in (cos, sin))
        interleaved = layout != "half"
        wide = q.dtype if keeps else torch.promote_types(q.dtype, cos.dtype)  # as the original's result
        if heads_at == 1:
            q, k = ops.apply_rope(q, k, cos, sin, interleaved=interleaved)
        else:
            q, k = ops.apply_rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, interleaved=interleaved)
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return q.to(wide), k.to(wide)

    return rotate


def _keeps_dtype(original: Callable[..., Any]) -> bool:
    """Whether the result has the dtype of q beside a table in fp32, and not that of their product."""
    q, table = torch.zeros(1, 2, 3, 16, dtype=torch.bfloat16), torch.zeros(1, 3, 16)
    try:
        with torch.no_grad():
            return bool(original(q, q, table, table)[0].dtype == q.dtype)
    except Exception:  # as in _fails
        return False


def _by_angles(
    q: Tensor, k: Tensor, of: angles.Angles, interleaved: bool, heads_at: int, wide: torch.dtype
) -> tuple[Tensor, Tensor]:
    if of.positions.device != q.device:
        of = of.on(q.device)
    if heads_at == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q, k = ops.rope(q, k, of.positions, of.inv_freq, attention_factor=of.factor, interleaved=interleaved)
    return (q.to(wide), k.to(wide)) if heads_at == 1 else (q.transpose(1, 2).to(wide), k.transpose(1, 2).to(wide))


# ---- where the angles come from ----------------------------------------------------------------------------------------


def _rotary_modules(model: nn.Module) -> Iterator[Found]:
    for path, module in model.named_modules():
        if not any(name.endswith("inv_freq") for name in module._buffers):
            continue
        slot = slot_of(module)
        there = module.__dict__.get(slot)
        if occupied(module, slot) and not isinstance(there, angles.Table):
            continue
        table = angles.table_of(module)
        if table is not None:
            yield Found(path, module, slot, {"table": (table.layout, table.own)}, path, auxiliary=True)


def _hand_on(table: angles.Table, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Angles in place of the table, where positions are whole numbers."""
    found = None if position_ids.is_floating_point() else table.angles(x, position_ids, *args, **kwargs)
    return table(x, position_ids, *args, **kwargs) if found is None else found


@functools.cache
def _rebound(forward: types.FunctionType, layouts: tuple[tuple[str, str], ...]) -> types.FunctionType:
    """A copy of a forward whose globals hold our rotations; shared by all instances that ask for it."""
    scope = dict(forward.__globals__)
    # By this name torch.compile would look the globals up in the module it names, and guard on the originals.
    scope.pop("__name__", None)
    for name, layout in layouts:
        scope[name] = _rotation(scope[name], layout)
    copy = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    copy.__kwdefaults__ = forward.__kwdefaults__
    return copy
