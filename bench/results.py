"""Measured rows as files and in one shape, whichever suite wrote them, and numbers as people read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PASSES = {"forward": "fwd", "forward+backward": "fwd+bwd"}


class Unreadable(Exception):
    """A file that is no result of a suite; the message is one line that names it."""


def read(path: Path) -> list[Row]:
    """The rows of a suite; those of a training step as one row with its contestants, like every other case."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(rows, dict):
            rows = rows["cost"]["rows"]  # a record of the streaming suite, whose other part has no times
        return rows_of(rows)
    except OSError as error:
        raise Unreadable(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unreadable(f"{path} holds no rows of a suite ({type(error).__name__}: {error})") from None


def rows_of(rows: list[Row]) -> list[Row]:
    if not isinstance(rows, list) or not rows:
        raise ValueError("a list of rows is expected")
    if "contestant" in rows[0]:
        return _training(rows)
    for row in rows:
        row["case"], [found["name"] for found in row["contestants"]]  # raises where they are absent
    return rows


def _training(rows: list[Row]) -> list[Row]:
    names = {"patched": "fastllm", "unpatched": "eager"}
    cases: dict[str, Row] = {}
    for row in rows:
        case = cases.setdefault(row["case"], {k: row[k] for k in ("case", "runs", "machine")} | {"contestants": []})
        case["contestants"].append(
            row
            | {
                "name": names.get(row["contestant"], row["contestant"]),
                "median_ms": 1e3 * row["median_s"],
                "quartile_ms": [1e3 * second for second in row["quartile_s"]],
            }
        )
    return list(cases.values())


def by_name(row: Row) -> dict[str, Row]:
    """The contestants of a row."""
    return {found["name"]: found for found in row["contestants"]}


def short(row: Row) -> str:
    """The case in as few words as a chart has room for."""
    if "pass" not in row:
        return row["case"]
    return f"{row['op']}  {row['shape']}  {row['dtype']}  {PASSES[row['pass']]}"


def milliseconds(value: float) -> str:
    """Three significant digits where there are fewer than a hundred."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:#.3g}"


def megabytes(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value / 1e6:.0f}" if value >= 1e7 else f"{value / 1e6:.1f}"


def ratio(value: float) -> str:
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×" if value < 100 else f"{value:.0f}×"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, numbers to the right."""
    lines = [headings, ["---", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
