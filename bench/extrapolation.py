"""Reading further than a model was trained to: perplexity by position and recall by distance, under every RoPE scaling.

    python -m bench extrapolation [--quick] [--json F] [--plot DIR]     about a quarter of an hour, or two minutes, on two cores

Small Llamas are trained on CONTEXT tokens of text, extended to LENGTH by every method, and tried on held-out text as they are
and after a few steps of tuning at the new length; then, one that has learned to recall facts, on facts ever further back. All
methods read the same rows. What is expected of them is checked, for every seed.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import fastllm
from bench import evidence, machine, tiny_llama
from bench.curves import steps_of
from bench.suite import check_writable, console, parser
from bench.tiny_llama import CONTEXT

LENGTH = 8 * CONTEXT
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("", {}),
    "linear": ("linear", {}),
    "abf": ("abf", {}),
    "ntk": ("ntk", {}),
    "ntk x16": ("ntk", {"factor": 16.0}),
    "ntk_mixed": ("ntk_mixed", {}),
    "dynamic": ("dynamic", {"factor": 2.0}),
    "llama3": ("llama3", {}),
    "longrope": ("longrope", {"short_factor": [1.0] * 16, "long_factor": [8 ** (n / 15) for n in range(16)]}),
    "yarn": ("yarn", {}),
}
BUCKETS = ((16, 128), (128, 256), (256, 512), (512, 1024))
DISTANCES = (48, 100, 200, 400, 900)
SEEDS, STEPS, RECALL_STEPS = 3, 900, 2500
TUNING_STEPS, TUNING_RATE = 40, 1e-3
QUICK = ("none", "linear", "ntk", "dynamic", "yarn")  # with --quick; a shorter training, and no facts
QUICK_STEPS, QUICK_ROWS = 300, 16
ROWS, RECALL_ROWS = 64, 64


def main(arguments: Sequence[str]) -> int:
    options = parser("extrapolation", (__doc__ or "").split("\n\n")[0])
    options.add_argument(
        "--facts-of", type=Path, metavar="RECORD", help="only the facts again; all else from what --json wrote before"
    )
    chosen = options.parse_args(arguments)
    check_writable(options, chosen.json, chosen.plot)
    try:
        before = evidence.load(chosen.facts_of) if chosen.facts_of else None
    except (evidence.Unreadable, OSError) as error:
        options.error(str(error))
    began, runs = time.perf_counter(), []
    for seed in range(1 if chosen.quick else SEEDS):
        if before:
            runs.append(with_facts(before["seeds"][seed]))
        else:
            runs.append(of_seed(seed, quick=chosen.quick))
        show(runs[-1])
    record: dict[str, Any] = {
        "suite": "extrapolation",
        "context": CONTEXT,
        "length": LENGTH,
        "buckets": BUCKETS,
        "distances": DISTANCES,
        "rows": ROWS,
        "recall_rows": RECALL_ROWS,
        "tuning_steps": TUNING_STEPS,
        "seeds": runs,
        "gates": gates(runs),
    }
    now = {"seconds": time.perf_counter() - began, "machine": machine.describe()}
    record |= {"seconds": before["seconds"], "machine": before["machine"], "facts": now} if before else now
    for gate in record["gates"]:
        print(f"{'holds' if gate['holds'] else 'FAILS'}: {gate['says']} ({gate['found']})")
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(record, indent=1), encoding="utf-8")
    if chosen.plot:
        evidence.draw(record, Path(chosen.plot))
    return 0 if all(gate["holds"] for gate in record["gates"]) else 1


def of_seed(seed: int, quick: bool = False) -> dict[str, Any]:
    began = time.perf_counter()
    steps = QUICK_STEPS if quick else STEPS
    model = tiny_llama.train(seed, steps)
    trained = time.perf_counter()
    print(f"seed {seed}: {steps} steps of text in {trained - began:.0f} s", flush=True)
    rows = tiny_llama.held_out(QUICK_ROWS if quick else ROWS, LENGTH)
    methods: dict[str, Any] = {name: {} for name in (QUICK if quick else METHODS)}
    for name, found in methods.items():
        with_it = extended(model, name)
        found["zero_shot"] = _perplexities(by_position(with_it, name, rows))
        found["cached_differs_by"] = cached_differs_by(with_it, rows[:2, :300]) if seed == 0 else None
        tiny_llama.tune(with_it, TUNING_STEPS, tiny_llama.texts(1000 + seed, 4, LENGTH), TUNING_RATE, warm_up=5)
        found["tuned"] = _perplexities(by_position(with_it, name, rows))
    tuned = time.perf_counter()
    print(f"seed {seed}: {len(methods)} methods tried and tuned in {tuned - trained:.0f} s", flush=True)
    run = {"seed": seed, "steps": steps, "methods": methods}
    return run if quick else with_facts(run)


def with_facts(run: dict[str, Any]) -> dict[str, Any]:
    """The run, with how many facts a model trained for it recalls under every method, by distance."""
    began, seed, methods = time.perf_counter(), run["seed"], run["methods"]
    questions = {distance: tiny_llama.asked(RECALL_ROWS, distance) for distance in DISTANCES}
    model, recall_steps = tiny_llama.train_to_recall(seed, RECALL_STEPS)
    for name, found in methods.items():
        with_it = extended(model, name)
        found["recall"] = [tiny_llama.recall(with_it, of) for of in questions.values()]
    print(f"seed {seed}: recall after {recall_steps} steps, in {time.perf_counter() - began:.0f} s", flush=True)
    return run | {"recall_steps": recall_steps}


def extended(model: nn.Module, name: str) -> nn.Module:
    """A copy of the model, extended by a method of METHODS."""
    made, (method, params) = copy.deepcopy(model), METHODS[name]
    if method:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that LENGTH lies beyond what the laws predict, which is the experiment
            fastllm.extend_context(made, LENGTH, method, **params)
    return made


def by_position(model: nn.Module, name: str, rows: Tensor) -> Tensor:
    """Loss of every token after the first. Where frequencies follow the length read, those of the length at the end of its
    bucket, as a reader with a cache has them."""
    if METHODS[name][0] not in ("dynamic", "longrope"):
        return tiny_llama.losses(model, rows)
    parts, done = [], 1
    for _, end in BUCKETS:
        parts.append(tiny_llama.losses(model, rows[:, :end])[:, done - 1 :])
        done = end
    return torch.cat(parts, 1)


def cached_differs_by(model: nn.Module, rows: Tensor, prompt: int = 100, every: int = 25) -> float:
    """Token by token over a cache, against a forward over the same tokens without one: the largest difference of a logit."""
    worst, cache = 0.0, None
    with torch.no_grad():
        for end in range(prompt, rows.shape[1] + 1):
            ids = rows[:, :end] if cache is None else rows[:, end - 1 : end]
            made = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            if (end - prompt) % every == 0:
                whole = model(input_ids=rows[:, :end], use_cache=False, logits_to_keep=1).logits
                worst = max(worst, (made.logits[:, -1:] - whole).abs().max().item())
    return worst


def gates(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the method's own papers and the laws let one expect, for every seed."""

    def last(run: dict[str, Any], name: str, when: str) -> float:
        return run["methods"][name][when]["buckets"][-1]

    def ordered(when: str, *names: str) -> dict[str, Any]:
        found = [[last(run, name, when) for name in names] for run in runs]
        return {
            "holds": all(a < b for of_run in found for a, b in pairwise(of_run)),
            "found": "; ".join(" < ".join(f"{p:.2f}" for p in of_run) for of_run in found),
        }

    far, first, last_bucket = "zero_shot", BUCKETS[0], BUCKETS[-1]
    least = 3 if min(run["steps"] for run in runs) == STEPS else 1.5  # --quick: trained too little to be lost as far
    falls = [last(run, "none", far) / run["methods"]["none"][far]["buckets"][0] for run in runs]
    cached = max(found["cached_differs_by"] for found in runs[0]["methods"].values())
    within = [distance for distance in DISTANCES if distance < CONTEXT]
    where = f"{last_bucket[0]}-{last_bucket[1]}"
    expected = [
        {
            "says": f"unextended, perplexity at {where} is over {least} times that at {first[0]}-{first[1]}",
            "holds": min(falls) > least,
            "found": ", ".join(f"{f:.2f}" for f in falls),
        },
        {"says": f"as they are at {where}: yarn < dynamic < none", **ordered(far, "yarn", "dynamic", "none")},
        {
            "says": f"after {TUNING_STEPS} steps at {where}: yarn < ntk < none < linear",
            **ordered("tuned", "yarn", "ntk", "none", "linear"),
        },
        {
            "says": "logits over a cache equal those without one to 1e-4, every method",
            "holds": cached < 1e-4,
            "found": f"{cached:.1e}",
        },
    ]
    if all("recall_steps" in run for run in runs):
        found = [share for run in runs for share in run["methods"]["none"]["recall"][: len(within)]]
        expected.append(
            {
                "says": f"the model of facts finds those within its {CONTEXT} tokens",
                "holds": min(found) > 0.9,
                "found": ", ".join(f"{share:.0%}" for share in found),
            }
        )
    return expected


