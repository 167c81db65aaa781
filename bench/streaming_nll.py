"""Ways to read a text that is longer than a model's context, each as the negative log-likelihood of every next token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastllm.ops import token_logprobs
from fastllm.streaming import StreamingCache, token_nll
from fastllm.streaming.step import Step


class _Unturned(Step):
    """Sinks stay where they were in the text, as far from the query as the text is long."""

    def evicted(self, reach: object) -> Tensor:
        return torch.zeros_like(self.positions)


class SinksNotTurned(StreamingCache):
    """What goes wrong: the first tokens are kept, but not moved."""

    step_of = _Unturned


def dense(model: nn.Module, tokens: Tensor, size: int, sinks: int) -> Tensor:
    return token_nll(model, tokens)


def window(model: nn.Module, tokens: Tensor, size: int, sinks: int) -> Tensor:
    return token_nll(model, tokens, cache=StreamingCache(model, 0, size))


def with_sinks(model: nn.Module, tokens: Tensor, size: int, sinks: int) -> Tensor:
    return token_nll(model, tokens, cache=StreamingCache(model, sinks, size - sinks))


def in_int8(model: nn.Module, tokens: Tensor, size: int, sinks: int) -> Tensor:
    return token_nll(model, tokens, cache=StreamingCache(model, sinks, size - sinks, kv_dtype="int8"))


def in_fp8(model: nn.Module, tokens: Tensor, size: int, sinks: int) -> Tensor:
    return token_nll(model, tokens, cache=StreamingCache(model, sinks, size - sinks, kv_dtype="fp8"))


def without_turning(model: nn.Module, tokens: Tensor, size: int, sinks: int) -> Tensor:
    return token_nll(model, tokens, cache=SinksNotTurned(model, sinks, size - sinks))


@torch.no_grad()
def recomputed(model: nn.Module, tokens: Tensor, size: int, sinks: int, *, first: int = 0, batch: int = 64) -> Tensor:
    """The last `size` tokens run anew for every token; with `first` > 0 so many of them are the first of the text."""
    found = []
    for row in tokens:
        head = model(row[None, : min(size, len(row) - 1)], use_cache=False).logits[0]
        of_row = [-token_logprobs(head, row[1 : 1 + len(head)])]
        ends = torch.arange(size + 1, len(row), device=row.device)  # texts of more than `size` tokens
        for some in ends.split(batch):
            back = torch.arange(size - first, device=row.device)
            texts = row[some[:, None] - (size - first) + back]
            if first:
                texts = torch.cat((row[:first].expand(len(some), -1), texts), 1)
            logits = model(texts, use_cache=False, logits_to_keep=1).logits[:, -1]
            of_row.append(-token_logprobs(logits, row[some]))
        found.append(torch.cat(of_row))
    return torch.stack(found)


def recomputed_with_bos(model: nn.Module, tokens: Tensor, size: int, sinks: int) -> Tensor:
    """As ``recomputed``, the text's first token before every window."""
    return recomputed(model, tokens, size, sinks, first=1)


# Name -> nll(model, tokens (B, L), size, sinks) -> (B, L - 1): entry i is of tokens[:, i + 1]. `size` is the number of keys that a
# query sees at most.
WAYS: dict[str, Callable[[nn.Module, Tensor, int, int], Tensor]] = {
    "dense": dense,
    "window": window,
    "sinks": with_sinks,
    "sinks, int8": in_int8,
    "sinks, fp8": in_fp8,
    "sinks, not re-rotated": without_turning,
    "recomputed": recomputed,
    "recomputed with BOS": recomputed_with_bos,
}
