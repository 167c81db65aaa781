"""ThroughputCallback: what each step of a transformers.Trainer did and how fast, for any Trainer."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from fastllm.train import metrics
from fastllm.train.profile import StepProfiler
from fastllm.train.throughput import CONVENTIONS, StepCost, StepFlops, Throughput, forward_flops, peak_flops

_SHOWN = (
    "loss",
    "eval_loss",
    "eval_perplexity",
    "eval_streaming_perplexity",
    "reward",
    "kl",
    "eval_reward",
    "tgs_real",
    "samples_per_s",
    "mfu",
)
_PARTS = ("data", "forward_backward", "optimizer")


class ThroughputCallback(TrainerCallback):
    """Measures every optimizer step of a Trainer and adds the result to its logs.

    Added keys, over the steps since the last log: `tgs`, `tgs_real`, `tgs_trainable` (tokens per second and device: of all
    positions, without padding, of those trained on), `samples_per_s` (rows per second and device), `step_s` and of it `data_s`,
    `forward_backward_s`, `optimizer_s`, `tflops` and `hardware_tflops` per device, `mfu` and `hfu` where the device's peak is known,
    `peak_memory_gb`. At the end of training `average` holds the same over all steps but the first, which pays for warming up.

    The logs of step n go to `state.log_history`, to the callbacks after this one and, a JSON object a line, to `metrics_file`. In
    TensorBoard and Weights & Biases they appear where this callback comes first: ``ThroughputCallback().put_first(trainer)``.
    Evaluation, saving and logging are no part of a step's time.

    Args:
        metrics_file: default `output_dir`/metrics.jsonl. Rank 0 alone writes.
        convention: of the attention's FLOPs, see ``fastllm.train.step_flops``.
        progress: show a progress bar with loss, TGS and time left (to be used without the Trainer's own:
            ``disable_tqdm=True``); where standard error is no terminal, a line every ten seconds.
        profile: record the third to fifth step with torch.profiler, and say which kinds of work their time went to; trace and
            summary go to `output_dir`/profile. See ``fastllm.train.profile.StepProfiler``.
    """

    def __init__(
        self,
        metrics_file: str | os.PathLike[str] | None = None,
        *,
        convention: str = "causal",
        progress: bool = False,
        profile: bool = False,
    ) -> None:
        if convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
        self.metrics_file, self.convention, self.progress, self.profile = metrics_file, convention, progress, profile
        self.average: dict[str, float] = {}
        self._reset()

    def put_first(self, trainer: Any) -> ThroughputCallback:
        """Adds this callback to a trainer ahead of all others, so that their logs hold its figures."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def _reset(self) -> None:
        self._model: Any = None
        self._cost: Any = None  # of its steps
        self._hook: Any = None
        self._steps: list[_Step] = []  # since the last log
        self._total = _Sum()  # of this process, over all steps but the first
        self._warm = False
        self._current: _Step | None = None
        self._mark: Any = None  # the end of what came last
        self._bar: Any = None
        self._profiler: StepProfiler | None = None

    # ---- events --------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._close()
        self._reset()
        self._model = model
        self._clock = _Clock(args.device)
        self._devices = max(1, args.world_size) * max(1, args.n_gpu if args.world_size <= 1 else 1)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else next(model.parameters()).dtype
        self._peak = peak_flops(args.device, dtype)
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
        if self.progress and state.is_world_process_zero:
            self._bar = Bar(state.max_steps, state.global_step)
        if self.profile:
            self._profiler = StepProfiler(
                Path(args.output_dir) / "profile", args.device, rank=args.process_index, first=state.global_step + 1,
                left=state.max_steps - state.global_step, peak=self._peak, tell=self._bar.tell if self._bar else None,
            )  # fmt: skip
        self._mark = self._clock.now()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._between_steps()  # other callbacks have begun as well meanwhile, which takes W&B a second

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._mark is None:
            return
        self._current = _Step(begun=self._mark)
        self._current.data = self._clock.now()
        if self._profiler:
            self._profiler.working()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._current:
            self._current.backward = self._clock.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._profiler:
            self._profiler.wait()
        self._mark = self._clock.now()
        if self._bar:
            self._bar.move(state.global_step)
        if self._current:
            self._current.end = self._mark
            self._steps.append(self._current)
            if self._profiler:
                self._profiler.stepped(self._current.documents)
                self._mark = self._clock.now()
            self._current = None

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self._bar:
            self._bar.evaluating(eval_dataloader)
        if self._profiler:
            self._profiler.pause()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self._between_steps()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._between_steps()

    def _between_steps(self) -> None:
        """What came since the last step is no part of the next one."""
        if self._mark is None:
            return
        self._mark = self._clock.now()
        if self._profiler:
            self._profiler.waiting()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = {} if logs is None else logs
        if self._steps and "loss" in logs:
            logs |= self._figures(self._everywhere(self._drain()))
            if state.log_history:
                state.log_history[-1].update(logs)
        if state.is_world_process_zero:
            self._write(args, state, logs)
            if self._bar:
                self._bar.say(state, logs)
        self._between_steps()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._drain()
        self.average = self._figures(self._everywhere(self._total)) if self._total.steps else {}
        self._close()

    def _close(self) -> None:
        if self._hook:
            self._hook.remove()
            self._hook = None
        if self._profiler:
            self._profiler.close()
            self._profiler = None
        if self._bar:
            self._bar.close()
            self._bar = None

    # ---- counting ------------------------------------------------------------------------------------------------

    def _count(self, model: nn.Module, positional: Any, inputs: dict[str, Any]) -> None:
        """Ahead of every forward pass; keeps tensors of the batch, for to read them here would wait for the device."""
        ids = inputs.get("input_ids", positional[0] if positional else None)
        if not model.training or self._current is None or not isinstance(ids, Tensor):
            return
        labels = inputs.get("labels")
        self._current.batches.append(
            _Batch(ids.shape, inputs.get("attention_mask"), inputs.get("position_ids"), labels)
        )

    def trained_on(self, tokens: Tensor | int) -> None:
        """For a trainer whose model is not given its labels: how many tokens of the batch that just went forward are trained on."""
        if self._current and self._current.batches:
            self._current.batches[-1].count = tokens

    def ran_forward(self, model: nn.Module, inputs: dict[str, Tensor], *, adapters: bool = True) -> None:
        """For a trainer that needs another model's forward pass, a reference's say, or its own model's without `adapters`: its
        FLOPs belong to the step, its tokens do not."""
        if self._current:
            masks = (inputs.get("attention_mask"), inputs.get("position_ids"))
            self._current.forwards.append((model, adapters, _Batch(inputs["input_ids"].shape, *masks, None)))

    def _drain(self) -> _Sum:
        """The steps of this process since the last log, summed; waits for the device once."""
        if self._steps:
            self._clock.wait()
            if self._cost is None or not self._cost.holds:
                self._cost = StepCost(self._model, convention=self.convention)
        done = _Sum()
        for step in self._steps:
            lengths = [length for batch in step.batches for length in batch.lengths()]
            backward = step.backward if step.backward is not None else step.end
            points = [step.begun, step.data, backward, step.end]
            parts = [self._clock.between(a, b) for a, b in pairwise(points)]
            flops = self._cost(lengths)
            besides = sum(
                forward_flops(model, batch.lengths(), convention=self.convention, adapters=adapters)
                for model, adapters, batch in step.forwards
            )
            trained = sum(batch.trained() for batch in step.batches)
            one = _Sum(
                1, sum(b.shape.numel() for b in step.batches), sum(lengths), trained, len(lengths),
                dict(zip(_PARTS, parts)), flops.model + besides, flops.hardware + besides,
            )  # fmt: skip
            done.add(one)
            if self._warm:
                self._total.add(one)
            self._warm = True
        self._steps = []
        return done

    def _everywhere(self, done: _Sum) -> _Sum:
        """Summed over all processes; times are means of theirs."""
        if self._devices == 1 or not torch.distributed.is_initialized():
            return done
        world = torch.distributed.get_world_size()
        values = [done.tokens, done.real, done.trained, done.samples, done.model, done.hardware]
        values += [done.parts[name] / world for name in _PARTS]
        device = next(self._model.parameters()).device
        kind = torch.float64 if device.type != "mps" else torch.float32
        whole = torch.tensor(values, dtype=kind, device=device)
        torch.distributed.all_reduce(whole)
        tokens, real, trained, samples, model, hardware, *parts = whole.tolist()
        return _Sum(
            done.steps, round(tokens), round(real), round(trained), round(samples), dict(zip(_PARTS, parts)), model, hardware,
        )  # fmt: skip

    def _figures(self, done: _Sum) -> dict[str, float]:
        seconds = max(sum(done.parts.values()), 1e-9)
        rates = Throughput(
            seconds,
            done.tokens,
            done.real,
            done.trained,
            StepFlops(done.model, done.hardware),
            self._devices,
            self._peak,
        )
        figures = {
            "tgs": rates.tokens_per_s,
            "tgs_real": rates.real_tokens_per_s,
            "tgs_trainable": rates.trainable_tokens_per_s,
            "samples_per_s": done.samples / seconds / self._devices,
            "step_s": seconds / max(1, done.steps),
            **{f"{name}_s": done.parts[name] / max(1, done.steps) for name in _PARTS},
            "tflops": rates.tflops,
            "hardware_tflops": rates.hardware_tflops,
        }
        if rates.mfu is not None and rates.hfu is not None:
            figures |= {"mfu": rates.mfu, "hfu": rates.hfu}
        if (memory := peak_memory(self._clock.device)) is not None:
            figures["peak_memory_gb"] = memory / 1e9
        return {name: float(f"{value:.6g}") for name, value in figures.items()}

    # ---- telling -------------------------------------------------------------------------------------------------

    def _write(self, args: Any, state: Any, logs: dict[str, Any]) -> None:
        path = Path(self.metrics_file or Path(args.output_dir) / metrics.NAME)
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics.append(path, state.global_step, logs)


