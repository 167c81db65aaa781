"""Stage conditional: responses are scored, the model is tuned with the score in the prompt, then asked for a high one.

Return-conditioned behaviour cloning: Chen et al., Decision Transformer (arXiv 2106.01345); with quantiles of scores, and samples of
the model's own round by round, Lu et al., Quark (arXiv 2205.13636).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm.train.online.course import Course
from fastllm.train.online.experience import scored
from fastllm.train.online.prompts import Asked, messages_of
from fastllm.train.online.rollout import Rollout, padded, sample


@dataclass(frozen=True)
class Told:
    """A response that was scored: the row of its prompt, its tokens and its score."""

    row: dict[str, Any]
    tokens: list[int]
    score: float


def iterate(course: Course) -> dict[str, float]:
    """One iteration: ask for the highest score, see what came of it, learn from all recent responses what scores what."""
    options, engine, clock = course.options, course.engine, course.clock

    with clock.part("rollout"):
        plain = course.next_prompts()
        asked = [conditioned(course, one, options.score_levels) for one in plain]
        rollout = sample(
            engine, course.tokenizer, asked, chunk=options.rollout_chunk_size or len(asked),
            max_new_tokens=options.max_new_tokens, temperature=options.temperature,
        )  # fmt: skip
        course.work.sampled(rollout.lengths)
    with clock.part("score"):
        chunk = options.rollout_chunk_size or len(plain)
        pad, name = course.tokenizer.pad_token_id, str(options.reward)
        scores = scored(engine, plain, rollout, course.reward, name, pad, chunk)
        course.work.scored([len(one.ids) + n for one, (_, n) in zip(plain, rollout.lengths)])
        pool = remembered(course, plain, rollout, scores)
    with clock.part("train"):
        course.set_learning_rates()
        stats = imitate(course, pool)

    return course.told(rollout, scores) | stats


def conditioned(course: Course, one: Asked, level: int) -> Asked:
    """The prompt with ``Score: LEVEL of LEVELS`` after its last message's text."""
    *before, last = messages_of(one.row)
    message = {**last, "content": f"{last['content']}\n\nScore: {level} of {course.options.score_levels}"}
    return replace(one, ids=course.prompts.encode([*before, message])[-course.prompts.max_length :])


def remembered(course: Course, plain: list[Asked], rollout: Rollout, scores: Tensor) -> list[Told]:
    """The responses of the last pool_iterations iterations, these included."""
    fresh = [Told(p.row, t, s) for p, t, s in zip(plain, rollout.responses, scores.tolist())]
    rounds = [*course.memory.get("rounds", []), [(told.row, told.tokens, told.score) for told in fresh]]
    course.memory["rounds"] = rounds[-course.options.pool_iterations :]
    return [Told(*told) for one in course.memory["rounds"] for told in one]


def imitate(course: Course, pool: list[Told]) -> dict[str, float]:
    """One pass over the pool: cross entropy of every response after its prompt with the level of its score."""
    engine, levels = course.engine, course.options.score_levels
    known = _everywhere(course, torch.tensor([told.score for told in pool], device=engine.device))
    engine.models.train()
    losses, norms = [], []
    mini = course.micro_batch * engine.accumulation
    for chosen in torch.randperm(len(pool))[: len(pool) // mini * mini].split(mini):
        batches = [
            _batch(course, [(pool[n], level_of(pool[n].score, known, levels)) for n in micro.tolist()])
            for micro in chosen.split(course.micro_batch)
        ]
        items = engine.sum(torch.stack([mask.sum() for (*_, mask), _ in batches]).sum().float())
        for n, (batch, _) in enumerate(batches):
            with engine.micro_batch(last=n == engine.accumulation - 1):
                loss = engine("text_loss", *batch, items)
                engine.backward(loss)
            losses.append(loss.detach().float())
        course.work.learnt([lengths for _, of_batch in batches for lengths in of_batch])
        norms.append(engine.step())
    loss = engine.sum(torch.stack(losses).sum()).item() / len(norms)
    top = (known >= known.quantile(1 - 1 / levels)).float().mean().item()
    return {"loss": loss, "grad_norm": sum(norms) / len(norms), "updates": float(len(norms)), "top_share": top}


def level_of(score: float, known: Tensor, levels: int) -> int:
    """1 to levels: how many of `levels` equal parts of the known scores lie at this score or below it."""
    at_most = int((known <= score).sum())
    return max(1, -(-at_most * levels // len(known)))


def _batch(course: Course, told: list[tuple[Told, int]]) -> tuple[tuple[Tensor, Tensor, Tensor], list[tuple[int, int]]]:
    """ids and attention (B, P + T) with prompts padded on the left and responses on the right, and the mask (B, T); and the lengths
    of rows and responses."""
    pad, device = course.tokenizer.pad_token_id, course.engine.device
    prompts = [conditioned(course, Asked([], "", one.row), level).ids for one, level in told]
    ids, attention = padded(prompts, pad, device)
    width = max(len(one.tokens) for one, _ in told)
    after = torch.tensor([one.tokens + [pad] * (width - len(one.tokens)) for one, _ in told], device=device)
    mask = torch.tensor(
        [[True] * len(one.tokens) + [False] * (width - len(one.tokens)) for one, _ in told], device=device
    )
    lengths = [(len(prompt) + len(one.tokens), len(one.tokens)) for prompt, (one, _) in zip(prompts, told)]
    return (torch.cat((ids, after), 1), torch.cat((attention, mask.long()), 1), mask), lengths


def _everywhere(course: Course, x: Tensor) -> Tensor:
    """The tensors of all processes, which are of one length, as one."""
    if course.world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(course.world)]
    dist.all_gather(parts, x)
    return torch.cat(parts)
