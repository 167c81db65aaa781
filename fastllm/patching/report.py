"""What a patch did and what it left, as records and as a table."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

ABSENT = "no module of this model has it"


@dataclass(frozen=True)
class Patched:
    """One module that now runs a fastllm op."""

    path: str
    op: str
    backend: str


@dataclass(frozen=True)
class Skipped:
    """One module, or a whole op (path ""), that was left alone."""

    path: str
    op: str
    reason: str


@dataclass
class PatchReport:
    """The result of ``fastllm.patch``; ``print(report)`` is a table."""

    model: str
    patched: list[Patched] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How many modules each op was put into."""
        found: dict[str, int] = {}
        for record in self.patched:
            found[record.op] = found.get(record.op, 0) + 1
        return found

    def __str__(self) -> str:
        counts = ", ".join(f"{op} {n}" for op, n in sorted(self.counts.items())) or "nothing"
        lines = [f"fastllm patched {self.model}: {counts}"]
        rows = [("op", "where", "how")]
        rows += [(op, path, backend) for (op, backend), paths in _group(self.patched, "backend") for path in paths]
        left = [s for s in self.skipped if s.reason != ABSENT]
        rows += [(op, path, f"left: {why}") for (op, why), paths in _group(left, "reason") for path in paths]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines += [f"  {op:<{widths[0]}}  {path:<{widths[1]}}  {how}" for op, path, how in rows if len(rows) > 1]
        if absent := [s.op for s in self.skipped if s.reason == ABSENT]:
            lines.append(f"  not in this model: {', '.join(absent)}")
        return "\n".join(lines)


def _group(records: Iterable[Patched | Skipped], what: str) -> list[tuple[tuple[str, str], list[str]]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for record in records:
        groups.setdefault((record.op, getattr(record, what)), []).append(record.path)
    return [(key, _fold(paths)) for key, paths in sorted(groups.items())]


def _fold(paths: list[str]) -> list[str]:
    """["layers.0.norm", "layers.1.norm", "norm"] -> ["layers.{0-1}.norm", "norm"]."""
    families: dict[str, list[tuple[int, ...]]] = {}
    for path in paths:
        numbers = tuple(int(n) for n in re.findall(r"(?<![^.])\d+(?![^.])", path))
        families.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "{}", path), []).append(numbers)
    folded = []
    for pattern, found in families.items():
        columns = [sorted(set(column)) for column in zip(*found)]
        folded.append(pattern.format(*(_range(column) for column in columns)) or "(the model)")
    return folded


def _range(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}-{numbers[-1]}}}"
    return "{" + ",".join(map(str, numbers)) + "}"
