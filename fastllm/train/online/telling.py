"""What a run tells of its iterations: to metrics.jsonl, the progress bar, and what report_to names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from fastllm.errors import FastLLMError
from fastllm.train import metrics
from fastllm.train.callback import Bar, peak_memory
from fastllm.train.online.course import Course
from fastllm.train.online.work import PARTS
from fastllm.train.profile import StepProfiler
from fastllm.train.throughput import peak_flops


class Telling:
    """Figures of iterations as they come, and their average.

    Args:
        folder: of the run. steps: of the whole run. first: whether this is the first process, which alone writes. bar: to show progress.
    """

    def __init__(
        self, course: Course, folder: Path, args: Any, tokenizer: Any, steps: int, *, first: bool, bar: bool = True
    ) -> None:
        self.course, self.folder, self.args, self.steps, self.first = course, folder, args, steps, first
        self.rewards: list[float] = []
        self.spent: dict[str, float] = {}  # sums over iterations but the first
        self.iterations = 0
        self.every = every(args.logging_steps, steps)
        actor = course.engine.models.actor
        self.peak = peak_flops(course.clock.device, torch.bfloat16 if args.bf16 else actor.dtype)
        self.state = TrainerState(max_steps=steps, is_world_process_zero=first, is_local_process_zero=first)
        self.state.global_step = course.step
        reporters = [kind() for kind in get_reporting_integration_callbacks(args.report_to)]
        self.handler = CallbackHandler(reporters, actor, tokenizer, None, None)
        self.control = TrainerControl()
        self.handler.on_train_begin(args, self.state, self.control)
        self.bar = Bar(steps, course.step) if first and bar else None
        self.profiler: StepProfiler | None = None
        if args.profile:
            self.profiler = StepProfiler(
                folder / "profile", course.clock.device, rank=args.process_index, first=course.step + 1,
                left=steps - course.step, steps=1, warmup=1, peak=self.peak, tell=self.bar.tell if self.bar else None,
            )  # fmt: skip
            self.profiler.pause()

    def begin(self) -> None:
        if self.profiler:
            self.profiler.waiting()  # so that what was told and saved since is no part of the iteration
            self.profiler.working()

    def iteration(self, figures: dict[str, float]) -> None:
        """What an iteration returned.

        Raises:
            FastLLMError: a figure is not finite.
        """
        course = self.course
        if self.profiler:
            self.profiler.stepped()
            self.profiler.pause()  # an evaluation and a checkpoint may follow
        spent = {f"{name}_s": seconds for name, seconds in course.clock.take().items()}
        work = {name: figures.pop(name) for name in list(figures) if name.endswith("_flops")}
        done = {**spent, **work, "samples": figures.pop("samples"), "tokens": figures.pop("tokens")}
        self.rewards.append(figures["reward"])
        self.state.global_step = course.step
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FastLLMError(
                    f"iteration {course.step}: {name} is {value}; training stops, the last checkpoint is as it was"
                )
        if self.iterations:
            self.spent = {name: self.spent.get(name, 0.0) + value for name, value in done.items()}
        self.iterations += 1
        logs = figures | {"learning_rate": self.args.learning_rate * course.schedule.factor} | self._speed(done, 1)
        if course.step % self.every == 0 or course.step == self.steps:
            self._write(logs)
        if self.bar:
            self.bar.move(course.step)

    def evaluation(self, figures: dict[str, float]) -> None:
        self._write(figures)

    def _speed(self, done: dict[str, float], iterations: int) -> dict[str, float]:
        """Of each device; FLOPs are counted over all processes, seconds are this one's."""
        world = self.course.world
        seconds = max(sum(done[f"{name}_s"] for name in PARTS), 1e-9)
        speed = {"samples_per_s": done["samples"] / seconds / world, "tgs": done["tokens"] / seconds / world}
        speed["step_s"] = seconds / iterations
        speed |= {f"{name}_s": done[f"{name}_s"] / iterations for name in PARTS}
        rate = {name: done[f"{name}_flops"] / max(done[f"{name}_s"], 1e-9) / world for name in PARTS}
        whole = sum(done[f"{name}_flops"] for name in PARTS) / seconds / world
        hardware = done["hardware_flops"] / seconds / world
        speed |= {"tflops": whole / 1e12, "hardware_tflops": hardware / 1e12}
        speed |= {f"{name}_tflops": value / 1e12 for name, value in rate.items()}
        if self.peak:
            speed |= {"mfu": whole / self.peak, "hfu": hardware / self.peak}
            speed |= {f"{name}_mfu": value / self.peak for name, value in rate.items()}
        if (memory := peak_memory(self.course.clock.device)) is not None:
            speed["peak_memory_gb"] = memory / 1e9
        return {name: float(f"{value:.6g}") for name, value in speed.items()}

    def _write(self, logs: dict[str, float]) -> None:
        if self.first:
            metrics.append(self.folder / metrics.NAME, self.course.step, logs)
            if self.bar:
                self.bar.say(self.state, logs)
        self.handler.on_log(self.args, self.state, self.control, logs)

    def average(self) -> dict[str, float]:
        """Over all iterations but the first, which pays for warming up."""
        return self._speed(self.spent, self.iterations - 1) if self.spent else {}

    def end(self) -> None:
        self.handler.on_train_end(self.args, self.state, self.control)
        if self.profiler:
            self.profiler.close()
        if self.bar:
            self.bar.close()


def every(steps: float, whole: int) -> int:
    """transformers takes a share of all steps as well as their number."""
    return max(1, math.ceil(steps * whole) if steps < 1 else int(steps))
