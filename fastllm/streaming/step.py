"""One forward pass over a StreamingCache: where its tokens go, what each of its queries sees, how sinks are turned for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm.errors import ConfigError
from fastllm.streaming.ring import Reach, RingLayer, Stream
from fastllm.streaming.rotation import Keys, Table


class Frequencies:
    """Frequencies of a model's tables, and cosines and sines of any position, from angles in fp64."""

    def __init__(self, tables: list[Table], length: int) -> None:
        self.tables, self.length = tables, length
        self.refresh()

    def refresh(self) -> None:
        self.frequencies = [table.frequencies(self.length) for table in self.tables]
        self._by_device: dict[tuple[int, torch.device, bool], Tensor] = {}
        self._single: dict[tuple[int, torch.device], Tensor] = {}

    def factor(self, table: int) -> float:
        return self.frequencies[table][1]

    def single(self, table: int, device: torch.device) -> Tensor:
        """(pairs,) fp32 of a table, as they were when this was made: the model's own are rounded by a later ``model.to``."""
        if (table, device) not in self._single:
            self._single[table, device] = self.frequencies[table][0].to(device, torch.float32)
        return self._single[table, device]

    def columns(self, table: int, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C) cosines and sines of positions (...), as the table has them: with its factor, in the dtype of `like`."""
        key = (table, like.device, True)
        if key not in self._by_device:
            self._by_device[key] = self.frequencies[table][0].cpu()[self.tables[table].columns].to(_wide(like.device))
        angles = _outer(positions, self._by_device[key])
        factor = self.factor(table)
        cos, sin = angles.cos(), angles.sin()
        if factor != 1.0:
            cos, sin = cos * factor, sin * factor
        return cos.to(like.device, like.dtype), sin.to(like.device, like.dtype)

    def dimensions(self, keys: Keys, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(..., D) cosines and sines of positions (...) for the dimensions of a key, in fp32: 1 and 0 where none is rotated."""
        if keys.table is None:
            shape = (*positions.shape, keys.head_dim)
            return torch.ones(shape, device=keys.device), torch.zeros(shape, device=keys.device)
        key = (id(keys), keys.device, False)
        if key not in self._by_device:
            still = keys.sign.cpu() == 0
            found = self.frequencies[keys.table][0].cpu()[keys.pair.cpu()].masked_fill(still, 0.0)
            self._by_device[key] = found.to(_wide(keys.device))
        angles = _outer(positions, self._by_device[key])
        return angles.cos().to(keys.device, torch.float32), angles.sin().to(keys.device, torch.float32)


def _wide(device: torch.device) -> torch.device:
    """Where there is fp64."""
    return torch.device("cpu") if device.type == "mps" else device


def _outer(positions: Tensor, frequencies: Tensor) -> Tensor:
    return positions.to(frequencies.device).double().unsqueeze(-1) * frequencies


