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

from fastllm.patching.deferred import Deferred
from fastllm.patching.replacement import ABSENT, Replacement, original_forward, slot_of

LAYOUTS = ("half", "pairs", "once")


class Angles(Deferred):
    """The cosines of position · frequency (which = 0), or the sines (1), not computed yet: to who uses them otherwise than by
    `ops.rope` they are the table. positions (B, L), inv_freq (R / 2,), factor: of cosines and sines (YaRN)."""

    def __init__(
        self, positions: Tensor, inv_freq: Tensor, factor: float, which: int, layout: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.positions, self.inv_freq, self.factor = positions, inv_freq, factor
        self.which, self.layout, self.of_table = which, layout, dtype

    def _compute(self) -> Tensor:
        turns = self.positions.unsqueeze(-1).double() * self.inv_freq.to(self.positions.device).double()
        angles = torch.remainder(turns, 2 * math.pi).float()
        if self.layout != "once":
            angles = torch.cat((angles, angles), -1) if self.layout == "half" else angles.repeat_interleave(2, -1)
        return ((angles.sin() if self.which else angles.cos()) * self.factor).to(self.of_table)

    def on(self, device: torch.device) -> Angles:
        positions, inv_freq = self.positions.to(device), self.inv_freq.to(device)
        return Angles(positions, inv_freq, self.factor, self.which, self.layout, self.of_table)


class Table:
    """Stands in the forward of a rotary module: what the class's own gives, from exact angles.

    layout: "half", every angle once for each half of the rotated channels; "pairs", twice in a row; "once", (B, L, R / 2). own:
    the dtype of the table, None for that of the model's activations.
    """

    def __init__(self, module: nn.Module, layout: str, own: torch.dtype | None) -> None:
        self.module, self.layout, self.own = module, layout, own

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        angles = self.angles(x, position_ids, *args, **kwargs)
        if angles is None:
            with torch.no_grad():
                return inspect.unwrap(type(self.module).forward)(self.module, x, position_ids, *args, **kwargs)
        return angles[0].tensor(), angles[1].tensor()

    def angles(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Angles, Angles] | None:
        """What a call of the module's forward would compute; None where positions are of several kinds (M-RoPE)."""
        if position_ids.dim() != 2:
            return None
        kind = "" if layer_type is None else f"{layer_type}_"
        inv_freq = getattr(self.module, f"{kind}inv_freq").to(x.device)
        factor = float(getattr(self.module, f"{kind}attention_scaling"))
        positions, dtype = position_ids.to(x.device), self.own or x.dtype
        return (
            Angles(positions, inv_freq, factor, 0, self.layout, dtype),
            Angles(positions, inv_freq, factor, 1, self.layout, dtype),
        )


def table_of(module: nn.Module) -> Table | None:
    """What may stand in the forward of a rotary module; None where its frequencies follow the text, or what it computes is
    something else."""
    types = getattr(module, "rope_type", "")
    of_kinds = types.values() if isinstance(types, dict) else [types]
    if any("dynamic" in of_kind or of_kind == "longrope" for of_kind in of_kinds):
        return None
    return found_table(module)


def found_table(module: nn.Module) -> Table | None:
    """The table that does what the class's own forward does, on probe positions; None if none does."""
    forward = inspect.unwrap(type(module).forward)
    names = list(inspect.signature(forward).parameters)[1:]
    if names not in (["x", "position_ids"], ["x", "position_ids", "layer_type"]):
        return None
    types = getattr(module, "rope_type", "")
    kinds: list[str | None] = list(types) if isinstance(types, dict) else [None]
    try:
        probed = module
        if any(b is not None and b.device.type == "meta" for b in module._buffers.values()):
            with torch.device("cpu"):
                probed = type(module)(module.config)
        for layout in LAYOUTS:
            for own in (None, torch.float32):
                table = Table(probed, layout, own)
                if all(_same(table, forward, () if kind is None else (kind,)) for kind in kinds):
                    return Table(module, layout, own)
    except Exception:  # whatever a family's forward or constructor raises that is of another kind
        return None
    return None


def _same(table: Table, forward: Any, kind: tuple[str, ...]) -> bool:
    inv_freq = getattr(table.module, f"{kind[0]}_inv_freq" if kind else "inv_freq")
    positions = torch.tensor([[0, 1, 7, 100], [3, 50, 2, 31]], device=inv_freq.device)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, dtype=dtype, device=inv_freq.device)
        with torch.no_grad():
            theirs, ours = forward(table.module, x, positions, *kind), table(x, positions, *kind)
        if not isinstance(theirs, tuple) or len(theirs) != 2:
            return False
        atol = 1e-4 if theirs[0].dtype == torch.float32 else 1e-2
        for a, b in zip(theirs, ours):
            if a.shape != b.shape or a.dtype != b.dtype or not torch.allclose(a, b, atol=atol):
                return False
    return True


def install(module: nn.Module) -> None:
    """Exact angles for a rotary module that `table_of` knows; to one that is patched, for when it is no more."""
    table, slot = table_of(module), slot_of(module)
    there = module.__dict__.get(slot)
    if table is None:
        return
    if isinstance(there, Replacement):  # it reads the module's frequencies at every call
        there.previous = table
    elif there is None or isinstance(there, Table) or getattr(there, "__func__", None) is type(module).forward:
        module.__dict__[slot] = table


def installed(module: nn.Module) -> bool:
    return any(isinstance(v.previous if isinstance(v, Replacement) else v, Table) for v in module.__dict__.values())


def remove(module: nn.Module) -> None:
    """Wherever it stands by now: hooks of accelerate may have come or gone since."""
    for slot, there in list(module.__dict__.items()):
        if isinstance(there, Replacement) and isinstance(there.previous, Table):
            there.previous = ABSENT
        elif isinstance(there, Table):
            if slot == "_old_forward":
                module.__dict__[slot] = original_forward(module)
            else:
                del module.__dict__[slot]
