"""Byte-level Llamas of 0.84 M parameters, trained in minutes on two cores, and rows of text and of facts to try them on.

The text is the Python standard library's own source. Every twelfth module is held out; nothing of it is trained on. Rows of
facts hold keys with values among the text, and ask for the values later: perplexity alone does not show whether a model still
finds what it read.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn

import fastllm

Batch = tuple[Tensor, Tensor]  # tokens and labels
CONTEXT, BATCH, BOS, VOCABULARY = 128, 16, 256, 257
LEARNING_RATE, WARM_UP = 3e-3, 50
FACT = 4  # bytes of a fact, its value at the end


def build(seed: int, hidden: int = 128, layers: int = 4) -> nn.Module:
    """Heads of 32. The defaults are the 0.84 M parameters."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers,
            num_attention_heads=hidden // 32, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=BOS,
            eos_token_id=None,
        )
    )  # fmt: skip


def train(
    seed: int,
    steps: int,
    *,
    bos: bool = True,
    learning_rate: float = LEARNING_RATE,
    watch: Callable[[nn.Module, int], None] | None = None,
    every: int = 0,
) -> nn.Module:
    """A model of text, in rows of CONTEXT tokens; ``watch(model, steps so far)`` after `every` steps and at the end."""
    model = build(seed)
    batches = texts(seed, BATCH, CONTEXT, bos=bos)
    tune(model, steps, batches, learning_rate, warm_up=WARM_UP, watch=watch, every=every)
    return model


def train_to_recall(seed: int, steps: int) -> tuple[nn.Module, int]:
    """A smaller model that finds the value of a key again within CONTEXT tokens of text, and the steps that took; at most
    about `steps`. Keys and values alone come first: among text the model would not find out. No other token is ever a label:
    learning the text as well would cost what was learned, in so small a model."""
    model = build(seed, hidden=64, layers=2)
    random = torch.Generator().manual_seed(seed)
    learned = tune(model, steps, lambda: _pairs(random), LEARNING_RATE, warm_up=WARM_UP, until=0.1, weight_decay=0)
    learned += tune(
        model, steps // 4, facts(seed, 2 * BATCH, CONTEXT), LEARNING_RATE / 3, warm_up=WARM_UP, weight_decay=0
    )
    return model, learned


