"""Training on preferences, pairs of a chosen and a rejected answer: batches, counts and figures that every such loss shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from fastllm.errors import ConfigError
from fastllm.rl import PreferenceLoss
from fastllm.train.callback import ThroughputCallback
from fastllm.train.packing import IGNORED
from fastllm.train.trainer import Trainer


class PairCollator:
    """Preferences as a batch of 2B conversations by the collator given, the B chosen ones first.

    A preference is a mapping with input_ids and labels of both its conversations, one after the other, and `chosen`, the tokens
    of the first; bins of them from a PackedDataset are taken as well. To what the collator returns is added `last`, (2B,) int64,
    where each conversation has its last token that is not `pad_token_id`, in the flattened input_ids; of packed conversations also
    `cu_seqlens`, (2B + 1,) int32.
    """

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Tensor]], pad_token_id: int | None = None) -> None:
        self.collator, self.pad_token_id = collator, pad_token_id

    def __call__(self, items: Sequence[Any]) -> dict[str, Tensor]:
        pairs = [pair for one in items for pair in (one if isinstance(one, list) else [one])]
        pairs = [pair for pair in pairs if "blank" not in pair] or pairs  # see Evened
        rows = [_half(pair, slice(0, pair["chosen"])) for pair in pairs]
        rows += [_half(pair, slice(pair["chosen"], None)) for pair in pairs]
        batch = self.collator(rows)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        if packed := "position_ids" in batch:
            ends = lengths.cumsum(0)
            batch["cu_seqlens"] = torch.cat((ends.new_zeros(1), ends)).int()
        begins = batch["cu_seqlens"][:-1] if packed else torch.arange(len(rows)) * batch["input_ids"].shape[1]
        batch["last"] = begins + torch.tensor([self._last(row["input_ids"]) for row in rows])
        return batch

    def _last(self, ids: Any) -> int:
        """Where transformers reads the score: the last token that is no padding, also where the text ends with that token."""
        real = (n for n in range(len(ids) - 1, -1, -1) if int(ids[n]) != self.pad_token_id)
        return next(real, 0)


def _half(pair: dict[str, Any], part: slice) -> dict[str, Any]:
    return {"input_ids": pair["input_ids"][part], "labels": pair["labels"][part]}


def pairs_in(batch: dict[str, Tensor]) -> int:
    return batch["last"].shape[0] // 2


class PairTrainer(Trainer):
    """A Trainer whose loss is that of pairs. A subclass says which, in `pair_loss`.

    The loss is divided by the pairs of all micro batches and processes of a step. What the loss tells besides itself is logged as
    means over pairs, in validation too.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"this stage trains one process per GPU, and this one has {self.args.n_gpu}: start it with torchrun or deepspeed"
            )
        self.model_accepts_loss_kwargs = True  # the loss is divided by all pairs of a step already
        self._since_log: _Means = _Means()

    def pair_loss(self, model: Any, inputs: dict[str, Tensor], num_items: Tensor | None) -> PreferenceLoss:
        """The loss of a batch of a PairCollator; `num_items` is what to divide the sum over pairs by."""
        raise NotImplementedError

    @property
    def meter(self) -> ThroughputCallback | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, ThroughputCallback)), None)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        pairs = torch.tensor(sum(map(pairs_in, batches)), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            pairs = self.accelerator.gather(pairs[None]).sum()
        return batches, pairs

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, stats = self.pair_loss(model, inputs, num_items_in_batch)
        self._since_log.add(stats, pairs_in(inputs))
        return loss * self.accelerator.num_processes if self.args.average_tokens_across_devices else loss

    def _about(self, loss: float) -> dict[str, float]:
        return self._since_log.drain(self)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, stats = self.pair_loss(model, inputs, None)
        counted = bool((inputs["labels"] != IGNORED).any())
        self._in_evaluation.add({"loss": loss, **stats}, pairs_in(inputs) if counted else 0)
        return loss.float(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._in_evaluation = _Means()
        output = transformers.Trainer.evaluation_loop(self, *args, **kwargs)
        assert output.metrics is not None
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{key}": value for key, value in self._in_evaluation.drain(self).items()})
        return output


class _Means:
    """Means over pairs of numbers that stay on their device until they are read."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # of every name, and the pairs
        self.pairs = 0

    def add(self, stats: dict[str, Tensor], pairs: int) -> None:
        self.names = list(stats)
        these = torch.stack([value.detach().float() for value in stats.values()]) * pairs
        self.sums = these if self.sums is None else self.sums + these
        self.pairs += pairs

    def drain(self, trainer: Trainer) -> dict[str, float]:
        """The means over all processes since the last time."""
        if self.sums is None:
            return {}
        found = torch.cat((self.sums, self.sums.new_tensor([float(self.pairs)])))
        if trainer.args.world_size > 1:
            found = trainer.accelerator.gather(found[None]).sum(0)
        *sums, pairs = found.tolist()
        self.sums, self.pairs = None, 0
        return {name: value / max(1.0, pairs) for name, value in zip(self.names, sums)}
