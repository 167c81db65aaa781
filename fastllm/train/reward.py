"""Stage rm: a reward model, which gives the chosen answer a higher score than the rejected one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastllm.rl import PreferenceLoss, reward_loss
from fastllm.train.heads import outputs_of, score_head
from fastllm.train.losses import RewardOptions
from fastllm.train.pairs import PairTrainer


class RewardTrainer(PairTrainer):
    """Trains a model of AutoModelForSequenceClassification with one label by `rl.reward_loss`."""

    def __init__(self, *args: Any, options: RewardOptions | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.options = options or RewardOptions()

    def pair_loss(self, model: Any, inputs: dict[str, Tensor], num_items: Tensor | None) -> PreferenceLoss:
        where = {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}
        # A packed row has many scores to read and the model's own output only one: those of all tokens are taken.
        with outputs_of(score_head(self.accelerator.unwrap_model(model))) as seen:
            model(**where, use_cache=False)
        chosen, rejected = seen[-1].reshape(-1)[inputs["last"]].float().chunk(2)
        if model.training and (meter := self.meter):
            meter.trained_on(inputs["last"].shape[0])
        return reward_loss(
            chosen,
            rejected,
            margin=self.options.margin or None,
            center=self.options.center_rewards_coefficient,
            num_items=num_items,
        )
