"""A run of stage ppo or conditional, from its configuration to its exported model."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from fastllm import rl
from fastllm.errors import ConfigError
from fastllm.train import checkpoint, folder, lock, models, together
from fastllm.train.config import Options
from fastllm.train.data import prepare
from fastllm.train.encode import Encoder, use_template
from fastllm.train.examples import resolve_in
from fastllm.train.online import conditional, engines, ppo, reward, state
from fastllm.train.online import models as online_models
from fastllm.train.online.course import Course, Schedule
from fastllm.train.online.evaluation import evaluate
from fastllm.train.online.options import settled
from fastllm.train.online.prompts import Prompts
from fastllm.train.online.telling import Telling, every
from fastllm.train.online.work import PARTS
from fastllm.train.run import check_optimizer, gone_if_it_fails, say_left_aside

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
    best_eval_reward: float | None
    throughput: dict[str, float]

    def told(self) -> str:
        if self.first_reward is None or self.last_reward is None:
            return f"{self.steps} iterations, all made before"
        said = [f"{self.steps} iterations, reward {self.first_reward:.4f} at first and {self.last_reward:.4f} at last"]
        if self.best_eval_reward is not None:
            said.append(f"best validation reward {self.best_eval_reward:.4f}")
        if speed := self.throughput:
            parts = ", ".join(f"{name} {speed[f'{name}_s'] / speed['step_s']:.0%}" for name in PARTS)
            said.append(
                f"{speed['samples_per_s']:.3g} samples per second and device ({parts}), {speed['tflops']:.3g} TFLOPS"
            )
        return "; ".join(said)


class Run:
    """A run that is ready to go: all that can be wrong with the input has been found by then.

    Raises:
        ConfigError, DataError: what is wrong with the input. CheckpointError: nothing to resume from, or another model's.
    """

    def __init__(self, options: Options) -> None:
        args, data = options.arguments, options.data
        self.options, self.args = options, args
        folder.check_settings(options)
        resolve_in(options)
        self.micro_batch = args.per_device_train_batch_size
        asked = settled(options.online, self.micro_batch * args.gradient_accumulation_steps)
        by_function = asked.reward is not None and online_models.is_function(asked.reward)
        call = reward.function(str(asked.reward)) if by_function else None
        self.judge = (call, str(asked.reward))  # of evaluations
        if asked.eval_reward:
            self.judge = (reward.function(asked.eval_reward, "eval_reward"), asked.eval_reward)
        transformers.set_seed(args.seed)
        self.tokenizer = models.load_tokenizer(options.model)
        if self.tokenizer.pad_token_id is None:
            raise ConfigError(f"stage {data.stage} needs a tokenizer with a padding or an end-of-sequence token")
        use_template(self.tokenizer, data.chat_template)
        self.resumed = folder.checkpoint_to_resume(options)
        encoder = Encoder(self.tokenizer, data.max_length)
        with args.main_process_first(local=True, desc="tokenising"):
            prompts = self._prompts(encoder, asked, "data")
            sets: dict[str, Any] = {"data": prompts}
            if data.eval_data:
                sets["eval_data"] = self._prompts(encoder, asked, "eval_data")
            if data.pretrain_data:
                sets["pretrain_data"] = prepare(
                    data.pretrain_data, encoder, kind="text", on_bad_row=data.on_bad_row, cache=data.cache_dir, key="pretrain_data"
                )  # fmt: skip
        room = data.max_length - asked.max_new_tokens
        models.say(f"data: {prompts.report.summed_up(room)}")
        say_left_aside(args)
        share = (asked.rollout_batch_size or 0) // (asked.group_size or 1) * args.world_size
        self.steps = (
            args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * len(prompts.rows) / share)
        )
        if asked.critic_warmup_steps >= self.steps and asked.advantage == "gae":
            raise ConfigError(
                f"critic_warmup_steps ({asked.critic_warmup_steps}) leaves no iteration of {self.steps} to train the policy"
            )
        schedule = Schedule(args, self.steps)
        checkpointing = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if _checkpoints(args) else None
        transformers.set_seed(args.seed)
        learns_values = data.stage == "ppo" and asked.advantage == "gae"
        whole = online_models.load(
            options.model, self.tokenizer, data.max_length, asked, with_critic=learns_values,
            with_reference=data.stage == "ppo" and bool(asked.kl_coef or asked.kl_loss_coef), checkpointing=checkpointing,
        )  # fmt: skip
        if resumed := self.resumed:
            together.agree(lambda: checkpoint.check_same_model(resumed, whole.actor), here=args.process_index == 0)
        check_optimizer(args, whole)
        folder.check_course(options, sets)
        self.folder = self.resumed.parent if self.resumed else folder.new(options)
        args.output_dir = str(self.folder)
        args.run_name = args.run_name or self.folder.name
        with gone_if_it_fails(self.folder, new=not self.resumed):
            engine = engines.make(whole, args, asked.critic_learning_rate, self.steps)
        self.course = Course(
            asked, engine, self.tokenizer, prompts, call, schedule, self.micro_batch, args.process_index, args.world_size,
            texts=sets["pretrain_data"].rows if "pretrain_data" in sets else None,
            kl=rl.AdaptiveKL(asked.kl_coef or 0.0, **asked.adaptive_kl) if asked.adaptive_kl else None,
            conditions=data.stage == "conditional",
        )  # fmt: skip
        transformers.set_seed(args.seed + args.process_index)  # processes sample for themselves
        if self.resumed:
            state.load(self.course, self.resumed)
        if args.should_save:
            folder.describe(self.folder, options, sets, self.resumed)
        self.eval_prompts: Prompts | None = sets.get("eval_data")
        self.first = args.process_index == 0
        if self.first:
            print(f"run folder: {self.folder}", file=sys.stderr)

    def _prompts(self, encoder: Encoder, asked: Any, key: str) -> Prompts:
        data = self.options.data
        cache = data.cache_dir or os.environ.get("FASTLLM_CACHE") or "~/.cache/fastllm"
        room = data.max_length - asked.max_new_tokens
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return Prompts(
            getattr(data, key), encoder, max_length=room, on_bad_row=data.on_bad_row, memory=Path(cache).expanduser(), seed=seed,
            key=key,
        )  # fmt: skip

    def go(self) -> Result:
        """Trains and writes the model.

        Raises:
            DataError: the reward fails. CheckpointError: no room to save. FastLLMError: a loss is not finite.
        """
        try:
            return self._go()
        finally:
            lock.release(self.folder)

    def _go(self) -> Result:
        course, args, iterate = self.course, self.args, ITERATIONS[self.options.data.stage]
        bar = not self.options.values.get("disable_tqdm")
        telling = Telling(course, self.folder, args, self.tokenizer, self.steps, first=self.first, bar=bar)
        save_every = every(args.save_steps, self.steps) if args.save_strategy != "no" else 0
        eval_every = every(args.eval_steps or 0, self.steps) if self.eval_prompts else 0
        if eval_every and args.eval_on_start and not course.step:
            self._evaluated(telling)
        while course.step < self.steps:
            telling.begin()
            figures = iterate(course)
            course.step += 1
            course.schedule.step()
            telling.iteration(figures)
            last = course.step == self.steps
            better = eval_every and (course.step % eval_every == 0 or last) and self._evaluated(telling)
            if save_every and (course.step % save_every == 0 or last or better):
                state.save(course, self.folder, args.save_total_limit, writes=args.should_save)
        final = state.export(course, self.folder, self.options.model, writes=args.should_save)
        telling.end()
        first, final_reward = (telling.rewards[0], telling.rewards[-1]) if telling.rewards else (None, None)
        return Result(
            str(self.folder), str(final), course.step, first, final_reward,
            course.best[0] if course.best else None, telling.average(),
        )  # fmt: skip

    def _evaluated(self, telling: Telling) -> bool:
        """Whether the model is better than at all evaluations before; before the first iteration it is not asked."""
        assert self.eval_prompts is not None
        course = self.course
        figures = evaluate(course, self.eval_prompts, *self.judge)
        telling.evaluation(figures)
        better = course.step > 0 and (course.best is None or figures["eval_reward"] > course.best[0])
        if better:
            course.best = (figures["eval_reward"], course.step)
        return better


def _checkpoints(args: Any) -> bool:
    """transformers 5.23 renamed the key."""
    return bool(getattr(args, "activation_checkpointing", False) or getattr(args, "gradient_checkpointing", False))
