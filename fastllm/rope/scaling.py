"""The frequencies of RoPE under each scaling method, from their formulas, in fp64 and rounded once."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm.errors import ConfigError


class RopeScaling(NamedTuple):
    """inv_freq: (d/2,) fp32, radians per position of each rotated pair. attention_factor multiplies cos and sin, and so the
    logits by its square."""

    inv_freq: Tensor
    attention_factor: float


def scaling(
    method: str,
    *,
    head_dim: int,
    base: float,
    original_length: int,
    factor: float | None = None,
    length: int | None = None,
    **params: Any,
) -> RopeScaling:
    """Frequencies and attention factor of a scaling method, with θ_i = base^(-2i/d) for i < d/2.

    Args:
        method: "default": θ. "linear": θ / factor (position interpolation; arXiv 2306.15595): needs tuning. "abf": θ of
            another base, ``adjusted_base`` (arXiv 2309.16039). "ntk": θ of the base · factor^(d/(d-2)). "ntk_mixed":
            θ_i·exp(-a·(i+1)^c), c = ``exponent`` (0.625), stretched by factor at the slowest pair. "dynamic": "ntk" whose
            factor grows with `length` beyond original_length: s·n/L - (s - 1). "yarn": fast pairs kept, slow ones divided, a
            ramp between ``beta_fast`` (32) and ``beta_slow`` (1) turns, ``truncate`` (True); attention factor
            0.1·ln s + 1, or by ``mscale`` and ``mscale_all_dim``, or ``attention_factor`` (arXiv 2309.00071). "llama3": slow
            pairs divided, ``low_freq_factor`` (1) and ``high_freq_factor`` (4). "longrope": θ_i divided by ``long_factor[i]``
            beyond original_length, else ``short_factor[i]``; ``attention_factor`` √(1 + ln s / ln L) (arXiv 2402.13753).
        head_dim: rotated dimensions d of a head, even.
        base: the model's own θ base.
        original_length: tokens L the model was trained for.
        factor: stretch s, at least 1; ``length / original_length`` where only a length is given.
        length: tokens n now; "dynamic" and "longrope" depend on it.
        **params: of the method, as named above.

    Raises:
        ConfigError: an unknown method or parameter, or numbers that have no meaning.
    """
    if not isinstance(method, str) or method not in _METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise ConfigError(f"head_dim must be an even number of rotated dimensions, at least 2, got {head_dim!r}")
    if original_length is None:
        raise ConfigError("original_length must be given: the tokens the model was trained for")
    for name, value, least in (("base", base, 1.0), ("original_length", original_length, 0), ("length", length, 0)):
        if value is None and name == "length":
            continue
        if value is None or not _is_number(value):
            raise ConfigError(f"{name} must be a number, got {value!r}")
        if not (value > least and math.isfinite(value)):
            raise ConfigError(f"{name} must be greater than {least:g} and finite, got {value!r}")
    function = _METHODS[method]
    known = list(inspect.signature(function).parameters)[1:]
    if unknown := [name for name in params if name not in known]:
        takes = f"takes {', '.join(known)}" if known else "takes no parameters of its own"
        raise ConfigError(f"{method} has no parameter {unknown[0]!r}: it {takes}")
    for name, value in (("factor", factor), *params.items()):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} must be finite, got {value!r}")
    for name, value in (("factor", factor), *params.items()):
        if name == "truncate":
            if not isinstance(value, bool):
                raise ConfigError(f"truncate must be True or False, got {value!r}")
        elif name in ("short_factor", "long_factor"):
            if not isinstance(value, (list, tuple)) or not all(map(_is_number, value)):
                raise ConfigError(
                    f"{name} must be a list of numbers, one for each of {head_dim // 2} pairs, got {value!r}"
                )
        elif value is not None and not _is_number(value):
            raise ConfigError(f"{name} must be a number, got {value!r}")
    stretch = factor if factor is not None else max(1.0, length / original_length) if length else None
    if stretch is not None and not stretch >= 1:
        raise ConfigError(f"factor must be at least 1, got {factor!r}")
    how = _Rope(method, head_dim, float(base), original_length, stretch, length)
    try:
        with torch.device("cpu"):  # values, also where a model is being built without any
            inv_freq, attention_factor = function(how, **params)
        found = RopeScaling(inv_freq.float(), float(attention_factor))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{method} cannot be computed from {params}: {error}") from error
    if not (found.inv_freq.isfinite().all() and math.isfinite(found.attention_factor) and found.attention_factor > 0):
        raise ConfigError(f"{method} with {params} gives no finite frequencies and attention factor")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Rope(NamedTuple):
    method: str
    dim: int
    base: float
    original: int
    factor: float | None
    length: int | None

    def stretch(self) -> float:
        if self.factor is None:
            raise ConfigError(f"{self.method} needs a factor, or a length to find it from")
        return self.factor

    def frequencies(self, base: float | None = None) -> Tensor:
        exponents = torch.arange(0, self.dim, 2, dtype=torch.float64) / self.dim
        return (base or self.base) ** -exponents

    def widened(self, factor: float) -> Tensor:
        """Of the base that stretches the slowest pair by `factor` and leaves the fastest."""
        if self.dim == 2:  # the only pair is the fastest
            return self.frequencies()
        return self.frequencies(self.base * factor ** (self.dim / (self.dim - 2)))


def _default(rope: _Rope) -> tuple[Tensor, float]:
    return rope.frequencies(), 1.0


def _linear(rope: _Rope) -> tuple[Tensor, float]:
    return rope.frequencies() / rope.stretch(), 1.0


def _abf(rope: _Rope, adjusted_base: float | None = None) -> tuple[Tensor, float]:
    if adjusted_base is not None and not adjusted_base > 1:
        raise ConfigError(f"adjusted_base must be greater than 1, got {adjusted_base!r}")
    return rope.frequencies(adjusted_base), 1.0


def _ntk(rope: _Rope) -> tuple[Tensor, float]:
    return rope.widened(rope.stretch()), 1.0


def _ntk_mixed(rope: _Rope, exponent: float = 0.625) -> tuple[Tensor, float]:
    if not exponent > 0:
        raise ConfigError(f"exponent must be greater than 0, got {exponent!r}")
    pairs = rope.dim // 2
    rate = math.log(rope.stretch()) / pairs**exponent
    order = torch.arange(1, pairs + 1, dtype=torch.float64)
    return rope.frequencies() * torch.exp(-rate * order**exponent), 1.0


def _dynamic(rope: _Rope) -> tuple[Tensor, float]:
    factor = rope.stretch()
    length = max(rope.length or 0, rope.original)
    return rope.widened(factor * length / rope.original - (factor - 1)), 1.0


def _yarn(
    rope: _Rope,
    beta_fast: float = 32,
    beta_slow: float = 1,
    truncate: bool = True,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    attention_factor: float | None = None,
) -> tuple[Tensor, float]:
    if not beta_fast >= beta_slow > 0:
        raise ConfigError(f"beta_fast must be at least beta_slow, both above 0, got {beta_fast!r} and {beta_slow!r}")
    factor = rope.stretch()

    def pair_with(turns: float) -> float:
        """Which pair, counted from the fastest, turns so often over the original length."""
        return rope.dim * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    theta = rope.frequencies()

    def scale(by: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0

    if attention_factor is None:
        both = mscale and mscale_all_dim
        attention_factor = scale(mscale) / scale(mscale_all_dim) if both else scale(1.0)  # type: ignore[arg-type]
    return theta / factor * ramp + theta * (1 - ramp), attention_factor


def _llama3(rope: _Rope, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0) -> tuple[Tensor, float]:
    if not high_freq_factor > low_freq_factor > 0:
        raise ConfigError(
            f"high_freq_factor must be greater than low_freq_factor, above 0, got {high_freq_factor!r} and {low_freq_factor!r}"
        )
    theta = rope.frequencies()
    turns = rope.original * theta / (2 * math.pi)  # over the original length
    kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return theta / rope.stretch() * (1 - kept) + theta * kept, 1.0


def _longrope(
    rope: _Rope,
    short_factor: Sequence[float] = (),
    long_factor: Sequence[float] = (),
    attention_factor: float | None = None,
) -> tuple[Tensor, float]:
    for name, factors in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(factors) != rope.dim // 2:
            raise ConfigError(
                f"{name} must hold a factor above 0 for each of {rope.dim // 2} pairs, got {len(factors)} numbers"
            )
        if wrong := [f for f in factors if not (f > 0 and math.isfinite(f))]:
            raise ConfigError(f"{name} must hold finite factors above 0, got {wrong[0]!r} among them")
    chosen = long_factor if (rope.length or 0) > rope.original else short_factor
    if attention_factor is None:
        attention_factor = math.sqrt(1 + math.log(rope.stretch()) / math.log(rope.original))
    return rope.frequencies() / torch.tensor(chosen, dtype=torch.float64), attention_factor


_METHODS: dict[str, Callable[..., tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "ntk": _ntk,
    "ntk_mixed": _ntk_mixed,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
    "abf": _abf,
}
METHODS = tuple(_METHODS)


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) fp32 slopes of ALiBi (arXiv 2108.12409): 2^(-8h/H) for h = 1..H where H is a power of two. Else those of the next
    lower power of two, followed by every other one of twice that."""
    if not isinstance(heads, int) or heads < 1:
        raise ConfigError(f"heads must be a number of at least 1, got {heads!r}")
    power = 1 << (heads.bit_length() - 1)

    def of(count: int) -> Tensor:
        return 2.0 ** (-8.0 * torch.arange(1, count + 1, dtype=torch.float64) / count)

    return torch.cat((of(power), of(2 * power)[::2][: heads - power])).float()
