"""Which library attention goes to, as measured: fastllm/ops/_attention_rules.py from bench/results/*/attention.json."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from bench.case import BOTH
from bench.results import Row, by_name

FILE = Path(__file__).resolve().parent.parent / "fastllm" / "ops" / "_attention_rules.py"
ENOUGH_RUNS = 20
# Of the dense causal cases, "eager" is SDPA.
CONTESTANTS = {"fastllm": "fastllm", "eager": "sdpa", "flash-attn": "flash-attn", "xformers": "xformers"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def text(files: Sequence[Sequence[Row]]) -> str:
    """The module's text from the rows of every attention.json."""
    lines = []
    for (device, dtype, learns), order in sorted(fastest(files).items()):
        names = "".join(f'"{name}", ' for name in order).rstrip(" " if len(order) == 1 else ", ")
        lines.append(f'    ("{device}", "{dtype}", {learns}): ({names}),\n')
    rules = "{\n" + "".join(lines) + "}" if lines else "{}"
    return (
        '"""Written by `make docs` from bench/results/*/attention.json: what was measured, the fastest first. Not to be edited."""\n\n'
        "# (device, dtype, with a backward pass) -> libraries as fastllm.ops._libraries names them, up to ours\n"
        f"FASTEST: dict[tuple[str, str, bool], tuple[str, ...]] = {rules}\n"
    )


def fastest(files: Sequence[Sequence[Row]]) -> dict[tuple[str, str, bool], tuple[str, ...]]:
    """By the geometric mean over dense causal cases, forward, and with a backward pass."""
    logs: dict[tuple[str, str, bool], dict[str, list[float]]] = {}
    for row in (row for rows in files for row in rows):
        dense = row.get("op") == "attention" and row.get("shape", "").startswith("causal")
        if not dense or row["runs"] < ENOUGH_RUNS or "median_ms" not in by_name(row).get("fastllm", {}):
            continue
        machine = row["machine"]
        device = machine.get("gpu") or f"{machine['cpu']}, {machine['instruction_set']}"
        of_key = logs.setdefault((device, DTYPES[row["dtype"]], row["pass"] == BOTH), {})
        for name, found in by_name(row).items():
            if name in CONTESTANTS and "median_ms" in found:
                of_key.setdefault(CONTESTANTS[name], []).append(math.log(found["median_ms"]))
    orders = {}
    for key, of_key in logs.items():
        cases = len(of_key["fastllm"])
        mean = {name: sum(times) / cases for name, times in of_key.items() if len(times) == cases}
        order = sorted(mean, key=lambda name: mean[name])
        orders[key] = tuple(order[: order.index("fastllm") + 1])
    return orders
