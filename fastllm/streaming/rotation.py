"""How a model rotates its keys, found by asking the model.

Families differ in which dimensions of a head they rotate, in how these form pairs, in how their tables of cosines are laid out and in
which of several tables a layer takes. A forward pass of four tokens whose tables are replaced tells all of it: keys are linear in the
table, k0·cos + J(k0)·sin with J a quarter turn, so a table of ones and zeros shows k0, another J(k0), and tables that hold one bit of
each pair's number show which pair a dimension belongs to.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.errors import ConfigError
from fastllm.patching.deferred import materialized

_TOKENS = 4
_CLOSE = 0.05  # of the norm: far above rounding in 16 bits, far below one pair taken for another


class _Shared:
    """Said of a model, and true of it in every copy of a cache."""

    def __deepcopy__(self, memo: Any) -> Any:
        return self


@dataclass(frozen=True, eq=False)
class Table(_Shared):
    """One table of cosines and sines of a model: what one rotary module gives for one kind of layer."""

    module: nn.Module
    kind: str | None
    columns: Tensor  # (C,) the pair that each column of the table belongs to

    @property
    def prefix(self) -> str:
        return "" if self.kind is None else f"{self.kind}_"

    def frequencies(self, length: int) -> tuple[Tensor, float]:
        """inv_freq (pairs,) in fp64 and the attention factor, of a text of `length` tokens where they depend on it."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope_type = getattr(self.module, "rope_type", "default")
        rope_type = rope_type.get(self.kind, "default") if isinstance(rope_type, dict) else rope_type
        if "dynamic" in rope_type or rope_type == "longrope":
            own: Any = self.module
            named = {} if self.kind is None else {"layer_type": self.kind}
            found, factor = ROPE_INIT_FUNCTIONS[rope_type](own.config, torch.device("cpu"), seq_len=length, **named)
            return found.double(), float(factor)
        inv_freq = self.module._buffers[f"{self.prefix}inv_freq"]
        assert inv_freq is not None
        factor = getattr(self.module, f"{self.prefix}attention_scaling", 1.0)
        return inv_freq.double(), float(factor)


@dataclass(frozen=True, eq=False)
class Keys(_Shared):
    """The keys of one layer. Dimension d of a head is ``k0[d]·cos + sign[d]·k0[partner[d]]·sin`` of the angle of its pair."""

    heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    table: int | None  # None: a layer that rotates nothing
    pair: Tensor  # (D,)
    partner: Tensor  # (D,)
    sign: Tensor  # (D,) fp32, 0 where a dimension is not rotated

    def same(self, other: Keys) -> bool:
        """Whether one set of cosines and sines serves both."""
        return (
            (self.table, self.device, self.dtype) == (other.table, other.device, other.dtype)
            and torch.equal(self.pair, other.pair)
            and torch.equal(self.sign, other.sign)
        )


@dataclass(frozen=True, eq=False)
class Rotations(_Shared):
    tables: list[Table]
    layers: list[Keys]
    first: list[int]  # for each layer, the first one that is rotated in the same way

    def number(self, module: nn.Module, kind: str | None) -> int:
        return next(n for n, table in enumerate(self.tables) if table.module is module and table.kind == kind)


# With the devices and dtypes of the parameters at the time.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Rotations]] = weakref.WeakKeyDictionary()


def of(owner: nn.Module, rotary: list[nn.Module], layers: int) -> Rotations:
    """How `owner`, the module that makes positions for its `layers` layers, rotates keys by these rotary modules.

    Raises:
        ConfigError: keys that are not a rotation by the tables of these modules, or a model that cannot be asked.
    """
    now = {(p.device, p.dtype) for p in owner.parameters()}
    known = _KNOWN.get(owner)
    if known is None or known[0] != now:
        known = _KNOWN[owner] = now, _found(owner, rotary, layers)
    return known[1]


