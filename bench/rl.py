"""``python -m bench rl``: advantages and the policy loss, at the sizes of a rollout; and that loss from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import eager, peers, suite
from bench.case import BOTH, FORWARD, Case
from fastllm import ops, rl

ROWS, TOKENS, CHANNELS, VOCABULARY = 8, 512, 1024, 32000
VALUE_COEF, ENTROPY_COEF, KL_COEF = 0.1, 0.01, 0.05


def _rollout(rows: int, tokens: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    return lambda dtype: tuple(torch.randn(rows, tokens).to(dtype) for _ in range(2))


def _update(rows: int, tokens: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """Log-probabilities new, old and of the reference, advantages, values new and old, returns, entropy, mask: a second
    pass over the rollout, where policy and values have moved; answers of one to `tokens` tokens."""

    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        logprobs, values = -2 * torch.rand(rows, tokens), torch.randn(rows, tokens)
        near = [x + 0.2 * torch.randn(rows, tokens) for x in (logprobs, logprobs, values)]
        advantages, returns, entropy = torch.randn(rows, tokens), torch.randn(rows, tokens), torch.rand(rows, tokens)
        mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1))
        given = (logprobs, near[0], near[1], advantages, values, near[2], returns, entropy)
        return (*(x.to(dtype) for x in given), mask)

    return inputs


def _hidden(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states, head, tokens, their old log-probabilities, advantages of the sequences, mask. Ratios keep away from where
    they are clipped: a token that rounding takes across is no error of the loss."""
    hidden = torch.randn(ROWS, TOKENS, CHANNELS).to(dtype)
    weight = (torch.randn(VOCABULARY, CHANNELS) * (4 / CHANNELS) ** 0.5).to(dtype)
    tokens, mask = torch.randint(VOCABULARY, (ROWS, TOKENS)), torch.ones(ROWS, TOKENS, dtype=torch.bool)
    with torch.no_grad():
        new = [ops.linear_token_logprobs(row, weight, each) for row, each in zip(hidden, tokens)]
    steps = torch.tensor([-0.6, -0.08, 0.08, 0.5])[torch.randint(4, (ROWS, TOKENS))]
    return hidden, weight, tokens, torch.stack(new) - steps, torch.randn(ROWS), mask


def _pairs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Hidden states and head of the policy, tokens, mask of answers of any length, and hidden states and head of a reference."""
    hidden, near = (torch.randn(ROWS, TOKENS, CHANNELS) for _ in range(2))
    weight = torch.randn(VOCABULARY, CHANNELS) * (4 / CHANNELS) ** 0.5
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS))
    mask = torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (ROWS, 1))
    return hidden.to(dtype), weight.to(dtype), tokens, mask, (hidden + 0.01 * near).to(dtype), weight.to(dtype)


def _dpo(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor, ref_hidden: Tensor, ref_weight: Tensor
) -> Tensor:
    with torch.no_grad():
        reference, _ = rl.linear_sequence_logprobs(ref_hidden, ref_weight, tokens, mask)
    return rl.linear_dpo_loss(hidden, weight, tokens, mask, *reference.chunk(2)).loss


def _linear(*arguments: Tensor) -> Tensor:
    return rl.linear_ppo_loss(*arguments).loss


def _ours(
    logprobs: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, values: Tensor, old_values: Tensor, returns: Tensor,
    entropy: Tensor, mask: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    found = rl.ppo_loss(
        logprobs, old, advantages, mask, values=values, old_values=old_values, returns=returns, value_coef=VALUE_COEF,
        entropy=entropy, entropy_coef=ENTROPY_COEF, ref_logprobs=ref, kl_coef=KL_COEF,
    )  # fmt: skip
    return found.loss, *(found.stats[name] for name in eager.PPO_STATS)


def _eager(*arguments: Tensor) -> tuple[Tensor, ...]:
    return eager.ppo_loss(*arguments, VALUE_COEF, ENTROPY_COEF, KL_COEF)  # type: ignore[arg-type]


CASES = [
    *(
        Case(
            "gae", f"{rows}x{tokens}", _rollout(rows, tokens), ops.gae, eager.gae, eager.gae, dtypes=(torch.float32,),
            passes=(FORWARD,), uncompiled="the loop over tokens unrolls into as many steps",
        )
        for rows, tokens in ((64, 1024), (8, 256))
    ),
    Case(
        "ppo_loss", "64x2048 with statistics", _update(64, 2048), _ours, _eager, _eager, dtypes=(torch.float32,),
        passes=(BOTH,), constants=(1, 2, 3, 5, 6),
    ),
    Case(
        "linear_ppo_loss", f"{ROWS * TOKENS}x{CHANNELS}x{VOCABULARY}", _hidden, _linear, eager.linear_ppo_loss,
        eager.exact_linear_ppo_loss, {"liger": peers.liger_grpo}, dtypes=(torch.bfloat16,), passes=(BOTH,),
        constants=(3, 4), flops=2 * ROWS * TOKENS * CHANNELS * VOCABULARY,
    ),
    Case(
        "linear_dpo_loss", f"{ROWS * TOKENS}x{CHANNELS}x{VOCABULARY} with reference", _pairs, _dpo, eager.linear_dpo_loss,
        eager.exact_linear_dpo_loss, {"liger": peers.liger_dpo}, dtypes=(torch.bfloat16,), passes=(BOTH,),
        constants=(4, 5), flops=4 * ROWS * TOKENS * CHANNELS * VOCABULARY,
    ),
]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    return suite.main("rl", CASES, arguments)
