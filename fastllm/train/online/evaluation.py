"""Evaluation between iterations: the likeliest answers to prompts that are not trained on, and what they are worth."""

from __future__ import annotations

import math

import torch

from fastllm.train.online.conditional import conditioned
from fastllm.train.online.course import Course, random_state, set_random_state
from fastllm.train.online.experience import scored
from fastllm.train.online.prompts import Prompts
from fastllm.train.online.reward import Function
from fastllm.train.online.rollout import sample


@torch.no_grad()
def evaluate(course: Course, prompts: Prompts, call: Function | None, name: str) -> dict[str, float]:
    """Means over all prompts: `eval_reward` and `eval_response_tokens`. Training draws afterwards what it would have drawn without:
    answers are not sampled, and what `call` draws is undone.

    Args:
        call: the function that scores, and its name; None for the reward model.
    """
    before = random_state()
    try:
        return _means(course, prompts, call, name)
    finally:
        set_random_state(before)


def _means(course: Course, prompts: Prompts, call: Function | None, name: str) -> dict[str, float]:
    options, engine, every = course.options, course.engine, prompts.rows
    share = math.ceil(len(every) / course.world)  # of each process, for sharded models run on all of them or on none
    places = range(course.rank * share, (course.rank + 1) * share)
    plain = [every[place % len(every)] for place in places]
    told = torch.tensor([place < len(every) for place in places], device=engine.device)
    asked = [conditioned(course, one, options.score_levels) for one in plain] if course.conditions else plain
    chunk = options.rollout_chunk_size or len(asked)
    rollout = sample(
        engine, course.tokenizer, asked, chunk=chunk, max_new_tokens=options.max_new_tokens, temperature=None
    )
    scores = scored(engine, plain, rollout, call, name, course.tokenizer.pad_token_id, chunk)
    sums = torch.stack([(scores * told).sum(), (rollout.mask.sum(-1) * told).sum(), told.sum()]).double()
    score, tokens, count = engine.sum(sums).tolist()
    return {"eval_reward": score / count, "eval_response_tokens": tokens / count}
