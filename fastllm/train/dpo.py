"""Stage dpo: a policy is tuned on preferences directly, by DPO and its kin, without logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastllm import rl
from fastllm.errors import ConfigError
from fastllm.rl import PreferenceLoss
from fastllm.rl.preference import DPO_KINDS
from fastllm.train.heads import HeadInput, hidden_states
from fastllm.train.losses import DPOOptions
from fastllm.train.pairs import PairTrainer, pairs_in


class DPOTrainer(PairTrainer):
    """Trains a causal LM by the losses of `rl` from hidden states.

    Args:
        options: which loss.
        reference: the policy before training, frozen; None for a model with adapters, which without them is that policy, and for
            losses that need none.
    """

    def __init__(
        self, *args: Any, options: DPOOptions | None = None, reference: nn.Module | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.options = options or DPOOptions()
        self.reference = reference
        self._reference_ready = False
        if reference is None and self.options.needs_reference and not hasattr(self.model, "disable_adapter"):
            raise ConfigError(f"the loss {self.options.loss_type} needs a reference")

    def pair_loss(self, model: Any, inputs: dict[str, Tensor], num_items: Tensor | None) -> PreferenceLoss:
        reference = self._reference_logps(model, inputs) if self.options.needs_reference else None
        found = self._run(model, inputs)
        if model.training and (meter := self.meter):
            meter.trained_on((inputs["labels"] != -100).sum())
        tokens = _tokens(inputs, found)
        with self.accelerator.autocast():
            return self._loss(tokens, reference, num_items, pairs_in(inputs))

    def _loss(
        self, tokens: dict[str, Any], reference: Tensor | None, num_items: Tensor | None, pairs: int
    ) -> PreferenceLoss:
        own = self.options
        if own.loss_type == "orpo":
            return rl.linear_orpo_loss(**tokens, beta=own.beta or 0.1, num_items=num_items)
        if own.loss_type == "simpo":
            gamma = 1.0 if own.simpo_gamma is None else own.simpo_gamma
            return rl.linear_simpo_loss(**tokens, beta=own.beta or 2.0, gamma=gamma, num_items=num_items)
        assert reference is not None
        if own.loss_type == "kto":
            desirable = torch.arange(2 * pairs, device=reference.device) < pairs
            return rl.linear_kto_loss(
                **tokens, ref_logps=reference, desirable=desirable, beta=own.beta or 0.1,
                num_items=None if num_items is None else 2 * num_items, distributed=self.args.world_size > 1,
            )  # fmt: skip
        assert own.loss_type in DPO_KINDS
        return rl.linear_dpo_loss(
            **tokens, ref_chosen_logps=reference[:pairs], ref_rejected_logps=reference[pairs:], beta=own.beta or 0.1,
            kind=own.loss_type, label_smoothing=own.label_smoothing, num_items=num_items,
        )  # fmt: skip

    def _run(self, model: Any, inputs: dict[str, Tensor]) -> HeadInput:
        where = {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}
        return hidden_states(model, self.accelerator.unwrap_model(model), **where)

    # ---- the reference -------------------------------------------------------------------------------------------

    def _reference_logps(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """(2B,) log-probabilities of the answers under the policy before training."""
        training = model.training
        with torch.no_grad(), self._as_reference(model) as reference, self.accelerator.autocast():
            found = self._run(reference, inputs)
            logps, _ = rl.linear_sequence_logprobs(**_tokens(inputs, found))
            if training and (meter := self.meter):
                meter.ran_forward(self.accelerator.unwrap_model(reference), inputs, adapters=self.reference is not None)
        return logps

    @contextmanager
    def _as_reference(self, model: Any) -> Iterator[Any]:
        if self.reference is not None:
            self._prepare_reference(model)
            yield self.reference
            return
        training = model.training
        model.eval()  # no dropout
        try:
            with self.accelerator.unwrap_model(model).disable_adapter():
                yield model
        finally:
            model.train(training)

    def _prepare_reference(self, model: Any) -> None:
        """Once, when the policy is on its device in the dtype it is trained in."""
        if self._reference_ready:
            return
        assert self.reference is not None
        self._reference_ready = True
        self.reference.eval().requires_grad_(False)
        if any(
            hasattr(p, "ds_id") for p in self.reference.parameters()
        ):  # ZeRO-3: its weights are gathered by an engine
            import deepspeed

            config = {
                key: value
                for key, value in self.accelerator.state.deepspeed_plugin.deepspeed_config.items()
                if key not in ("optimizer", "scheduler")
            }
            config["zero_optimization"] = {
                key: value for key, value in config["zero_optimization"].items() if key != "offload_optimizer"
            }
            self.reference = deepspeed.initialize(model=self.reference, config=config)[0]
            self.reference.eval()  # which returns None
            return
        self.reference.to(self.args.device, next(model.parameters()).dtype)


def _tokens(inputs: dict[str, Tensor], found: HeadInput) -> dict[str, Any]:
    """What the losses from hidden states take: position t predicts token t + 1, and answers alone count."""
    ids, counted = inputs["input_ids"], inputs["labels"] != -100
    shared = {"weight": found.head, **found.options}
    if "cu_seqlens" not in inputs:
        return {"hidden": found.hidden[:, :-1], "tokens": ids[:, 1:], "mask": counted[:, 1:], **shared}
    # A row's first token never counts, so no row reaches into the next.
    tokens, mask = ids[0].roll(-1), counted[0].roll(-1)
    return {"hidden": found.hidden[0], "tokens": tokens, "mask": mask, "cu_seqlens": inputs["cu_seqlens"], **shared}
