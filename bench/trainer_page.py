"""The results of ``python -m bench trainer`` as Markdown."""

from __future__ import annotations

import statistics
from typing import Any

from bench import machine
from bench.measure import quartiles
from bench.results import markdown, ratio


def page(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    parts = []
    if "overhead" in record:
        parts += _overhead_table(record["overhead"])
    if "packing" in record:
        parts += _packing_table(record["packing"])
    return "\n\n".join(parts)


def _overhead_table(found: dict[str, Any]) -> list[str]:
    medians = {kind: statistics.median(seconds) for kind, seconds in found["seconds"].items()}
    rows = []
    for kind, seconds in found["seconds"].items():
        low, high = quartiles(seconds)
        own = found["own_share"].get(kind)
        against = medians[kind.replace("patched", "unpatched") if "unpatched" not in kind else kind]
        rows.append([
            kind, f"{medians[kind]:.2f}", f"{low:.2f}–{high:.2f}", ratio(against / medians[kind]),
            f"{statistics.median(own):.2%}" if own else "–",
            f"{1e3 * statistics.median(s * o for s, o in zip(seconds, own)):.1f}" if own else "–",
        ])  # fmt: skip
    told = _machine(found) + (
        f" {found['case']}, {found['steps']} steps of each in turn, SGD. Of a step of `fastllm train` everything but forward pass, "
        "backward pass and optimizer is the trainer's own: data, callbacks, counting, the log of every step."
    )
    return [told, markdown(["", "step s", "quartiles s", "speed", "trainer's own", "ms"], rows)]


def _packing_table(found: dict[str, Any]) -> list[str]:
    rows = []
    speeds = {}
    for kind, parts in found["parts"].items():
        seconds = sum(part["whole"] for part in parts)
        tokens, positions = (sum(part[name] for part in parts) for name in ("tokens", "positions"))
        speeds[kind] = tokens / seconds
        rows.append([
            kind, f"{speeds[kind]:.0f}", ratio(speeds[kind] / speeds["padded"]), f"{tokens / positions:.0%}"
        ])  # fmt: skip
    lengths = found["lengths"]
    told = _machine(found) + (
        f" {found['case']}, or as many tokens packed into rows of {found['capacity']}; {found['steps']} steps of each in turn, patched. "
        f"Conversations of {lengths['mean']:.0f} tokens in the mean without the chat template's, quartiles "
        f"{lengths['quartiles'][0]:.0f} and {lengths['quartiles'][1]:.0f}, the longest {lengths['longest']}."
    )
    return [told, markdown(["", "real tokens/s", "speed", "of all positions"], rows)]


def _machine(found: dict[str, Any]) -> str:
    where = found["machine"]
    return f"{machine.sentence(where)}; `{where['command']}`, {where['date'][:10]}."