@dataclass
class _Batch:
    shape: torch.Size
    mask: Any
    positions: Any
    labels: Any
    count: Any = None  # tokens trained on, where there are no labels

    def lengths(self) -> list[int]:
        """Real tokens of every row; of a packed batch, where positions begin again, of every row in it."""
        if isinstance(self.mask, Tensor) and self.mask.dim() == 2:
            return self.mask.sum(1).tolist()
        if isinstance(self.positions, Tensor) and self.positions.dim() == 2:
            found: list[int] = []
            for row in self.positions.cpu():
                starts = torch.nonzero(row[1:] != row[:-1] + 1).flatten() + 1
                edges = [0, *starts.tolist(), len(row)]
                found += [b - a for a, b in pairwise(edges)]
            return found
        return [self.shape[1]] * self.shape[0]

    def trained(self) -> int:
        """Positions whose prediction counts in the loss; a row's first label is predicted by nothing."""
        if not isinstance(self.labels, Tensor):
            return int(self.count or 0)
        return int((self.labels[..., 1:] != -100).sum())


@dataclass
class _Step:
    begun: Any
    data: Any = None
    backward: Any = None
    end: Any = None
    batches: list[_Batch] = field(default_factory=list)
    forwards: list[tuple[nn.Module, bool, _Batch]] = field(default_factory=list)

    def documents(self) -> list[list[int]]:
        """The lengths of the rows of each packed batch."""
        return [batch.lengths() for batch in self.batches if not isinstance(batch.mask, Tensor)]


