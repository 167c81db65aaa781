"""FLOPs of an iteration of this process: what sampling, scoring and learning ask of the models, padding left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastllm.train.online.models import Models
from fastllm.train.throughput import StepFlops, forward_flops, step_flops

PARTS = ("rollout", "score", "train")
Lengths = Sequence[tuple[int, int]]  # of each row: its tokens, prompt and response, and those of the response


class Work:
    """Counts by the formulas of ``fastllm.train.throughput``; an LM head works for the tokens of responses alone."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.done = dict.fromkeys(PARTS, StepFlops(0.0, 0.0))

    def sampled(self, rows: Lengths) -> None:
        """Responses sampled with a cache: every token but the last goes through the actor once."""
        answered = sum(n for _, n in rows)
        self._add("rollout", forward_flops(self.models.actor, [n - 1 for n, _ in rows], logits=answered))

    def judged(self, rows: Lengths) -> None:
        """``Models.judge`` of the responses."""
        models, lengths, answered = self.models, [n for n, _ in rows], sum(n for _, n in rows)
        flops = forward_flops(models.actor, lengths, logits=answered)
        if models.reference is not None:
            flops += forward_flops(models.reference, lengths, logits=answered)
        elif models.without_adapters:
            flops += forward_flops(models.actor, lengths, logits=answered, adapters=False)
        if models.critic is not None:
            flops += forward_flops(models.critic, lengths)
        self._add("score", flops)
        self.scored(lengths)

    def scored(self, lengths: Sequence[int]) -> None:
        """By the reward model, if there is one."""
        if self.models.reward is not None:
            self._add("score", forward_flops(self.models.reward, lengths))

    def learnt(self, rows: Lengths, *, actor: bool = True) -> None:
        """Forward and backward, of the critic too where there is one; without `actor` of the critic alone."""
        lengths, answered = [n for n, _ in rows], sum(n for _, n in rows)
        if actor:
            self._add("train", step_flops(self.models.actor, lengths, logits=answered))
        if self.models.critic is not None:
            self._add("train", step_flops(self.models.critic, lengths))

    def read(self, lengths: Sequence[int], *, learnt: bool = True) -> None:
        """Texts learnt from by the actor, every token of them; or their forward pass alone."""
        self._add("train", (step_flops if learnt else forward_flops)(self.models.actor, lengths))

    def looked(self, rows: Lengths) -> None:
        """The forward pass of a micro-batch that was not learnt from, because the policy had moved too far."""
        lengths, answered = [n for n, _ in rows], sum(n for _, n in rows)
        self._add("train", forward_flops(self.models.actor, lengths, logits=answered))
        if self.models.critic is not None:
            self._add("train", forward_flops(self.models.critic, lengths))

    def _add(self, part: str, flops: Any) -> None:
        more = flops if isinstance(flops, StepFlops) else StepFlops(flops, flops)
        before = self.done[part]
        self.done[part] = StepFlops(before.model + more.model, before.hardware + more.hardware)

    def take(self) -> dict[str, StepFlops]:
        """What was done since the last call."""
        done, self.done = self.done, dict.fromkeys(PARTS, StepFlops(0.0, 0.0))
        return done