class Step:
    """A forward pass over a few new tokens of each row.

    Args:
        stream: how far each row has come.
        new: real new tokens of each row; length: new columns, padding counted.
        real: (B, length) bool, which of them are no padding; None: all.
        reaches: of the layers.
        tree: None, or of a tree of candidates in one row: (depths (length,), who sees whom (length, length) bool).
    """

    def __init__(
        self,
        stream: Stream,
        angles: Frequencies,
        length: int,
        real: Tensor | None,
        new: list[int],
        reaches: set[Reach],
        device: torch.device,
        tree: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.angles, self.length, self.device, self.tree = angles, length, device, tree
        self.counts, self.origin = stream.counts or [0] * len(new), stream.origin
        self.columns = stream.columns
        self.new, self.real = new, real
        self.uniform = real is None and len(set(self.counts)) == 1
        self.read = False  # whether every layer has read what it needs, so that only writing is left
        self.given = False  # whether the model has rotated by our tables
        self.rounded: dict[int, torch.dtype] = {}  # by table, in which dtype it did; not there: as they are computed
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        steps = torch.arange(length, device=device) if tree is None else tree[0].to(device)
        if self.uniform:
            self.start = self.counts[0]
            self.positions = (steps + self.start).unsqueeze(0)
        else:
            before = torch.tensor(self.counts, device=device).unsqueeze(1)
            self.before = before
            self.positions = before + (steps if real is None else real.long().cumsum(1) - 1)
        self.places: dict[Reach, Place] = {reach: self._place(reach) for reach in reaches}

    def ready(self, layers: list[RingLayer]) -> None:
        """Lays out what each layer needs, so that a compiled decoding step looks up and computes nothing of it."""
        for layer in layers:
            place = layer.place = self.places[layer.reach]
            layer.turn, layer.pending, layer.fed = None, None, False
            if isinstance(place, Run | Rows) and place.turns and layer.rotation.table is not None:
                cos, sin = self.turned(layer.rotation, layer.reach)
                layer.turn = (cos[0, 0], sin[0, 0]) if isinstance(place, Run) else (cos, sin)

    def _place(self, reach: Reach) -> Place:
        if self.uniform and self.tree is None and (self.length == 1 or self.start + self.length <= reach.size):
            return Run(self, reach)
        if self.length == 1 and self.tree is None and all(n == 1 for n in self.new):
            return Rows(self, reach)
        return Piece(self, reach)

    @property
    def tokens(self) -> Tensor:
        """(B or 1, length) places in the text, to rotate for."""
        return self.positions + self.origin

    def evicted(self, reach: Reach) -> Tensor:
        """(B or 1, length): how far the sinks are turned forward for each query."""
        return (self.positions + 1 - reach.size).clamp(min=0)

    def arriving(self, keys: Keys) -> tuple[Tensor, Tensor]:
        """(B or 1, length, D) cosines and sines by which the new keys were rotated, as they were rounded."""
        key = ("arriving", id(keys))
        if key not in self._tables:
            cos, sin = self.angles.dimensions(keys, self.tokens)
            if keys.table is not None and (factor := self.angles.factor(keys.table)) != 1.0:
                still = keys.sign == 0
                cos, sin = torch.where(still, cos, cos * factor), sin * factor
            if keys.table in self.rounded:
                dtype = self.rounded[keys.table]
                cos, sin = cos.to(dtype).float(), sin.to(dtype).float()
            self._tables[key] = cos, sin
        return self._tables[key]

    def turned(self, keys: Keys, reach: Reach) -> tuple[Tensor, Tensor]:
        """(B or 1, length, S, D) cosines and sines of the sinks for each query."""
        key = ("turned", id(keys), reach)
        if key not in self._tables:
            places = self.evicted(reach).unsqueeze(-1) + torch.arange(reach.sinks, device=self.device) + self.origin
            self._tables[key] = self.angles.dimensions(keys, places)
        return self._tables[key]


class Place:
    """Where the new tokens of a forward pass go in rings of one reach, and what its queries see of them."""

    seen: int  # keys that attention gets
    mask: Tensor | None  # (B or 1, 1, length, seen) bool; None: what the model makes of `seen` is right

    def __init__(self, step: Step, reach: Reach) -> None:
        self.step, self.reach, self.mask = step, reach, None

    def store(self, layer: RingLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def whole_mask(self) -> Tensor:
        """The mask where all layers need to be given one."""
        if self.mask is None:
            i = torch.arange(self.step.length, device=self.step.device).unsqueeze(1) + (self.seen - self.step.length)
            return (torch.arange(self.seen, device=self.step.device) <= i)[None, None]
        return self.mask


class Run(Place):
    """All rows stand at one place, and the ring has room, or there is one new token: slots follow each other, nothing is hidden."""

    def __init__(self, step: Step, reach: Reach) -> None:
        super().__init__(step, reach)
        self.seen = min(step.start + step.length, reach.size)
        # One token's slot as a tensor, so that a compiled step is the same for every slot
        one = step.length == 1
        slot = reach.slot(step.start)
        self.slots = torch.full((1,), slot, device=step.device) if one else slice(slot, slot + step.length)
        self.sinks = max(0, min(step.length, reach.sinks - step.start))
        self.turns = reach.sinks > 0 and step.start + step.length > reach.size

    def store(self, layer: RingLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        step, start = self.step, self.step.start
        layer.put((slice(None), slice(None), self.slots), keys, values)
        if self.sinks:
            assert layer.masters is not None
            cos, sin = (t[:, : self.sinks] for t in step.arriving(layer.rotation))
            factor = _factor(step, layer)
            layer.masters[:, :, :, start : start + self.sinks] = layer.unrotated(
                keys[:, :, : self.sinks], cos.unsqueeze(1), sin.unsqueeze(1), factor
            )
        held, found = layer.held(self.seen)
        if self.turns and layer.turn is not None:
            held[:, :, : self.reach.sinks] = layer.rotated(*layer.turn)
        return held, found


class Rows(Place):
    """One new token in each row, rows at different places."""

    def __init__(self, step: Step, reach: Reach) -> None:
        super().__init__(step, reach)
        self.seen = min(max(step.counts) + 1, reach.size)
        before = step.before.flatten()
        self.slots = torch.where(
            before < reach.sinks, before, reach.sinks + (before - reach.sinks).remainder(reach.window)
        )
        self.row = torch.arange(len(step.counts), device=step.device)
        if min(step.counts) + 1 < self.seen:
            self.mask = (torch.arange(self.seen, device=step.device) <= before.unsqueeze(1))[:, None, None]
        self.arrivals = [b for b, n in enumerate(step.counts) if n < reach.sinks]
        self.turns = reach.sinks > 0 and max(step.counts) + 1 > reach.size

    def store(self, layer: RingLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        layer.put((self.row, slice(None), self.slots), keys[:, :, 0], values[:, :, 0])
        step = self.step
        if self.arrivals:
            assert layer.masters is not None
            cos, sin = (t[self.arrivals, 0].unsqueeze(1) for t in step.arriving(layer.rotation))
            came = layer.unrotated(keys[self.arrivals, :, 0], cos, sin, _factor(step, layer))
            for n, b in enumerate(self.arrivals):
                layer.masters[:, b, :, step.counts[b]] = came[:, n]
        held, found = layer.held(self.seen)
        if self.turns and layer.turn is not None:
            turned = layer.rotated(*layer.turn).to(held.dtype)
            moved = (step.evicted(self.reach) > 0)[:, :, None, None]  # the others keep their keys to the last bit
            held[:, :, : self.reach.sinks] = torch.where(moved, turned, held[:, :, : self.reach.sinks])
        return held, found


class Piece(Place):
    """Anything else: attention gets what the ring held, the new keys, and, once tokens have been evicted, the sinks once for
    every query, each time turned for that query alone."""

    def __init__(self, step: Step, reach: Reach) -> None:
        super().__init__(step, reach)
        device, length, sinks = step.device, step.length, reach.sinks
        before = torch.tensor([step.counts[0]] if step.uniform else step.counts, device=device).unsqueeze(1)
        place = step.positions  # (B or 1, length)
        last = max(step.counts) + (length if step.tree is None else int(step.tree[0].max()) + 1)
        self.copies = sinks > 0 and last > reach.size
        if self.copies and step.tree is not None and step.start < sinks:
            raise ConfigError(f"a tree as deep as {last - step.start} does not fit into a window of {reach.window}")
        self.held = min(max(step.counts), reach.size)
        # The token in each slot, (B or 1, held); -1: none
        slot = torch.arange(self.held, device=device)
        ago = (before - 1 - slot).remainder(reach.window)  # of the token in a slot of the window, from the last one
        token = torch.where(slot < sinks, slot, before - 1 - ago)
        token = torch.where((token >= sinks) | (slot < sinks), token, -1)
        token = torch.where(token < before, token, -1)
        query, new = place.unsqueeze(2), place.unsqueeze(1)
        old = (token.unsqueeze(1) >= 0) & (query - token.unsqueeze(1) < reach.window)
        first = token.unsqueeze(1) < sinks
        old = torch.where(first, (token.unsqueeze(1) >= 0) & (not self.copies), old)
        if step.tree is None:
            i = torch.arange(length, device=device)
            among = (i <= i.unsqueeze(1)).unsqueeze(0)
        else:
            among = step.tree[1].to(device).unsqueeze(0)
        inside = among & ((query - new < reach.window) | (new < sinks))
        if self.copies:
            inside = inside & (new >= sinks)
        if step.real is not None:
            inside = inside & step.real.unsqueeze(1)
        parts = [old.expand(inside.shape[0], -1, -1) if old.shape[0] == 1 else old, inside]
        if self.copies:
            own = torch.eye(length, dtype=torch.bool, device=device)[None, :, :, None]
            s = torch.arange(sinks, device=device)
            copy = own & (s <= query.unsqueeze(-1))  # (B or 1, queries, copies for, sinks)
            parts.append(copy.flatten(2))
        if step.real is not None:  # padding sees itself, so that no softmax is over nothing; nobody reads it
            alone = torch.eye(length, dtype=torch.bool, device=device) & ~step.real.unsqueeze(2)
            parts[1] = parts[1] | alone
        batch = max(p.shape[0] for p in parts)
        self.mask = torch.cat([p.expand(batch, -1, -1) for p in parts], -1).unsqueeze(1)
        self.seen = self.mask.shape[-1]
        self.masters: list[tuple[int, int, int]] = []  # row, column and number of the sinks among the new tokens
        if step.tree is None:
            self.keep(None)

    def keep(self, path: list[int] | None) -> None:
        """Finds what of the new tokens goes where: all of them in their order, or of a tree, one path."""
        step, sinks, window = self.step, self.reach.sinks, self.reach.window
        rows, columns, slots = [], [], []
        masters = []
        batch = 1 if step.uniform else len(step.counts)
        kept = None if step.real is None else step.real.tolist()
        for b in range(batch):
            new = path if path is not None else [c for c in range(step.length) if kept is None or kept[b][c]]
            start = step.counts[b]
            for n, column in enumerate(new):
                token = start + n
                if token < sinks:
                    masters.append((b, column, token))
                elif token < start + len(new) - window:
                    continue  # overwritten in this very step
                rows.append(b)
                columns.append(column)
                slots.append(self.reach.slot(token))
        self.rows, self.columns, self.slots = (torch.tensor(x, device=step.device) for x in (rows, columns, slots))
        self.masters = masters

    def store(self, layer: RingLayer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is written yet: what new tokens evict is part of what this step attends to, and, if it is interrupted, of what the
        next one does."""
        step = self.step
        layer.pending = (keys, values)
        parts = [[old, new] for old, new in zip(layer.held(self.held), layer.rounded(keys, values))]
        if self.copies:
            self.remember(layer, keys)
            cos, sin = (t.flatten(1, 2).unsqueeze(1) for t in step.turned(layer.rotation, self.reach))
            assert layer.masters is not None
            masters = layer.masters.unsqueeze(3).expand(-1, -1, -1, step.length, -1, -1).flatten(3, 4)
            turned = (masters[0] * cos).addcmul_(masters[1], sin).to(keys.dtype)
            parts[0].append(turned)
            parts[1].append(self._sink_values(layer, parts[1][1]))
        return torch.cat(parts[0], 2), torch.cat(parts[1], 2)

    def commit(self, layer: RingLayer) -> None:
        """Writes what the step brought; to do so twice does no harm."""
        assert layer.pending is not None
        keys, values = layer.pending
        self.remember(layer, keys)
        rows, columns, slots = (t.to(keys.device) for t in (self.rows, self.columns, self.slots))
        if self.step.uniform:
            layer.put((slice(None), slice(None), slots), keys[:, :, columns], values[:, :, columns])
        else:
            layer.put((rows, slice(None), slots), keys[rows, :, columns], values[rows, :, columns])

    def remember(self, layer: RingLayer, keys: Tensor) -> None:
        """Masters of the sinks among the new tokens."""
        if not self.masters:
            return
        assert layer.masters is not None
        cos, sin = self.step.arriving(layer.rotation)
        for b, column, token in self.masters:
            rows = slice(None) if self.step.uniform else slice(b, b + 1)
            at = slice(None) if cos.shape[0] == 1 else rows
            layer.masters[:, rows, :, token] = layer.unrotated(
                keys[rows, :, column], cos[at, column].unsqueeze(1), sin[at, column].unsqueeze(1),
                _factor(self.step, layer),
            )  # fmt: skip

    def _sink_values(self, layer: RingLayer, values: Tensor) -> Tensor:
        there = layer.held(self.reach.sinks)[1].clone()
        for b, column, token in self.masters:
            rows = slice(None) if self.step.uniform else slice(b, b + 1)
            there[rows, :, token] = values[rows, :, column]
        return there.unsqueeze(2).expand(-1, -1, self.step.length, -1, -1).flatten(2, 3)


def _factor(step: Step, layer: RingLayer) -> float:
    return 1.0 if layer.rotation.table is None else step.angles.factor(layer.rotation.table)
