"""Text without end: what a StreamingCache does to perplexity, and what a token costs with it.

    python -m bench stream [--quick] [--only quality|facts|cost] [--json F] [--plot DIR]     an hour, or three minutes, on 2 cores

Quality: small Llamas are trained with BOS and without, and read texts eight times as long as their context with a dense cache, a
window, sinks, sinks that are not re-rotated, and by recomputing the window. Facts: others are taught to find a fact again, which a
stream loses when it leaves the window. Neither needs a quiet machine. Cost: one decoding step of a
Llama of 134 million parameters after 1 k to 100 k tokens beside a dense cache and recomputation, and a stream of 200,000 tokens.
What is expected of each is checked. With --only, an older record in F keeps its other parts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from bench import device, evidence, machine, stream_cost, stream_quality, suite
from bench.arguments import Parser

PARTS = ("quality", "facts", "cost")


def main(arguments: Sequence[str]) -> int:
    options = suite.parser("stream", (__doc__ or "").split("\n\n")[0])
    options.add_argument("--only", choices=PARTS, help="this part alone; the others stay what they were in --json")
    options.add_argument(
        "--dtype", choices=stream_cost.DTYPES, default="fp32", help="of weights and cache (default fp32)"
    )
    options.add_argument("--device", default="cpu", choices=device.NAMES, help="of the timings (default cpu)")
    chosen = options.parse_args(arguments)
    on = suite.found_device(options, chosen.device)
    suite.check_writable(options, chosen.json, chosen.plot)
    record = _before(options, chosen.json) if chosen.only else {}
    record = {"suite": "stream"} | record
    out = suite.console()

    def keep(part: str, found: dict[str, Any]) -> None:
        """After every part of a part: an interrupted run leaves what it had."""
        record[part] = found | {"machine": machine.describe(on)}
        record["machine"] = record[part]["machine"]
        if chosen.json:
            Path(chosen.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    if chosen.only in (None, "quality"):
        keep("quality", stream_quality.measure(chosen.quick, out.print, partial(keep, "quality")))
        show(record["quality"], out)
    if chosen.only in (None, "facts"):
        keep("facts", stream_quality.measure_facts(chosen.quick, out.print))
    if chosen.only in (None, "cost"):
        keep("cost", cost(chosen.quick, chosen.dtype, on, out))
    if chosen.plot:
        for path in evidence.draw(record, Path(chosen.plot)):
            out.print(f"plot: {path}")
    checked = [gate for part in PARTS if chosen.only in (None, part) for gate in record[part]["gates"]]
    for gate in checked:
        print(f"{'holds' if gate['holds'] else 'FAILS'}: {gate['says']} ({gate['found']})")
    if chosen.quick:
        print("--quick: too little training and too few runs to judge by")
        return 0
    return 0 if all(gate["holds"] for gate in checked) else 1


def show(quality: dict[str, Any], out: Any) -> None:
    """Perplexity by position, means over the seeds."""
    runs = quality["seeds"]
    for kind, title in (("bos", "perplexity, trained with BOS"), ("control", "trained without BOS")):
        table = Table(title=title, box=None, title_justify="left", header_style="")
        table.add_column("")
        for begin, end in quality["buckets"]:
            table.add_column(f"{begin}-{end}", justify="right")
        for name in runs[0][kind]["ways"]:
            found = zip(*(run[kind]["ways"][name]["buckets"] for run in runs))
            table.add_row(name, *(f"{mean(of_bucket):.2f}" for of_bucket in found))
        out.print(table)


def cost(quick: bool, dtype: str, on: Any, out: Any) -> dict[str, Any]:
    out.print(machine.sentence(machine.describe(on)))
    out.print(
        "medians and quartiles of decoding steps, taken in turn; limit: weights and visible keys and values at the speed of a copy in "
        "the same run; extra MB: what the cache holds; error: of the logits, against the unpatched model's on the same cache"
    )
    rows = []
    for row in stream_cost.measure(quick, dtype, on):
        rows.append({"suite": "stream"} | row | {"machine": machine.describe(on)})
        out.print(suite.table(rows[-1]))
        out.print()
    streamed = stream_cost.stream(stream_cost.QUICK_STREAM if quick else stream_cost.STREAM, on)
    for at in streamed["by_tokens"]:
        out.print(f"one layer, after {at['tokens']:,} tokens: {at['ms']:.3f} ms per token, {at['bytes']:,} bytes")
    return {"rows": rows, "stream": streamed, "gates": stream_cost.gates(rows, streamed)}


def _before(options: Parser, file: str | None) -> dict[str, Any]:
    """What an earlier run wrote into the file."""
    if file is None or not Path(file).stat().st_size:
        return {}
    try:
        return {part: found for part, found in evidence.load(Path(file)).items() if part in PARTS}
    except evidence.Unreadable as error:
        options.error(str(error))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