def tune(
    model: nn.Module,
    steps: int,
    batch: Callable[[], Batch],
    learning_rate: float,
    *,
    warm_up: int = 1,
    until: float = 0.0,
    weight_decay: float = 0.1,
    watch: Callable[[nn.Module, int], None] | None = None,
    every: int = 0,
) -> int:
    """AdamW over `steps` batches, patched while it lasts, the rate falling to a tenth unless it ends earlier, when the mean
    loss of fifty steps is below `until`; returns the steps taken. `watch` sees the model in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.95))
    last = 1.0 if until else 0.1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1.0) * (1 - (1 - last) * step / steps)
    )
    found: list[float] = []
    model.train()
    with fastllm.patched(model, verify=False):
        while len(found) < steps and not (len(found) % 50 == 0 < len(found) and mean(found[-50:]) < until):
            ids, labels = batch()
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            found.append(loss.item())
            if watch is not None and (len(found) % every == 0 or len(found) == steps):
                model.eval()
                watch(model, len(found))
                model.train()
    model.eval()
    return len(found)


def texts(seed: int, rows: int, length: int, *, bos: bool = True) -> Callable[[], Batch]:
    """Batches (rows, length) of the text that models are trained on, every token a label."""
    random, text = torch.Generator().manual_seed(seed), _text()[0]

    def batch() -> Batch:
        ids = _rows(text, torch.randint(0, len(text) - length, (rows,), generator=random), length, bos)
        return ids, ids

    return batch


def facts(seed: int, rows: int, length: int) -> Callable[[], Batch]:
    """Batches of text with facts among it, each told and asked for later; the answers are the labels."""
    random, text = torch.Generator().manual_seed(seed), texts(seed, rows, length)

    def batch() -> Batch:
        ids, _ = text()
        count = int(torch.randint(2, min(26, (length - 1) // FACT // 2), (), generator=random))
        slots = torch.rand(rows, (length - 1) // FACT, generator=random).argsort(1)[:, : 2 * count].sort(1).values
        keys, values = _told_and_asked(random, rows, count)
        ids = _written(ids, 1 + FACT * slots, keys, values)
        return ids, torch.full_like(ids, -100).scatter(1, FACT * (1 + slots[:, count:]), values[:, count:])

    return batch


def held_out(rows: int, length: int, *, bos: bool = True, seed: int = 0) -> Tensor:
    """(rows, length) tokens of modules never trained on, the same for every model; from the beginning of lines."""
    random, text = torch.Generator().manual_seed(seed), _text()[1]
    starts = (text[:-length] == ord("\n")).nonzero().flatten() + 1
    chosen = starts[torch.randperm(len(starts), generator=random)[:rows]]
    return _rows(text, chosen, length, bos)


def asked(rows: int, distance: int, *, bos: bool = True, seed: int = 0) -> Tensor:
    """Rows of held-out text with a fact near their beginning, others after it, and at their end the first one again,
    `distance` tokens later: the last token is its value."""
    random, begin = torch.Generator().manual_seed(seed), 8
    text = held_out(rows, begin + distance + FACT, bos=bos, seed=seed)
    keys, values = _told_and_asked(random, rows, 3)
    first_again = torch.tensor([0, 1, 2, 0])
    places = torch.tensor([begin, begin + distance // 3, begin + 2 * distance // 3, begin + distance])
    return _written(text, places.expand(rows, 4), keys[:, first_again], values[:, first_again])


def recall(model: nn.Module, rows: Tensor) -> float:
    """Share of `asked` rows whose value the model finds the likeliest."""
    with torch.no_grad():
        logits = torch.cat([model(input_ids=r, use_cache=False, logits_to_keep=2).logits[:, 0] for r in rows.split(8)])
    return (logits.argmax(-1) == rows[:, -1]).double().mean().item()


def losses(model: nn.Module, rows: Tensor) -> Tensor:
    """(rows, length - 1) negative log-likelihood of each token after the first, nats."""
    with torch.no_grad():
        logits = [model(input_ids=r, use_cache=False).logits[:, :-1].float() for r in rows.split(8)]
    return -torch.cat([fastllm.ops.token_logprobs(of_rows, r[:, 1:]) for of_rows, r in zip(logits, rows.split(8))])


# ---- rows ------------------------------------------------------------------------------------------------------------


@cache
def _text() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and those held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    modules = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    parts = [b"\n".join(m for n, m in enumerate(modules) if (n % 12 == 0) == out) for out in (False, True)]
    trained, kept = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)
    return trained, kept


def _rows(text: Tensor, starts: Tensor, length: int, bos: bool) -> Tensor:
    own = length - bos
    rows = text[starts[:, None] + torch.arange(own)].long()
    return torch.cat((torch.full((len(rows), 1), BOS), rows), 1) if bos else rows


def _pairs(random: torch.Generator, rows: int = 128, count: int = 8) -> Batch:
    """Keys, each with its value, then the keys again in another order: the values there are the labels."""
    keys, values = _told_and_asked(random, rows, count)
    ids = torch.cat((torch.full((rows, 1), BOS), torch.stack((keys, values), -1).flatten(1)), 1)
    labels = torch.full_like(ids, -100)
    labels[:, 2 + 2 * count :: 2] = ids[:, 2 + 2 * count :: 2]
    return ids, labels


def _told_and_asked(random: torch.Generator, rows: int, count: int) -> tuple[Tensor, Tensor]:
    """(rows, 2 count) keys of a to z, no two the same, and again in another order; and their values of A to Z."""
    keys = ord("a") + torch.rand(rows, 26, generator=random).argsort(1)[:, :count]
    values = ord("A") + torch.randint(0, 26, (rows, count), generator=random)
    again = torch.rand(rows, count, generator=random).argsort(1)
    return torch.cat((keys, keys.gather(1, again)), 1), torch.cat((values, values.gather(1, again)), 1)


def _written(text: Tensor, places: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Facts over a text: a line's end, @, key, value."""
    signs = (torch.full_like(keys, ord("\n")), torch.full_like(keys, ord("@")), keys, values)
    for n, sign in enumerate(signs):
        text = text.scatter(1, places + n, sign)
    return text
