"""Sampling: prompts, padded on the left to one length, and what the policy answers, chunk by chunk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor

from fastllm.train.online.engines import Plain, Zero
from fastllm.train.online.prompts import Asked


@dataclass(frozen=True)
class Rollout:
    """Sampled responses. ids and attention (B, P + T): prompts padded on the left to P tokens, responses on the right to T; mask
    (B, T) bool: tokens of the response, its end-of-sequence token included. texts (B,): the responses, special tokens left out."""

    asked: list[Asked]
    ids: Tensor
    attention: Tensor
    mask: Tensor
    texts: list[str]

    def __len__(self) -> int:
        return len(self.mask)

    @cached_property
    def responses(self) -> list[list[int]]:
        """The tokens of each response."""
        answers = self.ids[:, -self.mask.shape[1] :]
        return [row[kept].tolist() for row, kept in zip(answers, self.mask)]

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """Of each row the tokens of prompt and response, and those of the response."""
        both = torch.stack((self.attention.sum(-1), self.mask.sum(-1)), -1)
        return [(whole, answered) for whole, answered in both.tolist()]

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor, slice]:
        """ids, attention and mask of some rows without the columns that are padding in all of them, and those kept of T."""
        ids, attention, mask = self.ids[index], self.attention[index], self.mask[index]
        prompt = ids.shape[1] - mask.shape[1]
        first = int(attention.any(0).int().argmax())
        length = max(1, int(mask.any(0).sum()))
        kept = slice(first, prompt + length)
        return ids[:, kept], attention[:, kept], mask[:, :length], slice(0, length)


@torch.no_grad()
def sample(
    engine: Plain | Zero,
    tokenizer: Any,
    asked: list[Asked],
    *,
    chunk: int,
    max_new_tokens: int,
    temperature: float | None,
) -> Rollout:
    """A response to every prompt, sampled from the actor, `chunk` of them at a time; with temperature None the likeliest token each
    time. Weights are gathered once for all."""
    actor = engine.models.actor
    pad, ends = tokenizer.pad_token_id, ends_of(actor, tokenizer)
    drawn: dict[str, Any] = {} if temperature is None else {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    how = transformers.GenerationConfig(
        do_sample=temperature is not None, **drawn, repetition_penalty=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=ends, pad_token_id=pad, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    engine.models.eval()
    parts = []
    with engine.whole(), _its_own_settings_aside(actor):
        for begin in range(0, len(asked), chunk):
            ids, attention = padded([one.ids for one in asked[begin : begin + chunk]], pad, engine.device)
            found = actor.generate(
                input_ids=ids, attention_mask=attention, generation_config=how, synced_gpus=False, use_cache=True
            )
            parts.append((ids, attention, found[:, ids.shape[1] :]))
    return _joined(asked, parts, pad, ends, tokenizer)


@contextlib.contextmanager
def _its_own_settings_aside(actor: Any) -> Iterator[None]:
    """generate() fills what a configuration leaves open with the model's own settings (min_p, no_repeat_ngram_size, ...): tokens would
    then come from another distribution than the log-probabilities say."""
    models = [actor, actor.get_base_model()] if hasattr(actor, "peft_config") else [actor]
    kept = [model.generation_config for model in models]
    for model in models:
        model.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        for model, settings in zip(models, kept):
            model.generation_config = settings


def ends_of(actor: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a response: the tokenizer's and those that the model's own generation settings name."""
    named = getattr(getattr(actor, "generation_config", None), "eos_token_id", None)
    named = named if isinstance(named, list) else [named]
    return sorted({n for n in (*named, tokenizer.eos_token_id) if n is not None})


def padded(rows: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """ids and attention mask (B, longest), padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], device=device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, attention


def response_mask(tokens: Tensor, ends: list[int]) -> Tensor:
    """(B, T) bool, True up to the first token of `ends` and at it."""
    over = torch.isin(tokens, torch.tensor(ends, device=tokens.device, dtype=tokens.dtype))
    return over.long().cumsum(-1) - over.long() == 0


def _joined(asked: list[Asked], parts: list[Any], pad: int, ends: list[int], tokenizer: Any) -> Rollout:
    prompt = max(ids.shape[1] for ids, _, _ in parts)
    length = max(found.shape[1] for _, _, found in parts)
    ids, attention, masks = [], [], []
    for asked_ids, seen, found in parts:
        mask = response_mask(found, ends)
        found = found.masked_fill(~mask, pad)
        before, after = prompt - asked_ids.shape[1], length - found.shape[1]
        grow = torch.nn.functional.pad
        ids.append(torch.cat((grow(asked_ids, (before, 0), value=pad), grow(found, (0, after), value=pad)), 1))
        attention.append(torch.cat((grow(seen, (before, 0)), grow(mask.long(), (0, after))), 1))
        masks.append(grow(mask, (0, after)))
    whole, mask = torch.cat(ids), torch.cat(masks)
    answers = [row[kept].tolist() for row, kept in zip(whole[:, prompt:], mask)]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return Rollout(asked, whole, torch.cat(attention), mask, texts)