def _found(owner: nn.Module, rotary: list[nn.Module], layers: int) -> Rotations:
    found: dict[tuple[nn.Module, str | None], Table] = {}

    def looked_at(module: nn.Module, kind: str | None, out: Any) -> None:
        found.setdefault((module, kind), _table(module, kind, out))

    _run(owner, rotary, layers, 1, looked_at)
    tables = list(found.values())
    bits = max((int(t.columns.max()).bit_length() for t in tables), default=0)
    number = {key: n for n, key in enumerate(found)}
    rows = 3 + 2 * bits + len(tables)

    def replaced(module: nn.Module, kind: str | None, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        table = tables[number[module, kind]]
        cos, sin = torch.zeros(2, rows, 1, len(table.columns))
        cos[0], sin[1] = 1.0, 1.0
        for bit in range(bits):
            cos[3 + bit] = (table.columns >> bit & 1).float()
            sin[3 + bits + bit] = (table.columns >> bit & 1).float()
        cos[3 + 2 * bits + number[module, kind]] = 1.0
        shape = (rows, out[0].shape[1], len(table.columns))
        return cos.expand(shape).to(out[0]), sin.expand(shape).to(out[1])

    seen = _run(owner, rotary, layers, rows, replaced)
    missing = [n for n in range(layers) if n not in seen]
    if missing:
        raise ConfigError(f"{type(owner).__name__}: layer {missing[0]} keeps no keys and values in a cache")
    name = type(owner).__name__
    found_keys = [_keys(f"{name}, layer {n}", seen[n], bits, tables) for n in range(layers)]
    first = [next(n for n, keys in enumerate(found_keys) if keys.same(of_layer)) for of_layer in found_keys]
    return Rotations(tables, found_keys, first)


@torch.no_grad()
def _run(
    owner: nn.Module, rotary: list[nn.Module], layers: int, rows: int, answer: Any
) -> dict[int, tuple[Tensor, Tensor]]:
    """Runs a few tokens through `owner`, `answer(module, kind, output)` in place of its tables; returns keys and values by layer."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    problems: list[ConfigError] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        kind = args[2] if len(args) > 2 else kwargs.get("layer_type")
        out = materialized(out)  # a patched model's is not computed yet
        try:
            given = answer(module, kind, out)
        except ConfigError as error:
            problems.append(error)
            raise
        return given if isinstance(given, tuple) else None

    device = next(owner.parameters()).device
    training = {m: m.training for m in owner.modules()}
    config: Any = getattr(owner, "config", None)
    ids = 1 + torch.arange(_TOKENS, device=device) * max(1, (config.vocab_size - 2) // _TOKENS)
    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in rotary]
    handles += [m.register_forward_pre_hook(_at_one, with_kwargs=True) for m in rotary]
    try:
        for module in training:  # the flag alone: a train() of one's own may do more
            module.training = False
        owner(input_ids=ids.expand(rows, -1), past_key_values=_recorder(seen, layers), use_cache=True)
    except Exception as error:  # of a model of any family
        if problems:
            raise problems[0] from None
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{type(owner).__name__} does not run with this cache: {said}") from error
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was
    return seen


def _at_one(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return with_positions(args, kwargs, torch.ones_like)


def with_positions(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a rotary module's forward with its position_ids changed."""
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": change(kwargs["position_ids"])}
    if len(args) > 1:
        return (args[0], change(args[1]), *args[2:]), kwargs
    return args, kwargs


def _recorder(seen: dict[int, tuple[Tensor, Tensor]], layers: int) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Recorder(DynamicCache):
        """Keeps each layer's keys aside. Attention gets values of 0, so that the layers above do not depend on the keys."""

        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            seen[layer_idx] = key_states.clone(), value_states
            return key_states, torch.zeros_like(value_states)

    cache = Recorder()
    cache.layers = [DynamicLayer() for _ in range(layers)]
    return cache


def _table(module: nn.Module, kind: str | None, out: Any) -> Table:
    name = type(module).__name__
    pair_of = isinstance(out, tuple) and len(out) == 2 and all(isinstance(t, Tensor) and t.dim() == 3 for t in out)
    inv_freq = module._buffers.get("inv_freq" if kind is None else f"{kind}_inv_freq")
    if not pair_of or inv_freq is None or out[0].is_complex():
        raise ConfigError(f"{name} gives no table of cosines and sines (B, L, R): its RoPE is not of the usual kind")
    factor = float(getattr(module, "attention_scaling" if kind is None else f"{kind}_attention_scaling", 1.0))
    pairs = torch.arange(inv_freq.numel())
    angles = inv_freq.double().cpu()
    for columns in (torch.cat((pairs, pairs)), pairs.repeat_interleave(2), pairs):
        expected = torch.stack((angles.cos(), angles.sin()))[:, columns] * factor
        found = torch.stack((out[0][0, 0], out[1][0, 0])).double().cpu()
        if found.shape == expected.shape and torch.allclose(found, expected, atol=0.02 * factor, rtol=0.02):
            return Table(module, kind, columns)
    raise ConfigError(f"the table of {name} is not that of its frequencies: its RoPE is not of the usual kind")


def _keys(name: str, seen: tuple[Tensor, Tensor], bits: int, tables: list[Table]) -> Keys:
    keys, values = seen
    heads, head_dim = keys.shape[1], keys.shape[3]
    device, dtype = keys.device, keys.dtype
    rows = keys.float().cpu().transpose(2, 3).transpose(1, 2).flatten(2)  # (rows, D, heads and tokens)
    whole, quarter, still = rows[0], rows[1], rows[2]
    size = whole.norm(dim=-1)
    if not bool((size > 0).all() and torch.isfinite(rows).all()):
        raise ConfigError(f"{name}: its keys are 0 or not finite, so that how they are rotated cannot be seen")
    rotated = (still.norm(dim=-1) < 0.5 * size).nonzero().flatten()
    kept = torch.ones(head_dim, dtype=torch.bool)
    kept[rotated] = False
    if not bool(((rows - whole)[:, kept].norm(dim=-1) <= _CLOSE * size[kept]).all()):
        raise ConfigError(f"{name}: its keys are not rotated as RoPE rotates them")
    partner, sign = torch.arange(head_dim), torch.zeros(head_dim)
    pair, table = torch.zeros(head_dim, dtype=torch.long), None
    if len(rotated):
        half = len(rotated) // 2
        layouts = [(rotated[:half], rotated[half:]), (rotated[::2], rotated[1::2])]
        for first, second in layouts:
            if len(first) != len(second):
                continue
            partner[first], partner[second] = second, first
            sign[first], sign[second] = -1.0, 1.0
            wrong = (quarter - sign.unsqueeze(-1) * whole[partner])[rotated].norm(dim=-1)
            if bool((wrong <= _CLOSE * size[partner][rotated]).all()):
                break
        else:
            raise ConfigError(f"{name}: its keys are not rotated in pairs as RoPE rotates them")
        powers = 2 ** torch.arange(bits).unsqueeze(-1)
        by_cos = ((rows[3 : 3 + bits].norm(dim=-1) > 0.5 * size) * powers).sum(0)
        by_sin = ((rows[3 + bits : 3 + 2 * bits].norm(dim=-1) > 0.5 * size[partner]) * powers).sum(0)
        pair[rotated] = by_cos[rotated]
        takes = (rows[3 + 2 * bits :, rotated].norm(dim=-1) > 0.5 * size[rotated]).all(-1).nonzero().flatten()
        consistent = torch.equal(by_cos[rotated], by_sin[rotated]) and torch.equal(pair[partner], pair)
        if not consistent or len(takes) != 1:
            raise ConfigError(f"{name}: its keys are not rotated by one of the model's tables")
        table = int(takes[0])
    return Keys(
        heads, head_dim, values.shape[-1], dtype, device, table, pair.to(device), partner.to(device), sign.to(device)
    )