@dataclass
class _Sum:
    steps: int = 0
    tokens: int = 0
    real: int = 0
    trained: int = 0
    samples: int = 0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PARTS, 0.0))
    model: float = 0.0
    hardware: float = 0.0

    def add(self, other: _Sum) -> None:
        for name in ("steps", "tokens", "real", "trained", "samples", "model", "hardware"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in _PARTS:
            self.parts[name] += other.parts[name]


class _Clock:
    """Points in time: on a CUDA device events in its stream, so that to take one does not wait for the work before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(device)

    def now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def between(self, one: Any, other: Any) -> float:
        return one.elapsed_time(other) / 1000 if self.cuda else other - one


def peak_memory(device: torch.device) -> int | None:
    """Bytes: the most allocated on the GPU, or resident in this process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


class Bar:
    """Loss, speed and time left: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, steps: int, done: int) -> None:
        from tqdm.auto import tqdm

        self.bar: Any = None
        if sys.stderr.isatty():
            # Smoothed, the time left would jump after every evaluation and checkpoint.
            self.bar = tqdm(total=steps, initial=done, dynamic_ncols=True, unit="step", smoothing=0)
        self.begun, self.first, self.said = time.perf_counter(), done, -math.inf
        self.evaluated = 0

    def move(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def evaluating(self, batches: Any) -> None:
        """A batch more of an evaluation, which no step would show for as long."""
        self.evaluated += 1
        if self.bar is not None and time.perf_counter() - self.said > 0.5:
            self.said = time.perf_counter()
            self.bar.set_postfix_str(
                f"evaluating {self.evaluated}/{len(batches) if hasattr(batches, '__len__') else '?'}"
            )

    def say(self, state: Any, logs: dict[str, Any]) -> None:
        self.evaluated = 0
        told = {key: logs[key] for key in _SHOWN if key in logs}
        if not told:
            return
        text = " ".join(f"{key} {_number(value)}" for key, value in told.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            return
        now = time.perf_counter()
        evaluated = "eval_loss" in told or "eval_reward" in told
        if now - self.said < 10 and state.global_step < state.max_steps and not evaluated:
            return
        self.said = now
        if done := state.global_step - self.first:  # none at an evaluation before the first step
            text += f" left {_clock((now - self.begun) / done * (state.max_steps - state.global_step))}"
        print(f"step {state.global_step}/{state.max_steps} {text}", file=sys.stderr, flush=True)

    def tell(self, text: str) -> None:
        """Lines above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _number(value: float) -> str:
    """Four digits, and of a large number all before the point: g alone would write 10,640 as 1.064e+04."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