def show(run: dict[str, Any]) -> None:
    print_to = console()
    for title, key in ((f"perplexity, seed {run['seed']}", "zero_shot"), (f"after {TUNING_STEPS} steps", "tuned")):
        table = Table(title=title, box=None, title_justify="left", header_style="")
        table.add_column("")
        for begin, end in BUCKETS:
            table.add_column(f"{begin}-{end}", justify="right")
        for name, found in run["methods"].items():
            table.add_row(name, *(f"{p:.2f}" for p in found[key]["buckets"]))
        print_to.print(table)
    if "recall_steps" not in run:
        return
    table = Table(title="facts recalled, as they are, by distance", box=None, title_justify="left", header_style="")
    table.add_column("")
    for distance in DISTANCES:
        table.add_column(str(distance), justify="right")
    for name, found in run["methods"].items():
        table.add_row(name, *(f"{share:.0%}" for share in found["recall"]))
    print_to.print(table)


def _perplexities(losses: Tensor) -> dict[str, list[float]]:
    """By BUCKETS, and in smaller steps for a curve. A token's position counts from 0, that of BOS."""

    def over(begin: int, end: int) -> float:
        return losses[:, begin - 1 : end - 1].mean().exp().item()

    return {
        "buckets": [over(begin, end) for begin, end in BUCKETS],
        "curve": [over(begin, end) for begin, end in steps_of(BUCKETS[0][0], LENGTH)],
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
