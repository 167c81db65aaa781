"""One training run from its configuration to its exported model."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from fastllm.errors import ConfigError
from fastllm.train import checkpoint, folder, lock, models, together
from fastllm.train.callback import ThroughputCallback
from fastllm.train.config import PREFERENCES, Options
from fastllm.train.data import Data, prepare
from fastllm.train.dpo import DPOTrainer
from fastllm.train.encode import Encoder, use_template
from fastllm.train.endless import Endless
from fastllm.train.examples import resolve_in
from fastllm.train.heads import score_head
from fastllm.train.mixing import MixedCollator, MixedDataset, MixedSampler
from fastllm.train.packing import PackedDataset, PackingCollator, PaddingCollator, check_rows_stay_apart
from fastllm.train.pairs import PairCollator
from fastllm.train.reward import RewardTrainer
from fastllm.train.trainer import Trainer, perplexity


@dataclass(frozen=True)
class Result:
    """What a run came to; `throughput` is ThroughputCallback's average."""

    run: str
    final: str
    steps: int
    train_loss: float | None  # of the steps made now; None where a resumed run had made all before
    best_perplexity: float | None  # of stages that learn to continue text
    best_eval_loss: float | None
    throughput: dict[str, float]


class Run:
    """A run that is ready to go: all that can be wrong with the input has been found by then.

    Nothing is written to `output_dir` before configuration, data and model are known to be good.

    Raises:
        ConfigError, DataError: what is wrong with the input. CheckpointError: nothing to resume from, or another model's.
    """

    def __init__(self, options: Options) -> None:
        args, data_options = options.arguments, options.data
        self.options = options
        folder.check_settings(options)
        resolve_in(options)
        transformers.set_seed(args.seed)
        self.tokenizer = models.load_tokenizer(options.model)
        use_template(self.tokenizer, data_options.chat_template)
        self.resumed = folder.checkpoint_to_resume(options)
        with args.main_process_first(local=True, desc="tokenising"):
            sets = _read(options, self.tokenizer)
        _say_beforehand(options, sets)
        transformers.set_seed(args.seed)  # whatever came before, a model from scratch and its adapters are the same
        stage = data_options.stage
        model = models.load_model(options.model, self.tokenizer, data_options.max_length, stage=stage)
        if resumed := self.resumed:

            def fits() -> None:
                checkpoint.check_same_model(resumed, model)
                if not args.save_on_each_node:  # each node has its own part of it then
                    zero = getattr(args, "hf_deepspeed_config", None)
                    zero3 = zero is not None and zero.is_zero3()
                    checkpoint.check_same_ranks(
                        resumed, args.world_size, sharded=args.deepspeed is not None, zero3=zero3
                    )

            together.agree(fits, here=args.process_index == 0)
            together.agree(lambda: checkpoint.check_resumable(resumed, rank=args.process_index, world=args.world_size))
        sharded = models.sharded(model)
        if data_options.packing and not sharded:
            check_rows_stay_apart(model)
        training = _arranged(sets, options)
        _check_batches(training, options)
        check_optimizer(args, model)
        kind, more = _trainer(options, model, self.tokenizer)
        folder.check_course(options, sets)
        self.folder = self.resumed.parent if self.resumed else folder.new(options)
        args.output_dir = str(self.folder)
        args.run_name = args.run_name or self.folder.name  # in Weights & Biases
        args.disable_tqdm = True  # ThroughputCallback has the progress bar
        with gone_if_it_fails(self.folder, new=not self.resumed):
            self.trainer = kind(
                model=model,
                args=args,
                train_dataset=training,
                eval_dataset=_packed(sets["eval_data"], options) if "eval_data" in sets else None,
                data_collator=_collator(options, self.tokenizer),
                processing_class=self.tokenizer,
                **more,
            )
        self.trainer.remove_callback(transformers.PrinterCallback)
        if sharded:
            self.trainer.add_callback(_CheckModel(causal=stage != "rm", packing=data_options.packing))
        bar = not options.values.get("disable_tqdm")
        self.throughput = ThroughputCallback(progress=bar, profile=args.profile).put_first(self.trainer)
        if args.should_save:
            folder.describe(self.folder, options, sets, self.resumed)
        if args.process_index == 0:
            print(f"run folder: {self.folder}", file=sys.stderr)

    def go(self) -> Result:
        """Trains and writes the model.

        Raises:
            CheckpointError: no room to save.
        """
        try:
            return self._go()
        finally:
            lock.release(self.folder)

    def _go(self) -> Result:
        args = self.options.arguments
        before = checkpoint.read_state(self.resumed)["global_step"] if self.resumed else 0
        if 0 < args.max_steps <= before:  # transformers would make one step more
            args.max_steps, args.num_train_epochs = -1, 0.0
        done = self.trainer.train(resume_from_checkpoint=str(self.resumed) if self.resumed else None)
        final = _export(self.trainer, self.options, self.tokenizer, self.folder)
        best = self.trainer.state.best_metric
        return Result(
            str(self.folder),
            str(final),
            done.global_step,
            done.training_loss if done.global_step > before else None,
            None if best is None or self.options.data.stage in PREFERENCES else perplexity(best),
            best,
            self.throughput.average,
        )


