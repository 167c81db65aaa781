"""Scoring: what responses are worth, how far the policy is from the reference, and the advantages that follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastllm import ops, rl
from fastllm.train.online import reward
from fastllm.train.online.engines import Plain, Zero
from fastllm.train.online.models import Opinions
from fastllm.train.online.options import OnlineOptions
from fastllm.train.online.prompts import Asked
from fastllm.train.online.reward import Normaliser
from fastllm.train.online.rollout import Rollout, padded


@dataclass(frozen=True)
class Experience:
    """What the updates of an iteration learn from: (B, T) for tokens of `rollout`; values, returns and ref_logprobs None where
    there is no critic or reference. scores (B,) are as the reward gave them; kl is that to the reference, the mean over all
    processes' responses in nats a response."""

    rollout: Rollout
    logprobs: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    scores: Tensor
    kl: float | None


@torch.no_grad()
def judged(
    engine: Plain | Zero, rollout: Rollout, options: OnlineOptions, call: reward.Function | None, normaliser: Normaliser, kl_coef: float
) -> Experience:  # fmt: skip
    """Asks reward, policy, reference and critic about the responses, and makes advantages of the answers.

    Args:
        call: the reward function; None where a reward model is among the engine's models.
        kl_coef: of the penalty in the rewards, as it stands now.
    """
    found = opinions(engine, rollout, options.rollout_chunk_size or len(rollout))
    scores = scores_of(rollout, options, call, found)
    shaped = normaliser(scores, engine.sum) if options.normalize_rewards else scores
    mask, reference = rollout.mask, found.logprobs if found.ref_logprobs is None else found.ref_logprobs
    rewards, _ = rl.token_rewards(
        shaped,
        found.logprobs,
        reference,
        mask,
        kl_coef=kl_coef,
        estimator=options.kl_estimator,
        clip=options.reward_clip,
    )
    returns = None
    if found.values is None:
        compared = rl.group_advantages(
            rewards.sum(-1), options.group_size or 1, kind=options.advantage, distributed=True
        )
        advantages = compared.unsqueeze(-1).expand(mask.shape)
    else:
        advantages, returns = ops.gae(rewards, found.values, gamma=options.gamma, lam=options.lam, mask=mask)
        if options.whiten_advantages:
            advantages = rl.whiten(advantages, mask, distributed=True)
    return Experience(
        rollout, found.logprobs, found.ref_logprobs, found.values, advantages, returns, scores,
        None if found.ref_logprobs is None else mean_kl(engine, found.logprobs, reference, mask),
    )  # fmt: skip


@torch.no_grad()
def opinions(engine: Plain | Zero, rollout: Rollout, chunk: int) -> Opinions:
    """`Models.judge` of all responses, a chunk at a time, each without the padding that it does not need."""
    engine.models.eval()
    shape = rollout.mask.shape
    whole: dict[str, Tensor] = {}
    for index in torch.arange(len(rollout), device=rollout.ids.device).split(chunk):
        ids, attention, mask, kept = rollout.rows(index)
        for name, part in engine("judge", ids, attention, mask)._asdict().items():
            if part is None:
                continue
            if name not in whole:
                whole[name] = torch.zeros(shape[: part.dim()], device=part.device)
            whole[name][(index, kept) if part.dim() == 2 else index] = part.float()
    return Opinions(*(whole.get(name) for name in Opinions._fields))  # type: ignore[arg-type]


def scores_of(rollout: Rollout, options: OnlineOptions, call: reward.Function | None, found: Opinions) -> Tensor:
    """(B,) float32: the reward function's numbers, or the reward model's."""
    if call is None:
        assert found.scores is not None
        return found.scores
    prompts, rows = [one.text for one in rollout.asked], [one.row for one in rollout.asked]
    return reward.ask(call, str(options.reward), prompts, rollout.texts, rows).to(rollout.mask.device)


@torch.no_grad()
def scored(
    engine: Plain | Zero, plain: list[Asked], rollout: Rollout, call: reward.Function | None, name: str, pad: int, chunk: int
) -> Tensor:  # fmt: skip
    """(B,) what the reward, or its model where `call` is None, says of the responses to the prompts as they stand in `plain`."""
    if call is not None:
        prompts, rows = [one.text for one in plain], [one.row for one in plain]
        return reward.ask(call, name, prompts, rollout.texts, rows).to(engine.device)
    whole = [one.ids + tokens for one, tokens in zip(plain, rollout.responses)]
    parts = [whole[begin : begin + chunk] for begin in range(0, len(whole), chunk)]
    return torch.cat([engine("score", *padded(rows, pad, engine.device)) for rows in parts]).float()


def mean_kl(engine: Plain | Zero, logprobs: Tensor, reference: Tensor, mask: Tensor) -> float:
    summed = (logprobs - reference).masked_fill(~mask, 0.0).sum()
    total, count = engine.sum(torch.stack([summed, summed.new_tensor(len(mask))])).tolist()
    return total / count
