"""transformers.Trainer with checkpoints that are whole or absent, perplexity weighted by tokens, and two losses told apart."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import ExportableState

from fastllm.errors import ConfigError, FastLLMError
from fastllm.train import checkpoint, endless, together
from fastllm.train.mixing import KINDS, MixedDataset, MixedSampler
from fastllm.train.models import saved_here
from fastllm.train.packing import Evened


class Trainer(transformers.Trainer):
    """What `fastllm train` runs. `args.output_dir` is the run's own folder; its checkpoints lie in it.

    Besides what transformers' does: a checkpoint is written aside and renamed when it is on disk; the last `save_total_limit`
    are kept, and the best; `eval_loss` is the mean over tokens and comes with `eval_perplexity`; a batch of a MixedDataset
    logs `loss_text` and `loss_conversation`.

    Args:
        pretrain_share: of texts in a batch of a MixedDataset.
        streaming: validate on a text without end too, as `eval_streaming_perplexity`.
    """

    def __init__(
        self, *args: Any, pretrain_share: float = 0.5, streaming: endless.Endless | None = None, **kwargs: Any
    ) -> None:
        self.pretrain_share, self.streaming = pretrain_share, streaming
        self._evaluated = [0.0, 0.0]  # sum of losses, tokens
        self._apart: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}  # of micro batches: sum of losses, tokens
        self._weights: int | None = None
        super().__init__(*args, **kwargs)
        self.add_callback(_SaveTheBest())

    # ---- losses --------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches or KINDS[0] not in batches[0]:
            return batches, items
        if not self.model_accepts_loss_kwargs:
            raise ConfigError(f"stage mixed: the loss of {type(self.model).__name__} takes no num_items_in_batch")
        count = torch.stack([(b[kind]["labels"][..., 1:] != -100).sum() for b in batches for kind in KINDS]).sum()
        count = count.to(device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.gather(count[None]).sum()
        return batches, count

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if KINDS[0] not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)
        total = None
        for kind in KINDS:
            loss = model(**inputs[kind], num_items_in_batch=num_items_in_batch).loss
            tokens = (inputs[kind]["labels"][..., 1:] != -100).sum()
            self._apart[kind].append(torch.stack([loss.detach() * num_items_in_batch, tokens]))
            total = loss if total is None else total + loss
        if self.args.average_tokens_across_devices:
            total = total * self.accelerator.num_processes
        return total

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                step = self.state.global_step
                raise FastLLMError(f"step {step}: the loss is {logs['loss']}; training stops, earlier checkpoints stay")
            logs |= self._about(logs["loss"])
        super().log(logs, start_time)

    def _about(self, loss: float) -> dict[str, float]:
        """What is logged besides the training loss."""
        return {**self._losses_apart(), "perplexity": perplexity(loss)}

    def _losses_apart(self) -> dict[str, float]:
        """The losses of texts and of conversations since the last log, each the mean over its own tokens."""
        found = {}
        for kind, parts in self._apart.items():
            if not parts:
                continue
            summed = torch.stack(parts).sum(0)
            if self.args.world_size > 1:
                summed = self.accelerator.gather(summed[None]).sum(0)
            loss, tokens = summed.tolist()
            found[f"loss_{kind}"] = loss / max(1, tokens)
            parts.clear()
        return found

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As transformers counts `total_flos`, without walking through the model at every batch."""
        if "input_ids" not in inputs or not hasattr(self.model, "num_parameters"):
            return 0
        if self._weights is None:
            self._weights = int(self.model.num_parameters(exclude_embeddings=True))  # type: ignore[operator,union-attr]
        return 6 * inputs["input_ids"].numel() * self._weights

    # ---- data ----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        data = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(data, MixedDataset):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return MixedSampler(
            data, self._train_batch_size, self.pretrain_share, batches_at_once=self.args.world_size, seed=seed
        )

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        data: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        data = self.eval_dataset[data] if isinstance(data, str) else data  # type: ignore[index]
        if self.args.world_size > 1 and hasattr(data, "__len__"):
            data = Evened(data, self.args.world_size * self.args.eval_batch_size)
        return super().get_eval_dataloader(data)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, use_cache=False).loss.detach().float()
        tokens = (inputs["labels"][..., 1:] != -100).sum()
        if tokens:
            self._evaluated[0] += loss.double() * tokens
            self._evaluated[1] += tokens
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated = [0.0, 0.0]
        output = super().evaluation_loop(*args, **kwargs)
        both = torch.tensor([float(v) for v in self._evaluated], dtype=torch.float64, device=self.args.device)
        if self.args.world_size > 1:
            both = self.accelerator.gather(both[None]).sum(0)
        prefix = kwargs.get("metric_key_prefix", "eval")
        loss = (both[0] / both[1].clamp_min(1)).item()
        assert output.metrics is not None
        output.metrics.update({f"{prefix}_loss": loss, f"{prefix}_perplexity": perplexity(loss)})
        if self.streaming:
            output.metrics[f"{prefix}_streaming_perplexity"] = self._endless(self.streaming)
        return output

    def _endless(self, how: endless.Endless) -> float:
        """The same on every process, all of which ZeRO-3 needs for a forward pass."""
        with self.compute_loss_context_manager():
            return endless.perplexity(self.accelerator.unwrap_model(self.model), self.eval_dataset, how)  # type: ignore[arg-type]

    # ---- checkpoints ---------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()
        run = Path(str(self.args.output_dir))
        folder = run / f"{checkpoint.NAME}{self.state.global_step}"
        self._check_space(run)
        with checkpoint.written_whole(folder, writes=self.args.should_save, together=self._together) as aside:
            self.save_model(str(aside), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(aside))
                self._name_the_newest(aside)
                self._save_scaler(str(aside))
                self._save_rng_state(str(aside))
            if self.args.should_save:
                for part in [*self.callback_handler.callbacks, self.control]:
                    if isinstance(part, ExportableState):
                        states = self.state.stateful_callbacks
                        states[type(part).__name__] = part.state()  # type: ignore[index,call-overload]
                self.state.save_to_json(str(aside / checkpoint.STATE))
        if self.args.should_save:
            best = self.state.best_global_step
            checkpoint.rotate(run, self.args.save_total_limit, run / f"{checkpoint.NAME}{best}" if best else None)

    def _name_the_newest(self, folder: Path) -> None:
        """DeepSpeed reads in `latest` which of its states to load, and writes that file on the first machine alone."""
        if self.args.should_save and self.is_deepspeed_enabled and not (latest := folder / "latest").exists():
            for state in folder.glob("global_step*"):
                latest.write_text(state.name)

    @property
    def writes_model(self) -> bool:
        """Whether this process is one that writes the model's weights: under ZeRO-3 they are gathered on the first alone."""
        return self.args.should_save and not (self.args.process_index and is_deepspeed_zero3_enabled())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.writes_model or not self.args.should_save:
            with saved_here(self.accelerator.unwrap_model(self.model)):
                super()._save(output_dir, state_dict)

    @property
    def _together(self) -> Any:
        return self.accelerator.wait_for_everyone if self.args.world_size > 1 else None

    def _check_space(self, run: Path) -> None:
        """On every process that writes; all processes stop where one finds no room."""

        def check() -> None:
            earlier = checkpoint.complete(run)
            checkpoint.check_space(run, checkpoint.size_on_disk(earlier[-1]) if earlier else self._bytes_to_save())

        together.agree(check, here=self.args.should_save)

    def _bytes_to_save(self) -> int:
        """Weights, and what AdamW keeps of those that are trained: two moments and, under DeepSpeed, the weights in float32."""
        assert self.model is not None
        sizes = [(getattr(p, "ds_numel", p.numel()), p) for p in self.model.parameters()]
        adapters = hasattr(self.model, "peft_config")
        weights = sum(n * p.element_size() for n, p in sizes if p.requires_grad or not adapters)
        if self.args.save_only_model:
            return weights
        trained = sum(n for n, p in sizes if p.requires_grad)
        state = [v for s in getattr(self.optimizer, "state", {}).values() for v in s.values() if isinstance(v, Tensor)]
        return weights + (sum(v.nbytes for v in state) if state else trained * (12 if self.is_deepspeed_enabled else 8))


class _SaveTheBest(transformers.TrainerCallback):
    """A new best perplexity is worth a checkpoint at once."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Where it is set and one checkpoint is to be kept, transformers deletes all others at the end, the newest too.
        state.best_model_checkpoint = None

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        loss = (metrics or {}).get("eval_loss", math.inf)
        if args.save_strategy != "no" and loss < (math.inf if state.best_metric is None else state.best_metric):
            control.should_save = True


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else sys.float_info.max
