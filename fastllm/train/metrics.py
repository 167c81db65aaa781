"""metrics.jsonl: the log of a run, a JSON object a line, each with its step."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastllm.train import checkpoint

NAME = "metrics.jsonl"


def append(path: str | os.PathLike[str], step: int, logs: dict[str, Any]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **logs}, default=float) + "\n")


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The lines, without one that a crash has torn."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def cut(path: Path, step: int) -> None:
    """Takes out what was logged after `step`, which a resumed run will log again."""
    kept = [line for line in read(path) if line.get("step", 0) <= step]
    checkpoint.write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
