"""What an iteration works with and what it leaves to the next: models, prompts, the state that checkpoints keep, the clock."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
import transformers
from torch import Tensor

from fastllm import rl
from fastllm.errors import ConfigError
from fastllm.train.online.engines import Plain, Zero
from fastllm.train.online.options import OnlineOptions
from fastllm.train.online.prompts import Asked, Prompts, places
from fastllm.train.online.reward import Function, Normaliser
from fastllm.train.online.rollout import Rollout, ends_of
from fastllm.train.online.work import PARTS, Work


class Clock:
    """Seconds of an iteration's parts; each ends when the device is done with it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.spent = device, dict.fromkeys(PARTS, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.spent[name] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        spent, self.spent = self.spent, dict.fromkeys(PARTS, 0.0)
        return spent


class Schedule:
    """transformers' learning-rate schedule, stepped once an iteration, as a factor of every full rate.

    Raises:
        ConfigError: lr_scheduler_kwargs that this schedule does not take.
    """

    def __init__(self, args: Any, steps: int) -> None:
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
        settings = dict(args.lr_scheduler_kwargs or {})
        for key in ("min_lr", "lr_end"):  # given as rates; of an optimizer whose rate is 1 they are shares
            if settings.get(key) is not None:
                settings[key] = settings[key] / (args.learning_rate or 1.0)
        try:
            self.scheduler = transformers.get_scheduler(
                args.lr_scheduler_type, self.optimizer, num_warmup_steps=args.get_warmup_steps(steps), num_training_steps=steps,
                scheduler_specific_kwargs=settings,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
            raise ConfigError(f"lr_scheduler_type {kind}: {' '.join(str(error).split())}") from error

    @property
    def factor(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self) -> None:
        self.optimizer.step()
        self.scheduler.step()


@dataclass
class Course:
    """A run under way. `step` iterations are done; a checkpoint keeps `state_dict` and the engine's."""

    options: OnlineOptions
    engine: Plain | Zero
    tokenizer: Any
    prompts: Prompts
    reward: Function | None
    schedule: Schedule
    micro_batch: int
    rank: int
    world: int
    texts: Any = None  # rows of pretrain_data, for ptx
    step: int = 0
    asked: int = 0  # prompts used, by all processes
    read: int = 0  # texts used, by all processes
    kl: rl.AdaptiveKL | None = None
    normaliser: Normaliser = field(default_factory=Normaliser)
    memory: dict[str, Any] = field(default_factory=dict)  # of stage conditional
    conditions: bool = False  # whether prompts are to have a score in them
    best: tuple[float, int] | None = None  # the highest reward of an evaluation, and the iterations done by then

    def __post_init__(self) -> None:
        self.clock = Clock(torch.device(self.engine.device))
        self.work = Work(self.engine.models)

    def next_prompts(self) -> list[Asked]:
        """This process's share of the next prompts, rollout_batch_size over group_size of them."""
        count = (self.options.rollout_batch_size or 0) // (self.options.group_size or 1)
        found = self.prompts.at(self.asked + self.rank * count, count)
        self.asked += self.world * count
        return found

    @property
    def next_texts(self) -> Callable[[], tuple[Tensor, Tensor, Tensor]] | None:
        """Gives the next micro-batch of texts, in an order of their own in each epoch; None without any."""
        return self._next_texts if self.texts is not None else None

    def _next_texts(self) -> tuple[Tensor, Tensor, Tensor]:
        begin = self.read + self.rank * self.micro_batch
        order = places(len(self.texts), self.prompts.seed, begin, self.micro_batch)
        rows = [self.texts[n]["input_ids"] for n in order]
        self.read += self.world * self.micro_batch
        width, device = max(max(map(len, rows)), 2), self.engine.device
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([list(row) + [pad] * (width - len(row)) for row in rows], device=device)
        attention = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        return ids, attention, attention[:, 1:].bool()

    def set_learning_rates(self, *, actor: bool = True) -> None:
        """Of this iteration, by the schedule; the actor's is 0 while the critic warms up."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["full_lr"] * self.schedule.factor if actor or group["of"] != "actor" else 0.0

    def told(self, rollout: Rollout, scores: Tensor) -> dict[str, float]:
        """Figures of an iteration, over all processes: of its rollout, and of all work since the last."""
        lengths = rollout.mask.sum(-1)
        ended = self._ended(rollout)
        done = self.work.take()
        flops = [*(done[part].model for part in PARTS), sum(one.hardware for one in done.values())]
        sums = torch.stack([
            scores.sum(), scores.square().sum(), lengths.sum(), ended.sum(), rollout.attention.sum(),
            torch.tensor(len(rollout), device=scores.device),
        ]).double()  # fmt: skip
        sums = torch.cat((sums, torch.tensor(flops, dtype=sums.dtype, device=sums.device)))
        score, squares, tokens, finished, every, count, *flops = self.engine.sum(sums).tolist()
        deviation = max(squares / count - (score / count) ** 2, 0.0) ** 0.5
        return {
            "reward": score / count, "reward_std": deviation, "response_tokens": tokens / count, "finished": finished / count,
            "samples": count, "tokens": every, **{f"{name}_flops": n for name, n in zip((*PARTS, "hardware"), flops)},
        }  # fmt: skip

    def _ended(self, rollout: Rollout) -> Tensor:
        """(B,) bool: whether a response ended by itself rather than at max_new_tokens."""
        ends = torch.tensor(ends_of(self.engine.models.actor, self.tokenizer), device=rollout.ids.device)
        return (torch.isin(rollout.ids[:, -rollout.mask.shape[1] :], ends) & rollout.mask).any(-1)

    # ---- what a checkpoint keeps -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is the same on all processes."""
        return {
            "step": self.step, "asked": self.asked, "read": self.read, "schedule": self.schedule.scheduler.state_dict(),
            "factor": self.schedule.factor, "kl": self.kl.state_dict() if self.kl else None,
            "normaliser": self.normaliser.state_dict(), "best": self.best,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.asked, self.read = (state[key] for key in ("step", "asked", "read"))
        self.schedule.scheduler.load_state_dict(state["schedule"])
        self.schedule.optimizer.param_groups[0]["lr"] = state["factor"]
        if self.kl and state["kl"]:
            self.kl.load_state_dict(state["kl"])
        self.normaliser.load_state_dict(state["normaliser"])
        self.best = state.get("best")


def random_state() -> dict[str, Any]:
    """Of every generator that this process draws from."""
    state = {"python": random.getstate(), "torch": torch.get_rng_state()}
    state["numpy"] = numpy.random.get_state()  # noqa: NPY002 - a reward function may draw from it
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
