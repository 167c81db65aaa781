"""A run of stage ppo or conditional, from its configuration to its exported model."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from fastllm import rl
from fastllm.errors import ConfigError, FastLLMError
from fastllm.train import checkpoint, models
from fastllm.train import run as common
from fastllm.train.callback import _Bar, _peak_memory
from fastllm.train.config import Options
from fastllm.train.data import prepare
from fastllm.train.encode import Encoder, use_template
from fastllm.train.online import conditional, engines, ppo, reward, state
from fastllm.train.online import models as online_models
from fastllm.train.online.course import PARTS, Course, Schedule
from fastllm.train.online.options import settled
from fastllm.train.online.prompts import Prompts
from fastllm.train.profile import StepProfiler

ITERATIONS: dict[str, Callable[[Course], dict[str, float]]] = {"ppo": ppo.iterate, "conditional": conditional.iterate}


@dataclass(frozen=True)
class Result:
    """What a run came to: mean reward of the first and the last iteration of this process's life, and its averages without the
    first iteration: samples_per_s of each device, step_s and its parts."""

    run: str
    final: str
    steps: int
    first_reward: float | None  # None where a resumed run had made all iterations before
    last_reward: float | None
    throughput: dict[str, float]

    def told(self) -> str:
        if self.first_reward is None or self.last_reward is None:
            return f"{self.steps} iterations, all made before"
        said = [f"{self.steps} iterations, reward {self.first_reward:.4f} at first and {self.last_reward:.4f} at last"]
        if speed := self.throughput:
            parts = ", ".join(f"{name} {speed[f'{name}_s'] / speed['step_s']:.0%}" for name in PARTS)
            said.append(f"{speed['samples_per_s']:.3g} samples per second and device ({parts})")
        return "; ".join(said)


class Run:
    """A run that is ready to go: all that can be wrong with the input has been found by then.

    Raises:
        ConfigError, DataError: what is wrong with the input. CheckpointError: nothing to resume from, or another model's.
    """

    def __init__(self, options: Options) -> None:
        common._quiet()
        args, data = options.arguments, options.data
        self.options, self.args = options, args
        common._resolve_examples(options)
        self.micro_batch = args.per_device_train_batch_size
        asked = settled(options.online, self.micro_batch * args.gradient_accumulation_steps)
        by_function = asked.reward is not None and online_models.is_function(asked.reward)
        call = reward.function(str(asked.reward)) if by_function else None
        transformers.set_seed(args.seed)
        self.tokenizer = models.load_tokenizer(options.model)
        if self.tokenizer.pad_token_id is None:
            raise ConfigError(f"stage {data.stage} needs a tokenizer with a padding or an end-of-sequence token")
        use_template(self.tokenizer, data.chat_template)
        self.resumed = common._checkpoint_to_resume(options)
        encoder = Encoder(self.tokenizer, data.max_length)
        with args.main_process_first(local=True, desc="tokenising"):
            prompts = self._prompts(encoder, asked)
            sets: dict[str, Any] = {"data": prompts}
            if data.pretrain_data:
                sets["pretrain_data"] = prepare(
                    data.pretrain_data, encoder, kind="text", on_bad_row=data.on_bad_row, cache=data.cache_dir, key="pretrain_data"
                )  # fmt: skip
        room = data.max_length - asked.max_new_tokens
        models._tell(f"data: {prompts.report.summed_up(room)}")
        common.say_left_aside(args)
        share = (asked.rollout_batch_size or 0) // (asked.group_size or 1) * args.world_size
        self.steps = (
            args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(prompts.rows) / share)
        )
        if asked.critic_warmup_steps >= self.steps and asked.advantage == "gae":
            raise ConfigError(
                f"critic_warmup_steps ({asked.critic_warmup_steps}) leaves no iteration of {self.steps} to train the policy"
            )
        checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if _checkpoints(args) else None
        transformers.set_seed(args.seed)
        learns_values = data.stage == "ppo" and asked.advantage == "gae"
        whole = online_models.load(
            options.model, self.tokenizer, data.max_length, asked, with_critic=learns_values,
            with_reference=data.stage == "ppo" and bool(asked.kl_coef or asked.kl_loss_coef), checkpointing=checkpointing,
        )  # fmt: skip
        if self.resumed:
            checkpoint.check_same_model(self.resumed, whole.actor)
        common.check_optimizer(args, whole)
        self.folder = self.resumed.parent if self.resumed else common._new_run(options)
        args.output_dir = str(self.folder)
        args.run_name = args.run_name or self.folder.name
        engine = engines.make(whole, args, asked.critic_learning_rate, self.steps)
        self.course = Course(
            asked, engine, self.tokenizer, prompts, call, Schedule(args, self.steps), self.micro_batch, args.process_index,
            args.world_size, texts=sets["pretrain_data"].rows if "pretrain_data" in sets else None,
            kl=rl.AdaptiveKL(asked.kl_coef or 0.0, **asked.adaptive_kl) if asked.adaptive_kl else None,
        )  # fmt: skip
        transformers.set_seed(args.seed + args.process_index)  # processes sample for themselves
        if self.resumed:
            state.load(self.course, self.resumed)
        self.first = args.process_index == 0
        if self.first:
            common._describe(self.folder, options, sets, self.resumed)
            print(f"run folder: {self.folder}", file=sys.stderr)

    def _prompts(self, encoder: Encoder, asked: Any) -> Prompts:
        data = self.options.data
        cache = data.cache_dir or os.environ.get("FASTLLM_CACHE") or "~/.cache/fastllm"
        room = data.max_length - asked.max_new_tokens
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Prompts(
            data.data, encoder, max_length=room, on_bad_row=data.on_bad_row, memory=Path(cache).expanduser(), seed=seed
        )

    def go(self) -> Result:
        """Trains and writes the model.

        Raises:
            DataError: the reward fails. CheckpointError: no room to save. FastLLMError: a loss is not finite.
        """
        course, iterate = self.course, ITERATIONS[self.options.data.stage]
        telling = _Telling(self)
        save_every = _every(self.args.save_steps, self.steps) if self.args.save_strategy != "no" else 0
        while course.step < self.steps:
            telling.begin()
            figures = iterate(course)
            course.step += 1
            course.schedule.step()
            telling.iteration(figures)
            if save_every and (course.step % save_every == 0 or course.step == self.steps):
                state.save(course, self.folder, self.args.save_total_limit, writes=self.first)
        final = state.export(course, self.folder, self.options.model, writes=self.first)
        telling.end()
        first, last = (telling.rewards[0], telling.rewards[-1]) if telling.rewards else (None, None)
        return Result(str(self.folder), str(final), course.step, first, last, telling.average())


def _checkpoints(args: Any) -> bool:
    """transformers 5.23 renamed the key."""
    return bool(getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False))


def _every(steps: float, whole: int) -> int:
    """transformers takes a share of all steps as well as their number."""
    return max(1, math.ceil(steps * whole) if steps < 1 else int(steps))


class _Telling:
    """Figures of iterations: to metrics.jsonl, the progress bar, and what report_to names."""

    def __init__(self, run: Run) -> None:
        self.run, self.course, args = run, run.course, run.args
        self.rewards: list[float] = []
        self.spent = dict.fromkeys((*PARTS, "step", "samples"), 0.0)
        self.iterations = 0
        self.every = _every(args.logging_steps, run.steps)
        self.state = TrainerState(max_steps=run.steps, is_world_process_zero=run.first, is_local_process_zero=run.first)
        self.state.global_step = run.course.step
        reporters = [kind() for kind in get_reporting_integration_callbacks(args.report_to)]
        self.handler = CallbackHandler(reporters, run.course.engine.models.actor, run.tokenizer, None, None)
        self.control = TrainerControl()
        self.handler.on_train_begin(args, self.state, self.control)
        shown = run.first and not run.options.values.get("disable_tqdm")
        self.bar = _Bar(run.steps, run.course.step) if shown else None
        self.profiler: StepProfiler | None = None
        if args.profile:
            self.profiler = StepProfiler(
                run.folder / "profile", run.course.clock.device, rank=args.process_index, first=run.course.step + 1,
                left=run.steps - run.course.step, steps=1, warmup=1, tell=self.bar.tell if self.bar else None,
            )  # fmt: skip

    def begin(self) -> None:
        if self.profiler:
            self.profiler.waiting()  # so that what was told and saved since is no part of the iteration
            self.profiler.working()

    def iteration(self, figures: dict[str, float]) -> None:
        course, world = self.course, self.course.world
        spent = course.clock.take()
        if self.profiler:
            self.profiler.stepped()
        seconds = max(sum(spent.values()), 1e-9)
        samples, tokens = figures.pop("samples"), figures.pop("tokens")
        self.rewards.append(figures["reward"])
        self.state.global_step = course.step
        for name, value in figures.items():
            if not math.isfinite(value):
                raise FastLLMError(
                    f"iteration {course.step}: {name} is {value}; training stops, the last checkpoint is as it was"
                )
        if self.iterations:
            for name, value in (*spent.items(), ("step", seconds), ("samples", samples)):
                self.spent[name] += value
        self.iterations += 1
        speed = {"samples_per_s": samples / seconds / world, "tgs": tokens / seconds / world, "step_s": seconds}
        speed |= {f"{name}_s": value for name, value in spent.items()}
        if (memory := _peak_memory(course.clock.device)) is not None:
            speed["peak_memory_gb"] = memory / 1e9
        logs = figures | {"learning_rate": self.run.args.learning_rate * course.schedule.factor}
        logs |= {name: float(f"{value:.6g}") for name, value in speed.items()}
        if course.step % self.every == 0 or course.step == self.run.steps:
            self._write(logs)
        if self.bar:
            self.bar.move(course.step)

    def _write(self, logs: dict[str, float]) -> None:
        if self.run.first:
            with (self.run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.course.step, **logs}) + "\n")
            if self.bar:
                self.bar.say(self.state, logs)
        self.handler.on_log(self.run.args, self.state, self.control, logs)

    def average(self) -> dict[str, float]:
        """Over all iterations but the first, which pays for warming up."""
        count = self.iterations - 1
        if count < 1:
            return {}
        seconds, world = self.spent["step"], self.course.world
        parts = {f"{name}_s": self.spent[name] / count for name in (*PARTS, "step")}
        return {"samples_per_s": self.spent["samples"] / seconds / world, **parts}

    def end(self) -> None:
        self.handler.on_train_end(self.run.args, self.state, self.control)
        if self.profiler:
            self.profiler.close()
        if self.bar:
            self.bar.close()
