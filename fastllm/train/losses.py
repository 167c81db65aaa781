"""What a configuration says of the losses of the stages that learn from preferences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fastllm.errors import ConfigError

WITHOUT_REFERENCE = ("orpo", "simpo")


@dataclass(frozen=True)
class DPOOptions:
    """The key `dpo`: which loss of `fastllm.rl`, and its constants. beta defaults to 0.1, simpo's to 2, gamma to 1."""

    loss: Literal["sigmoid", "robust", "hinge", "ipo", "orpo", "simpo", "kto"] = "sigmoid"
    beta: float | None = None
    label_smoothing: float = 0.0
    gamma: float | None = None

    def check(self) -> None:
        if self.beta is not None and not self.beta > 0:
            raise ConfigError(f"dpo.beta must be above 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ConfigError(f"dpo.label_smoothing must lie in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ConfigError(f"dpo.label_smoothing belongs to the losses sigmoid and robust, not to {self.loss}")
        if self.gamma is not None and self.loss != "simpo":
            raise ConfigError(f"dpo.gamma belongs to the loss simpo, not to {self.loss}")

    @property
    def needs_reference(self) -> bool:
        return self.loss not in WITHOUT_REFERENCE


@dataclass(frozen=True)
class RewardOptions:
    """The key `rm`: `center` weighs (chosen score + rejected score)², which keeps scores around 0; `margin` is how far apart they
    are to be."""

    center: float = 0.0
    margin: float = 0.0

    def check(self) -> None:
        if not self.center >= 0:
            raise ConfigError(f"rm.center must not be negative, got {self.center}")
