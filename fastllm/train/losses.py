"""What a configuration says of the losses of the stages that learn from preferences; keys are named as in TRL."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fastllm.errors import ConfigError

WITHOUT_REFERENCE = ("orpo", "simpo")


@dataclass
class DPOOptions:
    """Stage dpo: which loss of `fastllm.rl`, and its constants."""

    loss_type: Literal["sigmoid", "robust", "hinge", "ipo", "orpo", "simpo", "kto"] = field(
        default="sigmoid", metadata={"help": "stage dpo: which loss"}
    )
    beta: float | None = field(default=None, metadata={"help": "stage dpo: of the loss; default 0.1, of simpo 2"})
    label_smoothing: float = field(default=0.0, metadata={"help": "stage dpo: of sigmoid and robust, below 0.5"})
    simpo_gamma: float | None = field(default=None, metadata={"help": "stage dpo: margin of simpo; default 1"})

    @property
    def needs_reference(self) -> bool:
        return self.loss_type not in WITHOUT_REFERENCE


@dataclass
class RewardOptions:
    """Stage rm: constants of the reward loss."""

    center_rewards_coefficient: float = field(
        default=0.0, metadata={"help": "stage rm: of (chosen score + rejected score)², which keeps scores around 0"}
    )
    margin: float = field(default=0.0, metadata={"help": "stage rm: how far apart the two scores are to be"})


_OF_STAGE: dict[str, type] = {"dpo": DPOOptions, "rm": RewardOptions}


def check(values: dict[str, Any]) -> None:
    """What can be said of a configuration without a model or data; called for every stage.

    Raises:
        ConfigError: keys of another stage, numbers out of range or that do not go together.
    """
    for stage, options in _OF_STAGE.items():
        for key in (f.name for f in fields(options)):
            if values.get(key) is not None and values["stage"] != stage:
                # in TRL's GRPO it is the KL to the reference
                hint = "; see kl_loss_coef and kl_coef" if (key, values["stage"]) == ("beta", "ppo") else ""
                raise ConfigError(f"{key} belongs to stage {stage}, not to {values['stage']}{hint}")
    loss, smoothing = values.get("loss_type", "sigmoid"), values.get("label_smoothing", 0)
    if values.get("beta") is not None and not values["beta"] > 0:
        raise ConfigError(f"beta must be above 0, got {values['beta']}")
    if not 0 <= smoothing < 0.5:
        raise ConfigError(f"label_smoothing must lie in [0, 0.5), got {smoothing}")
    if smoothing and loss not in ("sigmoid", "robust"):
        raise ConfigError(f"label_smoothing belongs to loss_type sigmoid and robust, not to {loss}")
    if values.get("simpo_gamma") is not None and loss != "simpo":
        raise ConfigError(f"simpo_gamma belongs to loss_type simpo, not to {loss}")
    if not values.get("center_rewards_coefficient", 0) >= 0:
        raise ConfigError(f"center_rewards_coefficient must be at least 0, got {values['center_rewards_coefficient']}")
