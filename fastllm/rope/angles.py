"""The angles of a rotary module, right at any position: reduced in double precision before their cosine is taken.

Transformers multiplies positions and frequencies in fp32, and is off by 0.1 rad at position 4,000,000. ``Table`` stands in the
forward of a module and gives the same cosines and sines from exact angles; ``Angles`` is what a patched model hands on in their
place, so that the kernel finds them itself and no table is in memory.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.patching.replacement import ABSENT, Replacement

LAYOUTS = ("half", "pairs", "once")


class Angles:
    """Stands for the cosines, and for the sines, of position · frequency: not numbers yet, and an error to whoever computes
    with it. positions (B, L) integers, inv_freq (R / 2,), factor: of cosines and sines (YaRN)."""

    __slots__ = ("factor", "inv_freq", "positions")

    def __init__(self, positions: Tensor, inv_freq: Tensor, factor: float) -> None:
        self.positions, self.inv_freq, self.factor = positions, inv_freq, factor

    def to(self, *args: Any, **kwargs: Any) -> Angles:
        """On another device, for hooks that move what a layer is given."""
        positions = self.positions.to(*args, **kwargs)
        return Angles(positions, self.inv_freq.to(positions.device), self.factor)

    def table(self, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos, sin (B, L, R): "half", every angle once for each half, or "pairs", twice in a row; or "once" (B, L, R / 2)."""
        turns = self.positions.unsqueeze(-1).double() * self.inv_freq.to(self.positions.device).double()
        angles = torch.remainder(turns, 2 * math.pi).float()
        if layout != "once":
            angles = torch.cat((angles, angles), -1) if layout == "half" else angles.repeat_interleave(2, -1)
        return (angles.cos() * self.factor).to(dtype), (angles.sin() * self.factor).to(dtype)


class Table:
    """Stands in the forward of a rotary module: what the class's own gives, from exact angles."""

    def __init__(self, module: nn.Module, layout: str) -> None:
        self.module, self.layout = module, layout

    @torch.no_grad()
    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        angles = of(self.module, x, position_ids, *args, **kwargs)
        if angles is None:
            return inspect.unwrap(type(self.module).forward)(self.module, x, position_ids, *args, **kwargs)
        return angles.table(self.layout, x.dtype)


def of(module: nn.Module, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> Angles | None:
    """The angles of a call of the module's forward; None where positions are of several kinds (M-RoPE)."""
    if position_ids.dim() != 2:
        return None
    kind = "" if layer_type is None else f"{layer_type}_"
    inv_freq, factor = getattr(module, f"{kind}inv_freq"), getattr(module, f"{kind}attention_scaling")
    return Angles(position_ids.to(x.device), inv_freq.to(x.device), float(factor))


def table_of(module: nn.Module) -> Table | None:
    """What may stand in the forward of a rotary module; None where its frequencies follow the text, or what it computes is
    something else."""
    types = getattr(module, "rope_type", "")
    of_kinds = types.values() if isinstance(types, dict) else [types]
    if any("dynamic" in of_kind or of_kind == "longrope" for of_kind in of_kinds):
        return None
    layout = layout_of(module)
    return Table(module, layout) if layout else None


def install(module: nn.Module) -> None:
    """Exact angles for a rotary module that `table_of` knows; to one that is patched, for when it is no more."""
    table, there = table_of(module), module.__dict__.get("forward")
    if table is None:
        return
    if isinstance(there, Replacement):  # it reads the module's frequencies at every call
        there.previous = table
    elif there is None or isinstance(there, Table):
        module.__dict__["forward"] = table


def installed(module: nn.Module) -> bool:
    there = module.__dict__.get("forward")
    return isinstance(there.previous if isinstance(there, Replacement) else there, Table)


def remove(module: nn.Module) -> None:
    there = module.__dict__.get("forward")
    if isinstance(there, Table):
        del module.__dict__["forward"]
    elif isinstance(there, Replacement) and isinstance(there.previous, Table):
        there.previous = ABSENT


def layout_of(module: nn.Module) -> str:
    """How the class's own forward lays out its table, "half", "pairs" or "once"; "" where it computes something else."""
    forward = inspect.unwrap(type(module).forward)
    names = list(inspect.signature(forward).parameters)[1:]
    if names not in (["x", "position_ids"], ["x", "position_ids", "layer_type"]):
        return ""
    types = getattr(module, "rope_type", "")
    kinds: list[str | None] = list(types) if isinstance(types, dict) else [None]
    found = {_layout_of(module, forward, () if kind is None else (kind,)) for kind in kinds}
    return found.pop() if len(found) == 1 else ""


def _layout_of(module: nn.Module, forward: Any, kind: tuple[str, ...]) -> str:
    positions = torch.tensor([[0, 1, 7, 100], [3, 50, 2, 31]])
    try:
        angles = of(module, torch.zeros(1), positions, *kind)
        if angles is None or angles.inv_freq.device.type == "meta":
            return ""
        device = getattr(module, f"{kind[0]}_inv_freq" if kind else "inv_freq").device
        theirs = forward(module, torch.zeros(1, device=device), positions.to(device), *kind)
        return next((n for n in LAYOUTS if _same(theirs, angles.table(n, torch.float32))), "")
    except Exception:  # whatever a family's forward raises that is of another kind
        return ""


def _same(theirs: Any, ours: tuple[Tensor, Tensor]) -> bool:
    if not isinstance(theirs, tuple) or len(theirs) != 2:
        return False
    return all(
        isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.cpu(), b, atol=1e-4)
        for a, b in zip(theirs, ours)
    )