def _trainer(options: Options, model: Any, tokenizer: Any) -> tuple[type[Trainer], dict[str, Any]]:
    """The Trainer of the stage, and what it takes besides what all take."""
    stage = options.data.stage
    if stage == "rm":
        score_head(model)
        return RewardTrainer, {"options": options.rm}
    if stage == "dpo":
        reference = None
        if options.dpo.needs_reference and not options.model.lora:
            transformers.set_seed(options.arguments.seed)  # from scratch, the same weights again
            length = options.data.max_length
            reference = models.load_model(options.model, tokenizer, length, stage=stage, reference=True)
        return DPOTrainer, {"options": options.dpo, "reference": reference}
    streaming = None if options.data.streaming is None else Endless(**options.data.streaming)
    return Trainer, {"pretrain_share": options.data.pretrain_share or 0.5, "streaming": streaming}


def _collator(options: Options, tokenizer: Any) -> Any:
    collator: Any = PackingCollator() if options.data.packing else PaddingCollator(tokenizer.pad_token_id or 0)
    if options.data.stage in PREFERENCES:
        return PairCollator(collator, tokenizer.pad_token_id)
    return MixedCollator(collator) if options.data.stage == "mixed" else collator


class _CheckModel(transformers.TrainerCallback):
    """What is known of other models before training begins."""

    def __init__(self, *, causal: bool, packing: bool) -> None:
        self.causal, self.packing = causal, packing

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.causal:
            models.check_causal(model)
        if self.packing:
            check_rows_stay_apart(model)


# ---- data --------------------------------------------------------------------------------------------------------


def _read(options: Options, tokenizer: Any) -> dict[str, Data]:
    """The data sets of a run by their key in the configuration."""
    data = options.data
    encoder = Encoder(tokenizer, data.max_length, train_on_prompt=data.train_on_prompt)
    main = {"pretrain": "text", **dict.fromkeys(PREFERENCES, "preference")}.get(data.stage, "conversation")
    asked = [
        ("data", data.data, main),
        ("eval_data", data.eval_data, main),
        ("pretrain_data", data.pretrain_data, "text"),
    ]
    return {
        key: prepare(sources, encoder, kind=kind, on_bad_row=data.on_bad_row, cache=data.cache_dir, key=key)
        for key, sources, kind in asked
        if sources
    }


def _say_beforehand(options: Options, sets: dict[str, Data]) -> None:
    """What the data came to, and keys that have no effect as the run was started."""
    for key, data in sets.items():
        models.say(f"{key}: {data.report.summed_up(options.data.max_length)}")
    say_left_aside(options.arguments)


def say_left_aside(args: Any) -> None:
    """DeepSpeed's keys, where no launcher has started it."""
    if args.zero_stage is not None and not args.deepspeed:
        offload = "" if args.offload == "none" else f" and offload: {args.offload}"
        models.say(
            f"zero_stage: {args.zero_stage}{offload} left aside: one process without DeepSpeed, unless `deepspeed --module "
            "fastllm.train` starts it"
        )


def _packed(data: Data, options: Options) -> Any:
    if not options.data.packing:
        return data.rows
    rows_of_one = 2 if options.data.stage in PREFERENCES else 1
    return PackedDataset(data.rows, rows_of_one * options.data.max_length, seed=options.arguments.seed)


def _arranged(sets: dict[str, Data], options: Options) -> Any:
    if options.data.stage == "mixed":
        return MixedDataset(_packed(sets["data"], options), _packed(sets["pretrain_data"], options))
    return _packed(sets["data"], options)


def _check_batches(training: Any, options: Options) -> None:
    args = options.arguments
    if options.data.stage == "mixed":  # which raises where a batch cannot be filled
        share = options.data.pretrain_share or 0.5
        MixedSampler(training, args.per_device_train_batch_size, share, batches_at_once=args.world_size)
    if args.dataloader_drop_last and len(training) < args.per_device_train_batch_size * args.world_size:
        raise ConfigError(
            f"{len(training)} rows do not fill one batch of {args.per_device_train_batch_size} on each of {args.world_size} "
            "processes, and dataloader_drop_last leaves out what does not"
        )


def check_optimizer(args: Any, model: Any) -> None:
    """That the library of the optimizer asked for is there, before anything is written."""
    try:
        transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optim {args.optim.value}: {' '.join(str(error).split())}") from error


@contextmanager
def gone_if_it_fails(folder: Path, *, new: bool) -> Iterator[None]:
    """Around what may fail once a run has its folder and before it begins: a new folder does not stay."""
    try:
        yield
    except BaseException:
        if new:
            shutil.rmtree(folder, ignore_errors=True)
        raise


# ---- the end ------------------------------------------------------------------------------------------------------


def _export(trainer: Trainer, options: Options, tokenizer: Any, run: Path) -> Path:
    """The trained model, to be loaded with plain transformers, or peft for an adapter."""
    kinds = {"adapter": ["adapter"], "merged": ["merged"], "both": ["adapter", "merged"]}[options.model.export]
    final = run / "final"
    if not options.model.lora or "adapter" in kinds:
        with checkpoint.written_whole(final, writes=trainer.writes_model, together=trainer._together) as aside:
            trainer.save_model(str(aside), _internal_call=True)
    if options.model.lora and "merged" in kinds:
        final = run / ("final-merged" if "adapter" in kinds else "final")
        with checkpoint.written_whole(final, writes=trainer.writes_model, together=trainer._together) as aside:
            if trainer.writes_model:
                models.export(trainer.accelerator.unwrap_model(trainer.model), tokenizer, aside, "merged")
    return final
