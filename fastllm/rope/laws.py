"""Scaling laws of RoPE's extrapolation (Liu et al., arXiv 2310.05209): which dimensions have seen a whole turn in training, and
how far a model tuned with another base can read."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from fastllm.errors import ConfigError
from fastllm.rope._config import (
    base_of,
    config_of,
    parameters_of,
    refusal,
    rescalable,
    rotated,
    set_parameters,
    trained_length,
)

PRETRAINED_BASE = 10000.0


def critical_dimension(head_dim: int, train_length: int, base: float = PRETRAINED_BASE) -> int:
    """Dimensions of a head whose pairs make a whole turn within the trained length: 2·⌈(d/2)·log_b(T/2π)⌉, at most d.

    Those beyond it have met only a part of their angles and are out of distribution further on.
    """
    _check(head_dim=(head_dim, 0), train_length=(train_length, 0), base=(base, 1))
    if train_length <= 2 * math.pi:
        return 0
    return min(head_dim, 2 * math.ceil(head_dim / 2 * math.log(train_length / (2 * math.pi), base)))


def critical_base(train_length: int, tuned_length: int) -> float:
    """The base that tuning at `tuned_length` tokens must exceed for the reach of ``max_context``, for a model pretrained at
    `train_length` tokens with base 10000: 10000^log_{T_train/2π}(T_tune/2π)."""
    _check(train_length=(train_length, 2 * math.pi), tuned_length=(tuned_length, 2 * math.pi))
    turns = math.log(tuned_length / (2 * math.pi)) / math.log(train_length / (2 * math.pi))
    return PRETRAINED_BASE**turns


def max_context(head_dim: int, base: float, train_length: int, *, pretrained_base: float = PRETRAINED_BASE) -> float:
    """Tokens up to which a model tuned with `base` (above ``critical_base``) is predicted to read: 2π·base^(d_extra/d), where
    d_extra is the critical dimension of its pretraining at `train_length` tokens with `pretrained_base`."""
    _check(base=(base, 1))
    extra = critical_dimension(head_dim, train_length, pretrained_base)
    return 2 * math.pi * base ** (extra / head_dim)


def base_for(head_dim: int, base: float, train_length: int, target_length: int) -> float:
    """The base to tune with so that the laws predict `target_length` tokens for a model pretrained at `train_length` with `base`:
    the inverse of ``max_context``, at least the critical base, never below `base`."""
    extra = critical_dimension(head_dim, train_length, base)
    if extra == 0 or target_length <= train_length:
        return base
    critical = base ** (math.log(target_length / (2 * math.pi)) / math.log(train_length / (2 * math.pi)))
    return max(base, critical, (target_length / (2 * math.pi)) ** (head_dim / extra))


def small_bases(tuned_length: int) -> tuple[float, float, float]:
    """The bases 2T/π, T/π and T/2π, below which every pair of dimensions turns through a quarter, a half and a whole cosine
    within the tuned length, and extrapolation improves by steps."""
    _check(tuned_length=(tuned_length, 0))
    return 2 * tuned_length / math.pi, tuned_length / math.pi, tuned_length / (2 * math.pi)


def _check(**values: tuple[float, float]) -> None:
    """Of every name its value, and what it must exceed for the laws to mean anything."""
    for name, (value, least) in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least < value < math.inf:
            raise ConfigError(f"{name} must be a finite number greater than {least:.4g}, got {value!r}")


@dataclass(frozen=True)
class Recommendation:
    """How to reach a length: ``extend_context(model, target_length, method, **params)``.

    factor: target over trained length. base: that of the model. bound: tokens up to which the laws predict that the model can
    read once tuned so; critical_dimension of the head_dim rotated dimensions have seen a whole turn in training.
    """

    target_length: int
    trained_length: int
    method: str
    params: dict[str, Any]
    factor: float
    base: float
    head_dim: int
    critical_dimension: int
    bound: float | None
    needs_tuning: bool
    reason: str
    command: str = field(default="")

    def __str__(self) -> str:
        return "\n".join(
            [
                f"trained for {self.trained_length:,} tokens with base {self.base:g}; {self.critical_dimension} of {self.head_dim} "
                "rotated dimensions have seen a whole turn",
                f"{self.target_length:,} tokens are {self.factor:.3g} times that: {self.method}. {self.reason}",
                "The laws predict no bound for it."
                if self.bound is None
                else f"Predicted bound: {self.bound:,.0f} tokens.",
                *([self.command] if self.command else []),
            ]
        )


# Without tuning YaRN holds perplexity up to about this stretch (docs of the method, and measured on a small model).
YARN_STRETCH = 8.0


def recommend(model_or_config: Any, target_length: int) -> Recommendation:
    """Which method, with which parameters, takes a model to `target_length` tokens.

    Args:
        model_or_config: a Transformers model with RoPE, or its config.
        target_length: tokens.

    Raises:
        ConfigError: no RoPE, or a length that is not positive.
    """
    if isinstance(target_length, bool) or not isinstance(target_length, int) or target_length < 1:
        raise ConfigError(f"target_length must be a number of tokens, at least 1, got {target_length!r}")
    config = config_of(model_or_config)
    parameters = parameters_of(config)
    kind = rescalable(config, parameters)[0]
    of_kind, length = parameters[kind], trained_length(config, parameters)
    dim, base = rotated(config, of_kind), base_of(of_kind)
    factor = target_length / length
    params: dict[str, Any] = {}
    tuned_base, why = base, ""
    if factor <= 1 or target_length <= (getattr(config, "max_position_embeddings", None) or 0):
        method, tuning, reason = "default", False, "By its configuration the model reads them: nothing is needed."
    elif factor <= YARN_STRETCH and not (why := _refuses_yarn(config, parameters, factor, length)):
        method, tuning = "yarn", False
        reason = "Works without tuning, better after a few hundred steps at the new length."
    else:
        method, tuning = "abf", True
        tuned_base = base_for(dim, base, length, target_length)
        params = {"adjusted_base": float(f"{tuned_base:.6g}")}
        because = f"Its config does not take yarn ({why})" if why else f"Beyond {YARN_STRETCH:g} times"
        reason = (
            f"{because}: a base of {params['adjusted_base']:g} and tuning at long lengths; worse within the trained length until "
            "then."
        )
    extra = critical_dimension(dim, length, base)
    bound = None if method == "yarn" else max(float(length), 2 * math.pi * tuned_base ** (extra / dim))
    arguments = "".join(f", {name}={value!r}" for name, value in params.items())
    command = f"fastllm.extend_context(model, {target_length}, {method!r}{arguments})" if method != "default" else ""
    return Recommendation(
        target_length, length, method, params, factor, base, dim, extra, bound, tuning, reason, command
    )  # fmt: skip


def _refuses_yarn(config: Any, parameters: dict[str, dict[str, Any]], factor: float, length: int) -> str:
    tried = copy.deepcopy(config)
    yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    kinds = rescalable(config, parameters)
    set_parameters(tried, {kind: {"rope_theta": base_of(parameters[kind]), **yarn} for kind in kinds})
    return refusal(tried)
