"""``python -m bench loss``: losses over a vocabulary of 32000, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bench import eager, peers, suite
from bench.case import BOTH, FORWARD, Case
from fastllm import ops

TOKENS, VOCABULARY = 2048, 32000


def _logits(dtype: torch.dtype) -> tuple[Any, ...]:
    return (2 * torch.randn(TOKENS, VOCABULARY)).to(dtype), torch.randint(VOCABULARY, (TOKENS,))


def _hidden(channels: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    return lambda dtype: (
        torch.randn(TOKENS, channels).to(dtype),
        (torch.randn(VOCABULARY, channels) * (4 / channels) ** 0.5).to(dtype),
        torch.randint(VOCABULARY, (TOKENS,)),
    )


CROSS_ENTROPY = Case(
    "cross_entropy", "2048x32000", _logits, ops.cross_entropy, eager.cross_entropy, F.cross_entropy,
    peers.liger("liger_cross_entropy", lambda f, logits, target: f(logits, target))
    | peers.flash_attn("cross_entropy:cross_entropy_loss", lambda f, logits, target: f(logits, target)[0].mean()),
)  # fmt: skip
CASES = [
    CROSS_ENTROPY,
    Case(
        "token_logprobs", "2048x32000 with entropy", _logits,
        lambda logits, target: ops.token_logprobs(logits, target, with_entropy=True),
        eager.token_logprobs, eager.exact_token_logprobs,
    ),
    *(
        Case(
            "linear_cross_entropy", f"2048x{channels}x32000", _hidden(channels), ops.linear_cross_entropy,
            eager.linear_cross_entropy, eager.exact_linear_cross_entropy,
            {"torch chunked": peers.torch_chunked_loss}
            | peers.liger("liger_fused_linear_cross_entropy", lambda f, hidden, w, target: f(hidden, w, target)),
            dtypes=dtypes, passes=(BOTH,), flops=2 * TOKENS * channels * VOCABULARY,
        )
        for channels, dtypes in ((768, (torch.float32, torch.bfloat16)), (2048, (torch.bfloat16,)))
    ),
    Case(
        "linear_token_logprobs", "2048x768x32000 with entropy", _hidden(768),
        lambda hidden, weight, target: ops.linear_token_logprobs(hidden, weight, target, with_entropy=True),
        eager.linear_token_logprobs, eager.exact_linear_token_logprobs,
        dtypes=(torch.bfloat16,), passes=(FORWARD, BOTH), flops=2 * TOKENS * 768 * VOCABULARY,
    ),
]  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    return suite.main("loss", CASES, arguments)
