"""``python -m bench train``: a training step of a Llama of 134 million parameters in bf16, one row of 2048 tokens."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bench import machine, plots, suite
from bench.measure import quartiles
from bench.training import KINDS, Trainer, taking_turns

TOKENS = 2048
SHAPE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "intermediate_size": 2048,
    "vocab_size": 32000,
    "max_position_embeddings": TOKENS,
}
RUNS, QUICK_RUNS = 10, 3


def main(arguments: Sequence[str]) -> int:
    options = suite.parser(
        "train",
        f"Times the training step of a Llama of 134 M parameters (bf16, 1 x {TOKENS} random tokens): forward pass with "
        f"labels, backward pass, SGD. Unpatched, compiled and patched, {RUNS} steps each in turn, in processes of "
        "their own. Takes minutes.",
    )
    chosen = options.parse_args(arguments)
    suite.check_writable(options, chosen.json, chosen.plot)
    runs = QUICK_RUNS if chosen.quick else RUNS
    where, out = machine.describe(), suite.console()
    out.print(machine.sentence(where))

    with taking_turns(build, KINDS, SHAPE, TOKENS) as trainers:
        first = {kind: trainer.call("steps", 1)[0] for kind, trainer in trainers.items()}
        memory = {kind: trainer.call("measured_step") for kind, trainer in trainers.items()}
        steps: dict[str, list[Any]] = {kind: [first[kind]] for kind in KINDS}
        for _ in range(runs):
            for kind, trainer in trainers.items():
                steps[kind] += trainer.call("steps", 1)
        told = {kind: trainer.call("describe") for kind, trainer in trainers.items()}

    rows = []
    for kind in KINDS:
        seconds = [step.seconds for step in steps[kind][1:]]
        differences = [abs(s.loss - u.loss) for s, u in zip(steps[kind], steps["unpatched"])]
        rows.append(
            {
                "suite": "train",
                "case": f"train step llama 134M bf16 1x{TOKENS}",
                "contestant": kind,
                "parameters": told[kind]["parameters"],
                "runs": runs,
                "median_s": statistics.median(seconds),
                "quartile_s": quartiles(seconds),
                "tokens_per_s": TOKENS / statistics.median(seconds),
                "peak_bytes": memory[kind],
                "peak_over_built_bytes": told[kind]["peak_over_built"],
                "first_s": first[kind].seconds,
                "first_loss": first[kind].loss,
                "first_loss_difference": differences[0],
                "largest_loss_difference": max(differences),
                "patched": told[kind]["report"],
                "machine": where,
            }
        )
    out.print(
        f"median and quartiles of {runs} steps in turn{' (--quick: too few to quote)' if chosen.quick else ''}; step: "
        "forward with labels, backward, SGD; step peak: weights plus the growth of the resident set within a step; "
        "run peak: the most the process held, preparations included, over the built model"
    )
    out.print(table(rows))
    out.print(told["patched"]["report"], soft_wrap=True)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(rows, indent=1) + "\n")
    if chosen.plot:
        for path in plots.draw(rows, Path(chosen.plot), "train"):
            out.print(f"plot: {path}")
    return 0


def build(kind: str, shape: dict[str, Any], tokens: int) -> Trainer:
    """Random tokens: their loss stays near log(vocabulary), which is all that a comparison of speed needs."""

    def batch(step: int) -> Tensor:
        return torch.randint(shape["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(step))

    return Trainer(kind, shape, torch.bfloat16, batch, torch.optim.SGD, lambda step: 1e-2)


def table(rows: list[dict[str, Any]]) -> Table:
    base = rows[0]
    made = Table(box=None, pad_edge=False)
    made.add_column("", no_wrap=True)
    for heading in (
        "step s", "quartiles s", "tokens/s", "speed", "step peak MB", "", "run peak MB", "", "loss differs by", "first s",
    ):  # fmt: skip
        made.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(
            row["contestant"],
            f"{row['median_s']:.2f}",
            "{:.2f}–{:.2f}".format(*row["quartile_s"]),
            f"{row['tokens_per_s']:.0f}",
            f"{base['median_s'] / row['median_s']:.2f}×",
            *_memory(row, base, "peak_bytes"),
            *_memory(row, base, "peak_over_built_bytes"),
            f"{row['largest_loss_difference']:.1e}",
            f"{row['first_s']:.1f}",
        )
    return made


def _memory(row: dict[str, Any], base: dict[str, Any], key: str) -> tuple[str, str]:
    return (f"{row[key] / 1e6:.0f}", f"{row[key] / base[key]:.2f}×") if row[key] else ("–", "–")
