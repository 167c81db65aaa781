"""Prompts: rows of files as token ids, in an order that depends on the seed and nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastllm.errors import DataError
from fastllm.train import files
from fastllm.train.data import Report, Totals, _note
from fastllm.train.encode import Encoder
from fastllm.train.formats import Chat, Preference, Prompt, RowError, recognise

WANTED = "prompts: rows of {prompt}, or conversations, whose last answer is left out"


@dataclass(frozen=True)
class Asked:
    """One prompt: its token ids, its text, and its row as it stands in the file, for the reward."""

    ids: list[int]
    text: str
    row: dict[str, Any]


class Prompts:
    """The prompts of a run. They are held in memory, rows and all.

    Args:
        sources: files and folders of .jsonl, .parquet.
        max_length: of a prompt, in tokens; a longer one loses its beginning.
        on_bad_row: "error" or "skip", as in ``data.prepare``.
        memory: a folder where hashes of files are remembered. seed: of the order. key: of the configuration, for messages.

    Raises:
        DataError: nothing to read, bad rows with "error", no good row.
    """

    def __init__(
        self, sources: str | list[str], encoder: Encoder, *, max_length: int, on_bad_row: str, memory: str | os.PathLike[str], seed: int,
        key: str = "data",
    ) -> None:  # fmt: skip
        self.encoder, self.max_length, self.seed = encoder, max_length, seed
        self.report = Report()
        self.rows: list[Asked] = []
        paths = files.find(sources, key)
        folder = Path(memory)
        folder.mkdir(parents=True, exist_ok=True)
        told = [files.digest(path, folder) for path in paths]
        self.fingerprint = hashlib.blake2b(json.dumps([told, max_length]).encode(), digest_size=16).hexdigest()
        for path in paths:
            totals = self.report.sources[str(path)] = Totals()
            for row in files.read(path):
                if row.value is None:
                    _note(self.report, path, row.line, row.problem)
                    continue
                try:
                    asked = self._asked(row.value)
                except RowError as error:
                    _note(self.report, path, row.line, str(error))
                    continue
                totals.read += 1
                totals.rows += 1
                totals.cut += len(asked.ids) > max_length
                totals.tokens += min(len(asked.ids), max_length)
                self.rows.append(Asked(asked.ids[-max_length:], asked.text, asked.row))
        if self.report.bad and on_bad_row == "error":
            raise self.report.refused(key)
        if self.report.bad and os.environ.get("RANK", "0") == "0":
            print(f"warning: {key}: {self.report.told()}", file=sys.stderr)
        if not self.rows:
            raise DataError(f"{key} is empty: there is no prompt in {', '.join(map(str, paths[:3]))}")

    def _asked(self, value: dict[str, Any]) -> Asked:
        messages = messages_of(value)
        return Asked(self.encode(messages), str(messages[-1]["content"]), value)

    def encode(self, messages: list[dict[str, Any]]) -> list[int]:
        """Rendered by the chat template, up to where the assistant's turn begins."""
        text = self.encoder._template(messages, add_generation_prompt=True)
        return self.encoder.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def at(self, begin: int, count: int) -> list[Asked]:
        """`count` prompts from position `begin` of an endless course, in which every epoch has an order of its own."""
        return [self.rows[n] for n in places(len(self.rows), self.seed, begin, count)]


def places(length: int, seed: int, begin: int, count: int) -> Iterator[int]:
    """Positions begin to begin + count of an endless course through `length` rows, by number of row."""
    known = -1
    for place in range(begin, begin + count):
        epoch, n = divmod(place, length)
        if epoch != known:
            order, known = torch.randperm(length, generator=torch.Generator().manual_seed(seed + epoch)), epoch
        yield int(order[n])


def messages_of(value: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row up to the answer that is asked for.

    Raises:
        RowError: a row that is no prompt and holds none.
    """
    example = recognise(value)
    if isinstance(example, (Prompt, Preference)):
        return example.prompt
    if isinstance(example, Chat):
        last = max(n for n, message in enumerate(example.messages) if message["role"] == "assistant")
        if last:
            return example.messages[:last]
        raise RowError("the conversation begins with the assistant, so there is no prompt")
    raise RowError(f"a {example.kind}, where the stage takes {WANTED}")
