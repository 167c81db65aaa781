"""docs/streaming-measured.md, from what ``python -m bench stream`` wrote: its parts, or those that there are."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, Any

from bench import machine
from bench.curves import COLORS, by_position, spread, steps_of
from bench.results import by_name, markdown, megabytes, milliseconds
from bench.stream_cost import READ

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
CONTESTANTS = {
    "fastllm": "streaming, patched",
    "StreamingCache, unpatched": "streaming",
    "dense cache, as many keys, patched": "dense, as many keys, patched",
    "dense cache, as many keys": "dense, as many keys",
    "eager": "dense, all keys",
    "recomputed window": "window recomputed",
}


def page(record: Record, pictures: str) -> str:
    parts = [
        "# Text without end, measured",
        "Written by `make docs` from [bench/results](../bench/results); no number here was typed. `python -m bench stream` makes "
        "the same tables on your machine. What the cache does: [text without end](streaming.md).",
    ]
    if "quality" in record:
        parts += _quality(record["quality"])
    if "facts" in record:
        parts += _facts(record["facts"])
    parts.append(pictures)
    if "cost" in record:
        parts += _cost(record["cost"])
    return "\n\n".join(part for part in parts if part) + "\n"


def _quality(found: Record) -> list[str]:
    runs, buckets = found["seeds"], [f"{a}–{b}" for a, b in found["buckets"]]

    def perplexities(kind: str) -> str:
        rows = [
            [name, *(spread([r[kind]["ways"][name]["buckets"][n] for r in runs]) for n in range(len(buckets)))]
            for name in runs[0][kind]["ways"]
        ]
        return markdown(["", *buckets], rows)

    seeds, context = len(runs), found["context"]
    of_seeds = f"Means over {seeds} seeds, with the least and the largest" if seeds > 1 else "One seed"
    emergence = [
        [f"{run['seed']}", f"{at['steps']}", f"{at['window'] / at['sinks']:.2f}", f"{at['mass']:.0%}"]
        for run in runs
        for at in run["bos"]["emergence"]
    ]
    first = [
        next((at["steps"] for at in r["bos"]["emergence"] if at["window"] > found["shows"] * at["sinks"]), None)
        for r in runs
    ]
    said = ", ".join(f"{step}" if step else "not yet" for step in first)
    masses = [[r[kind]["mass"][which] for r in runs] for kind in ("bos", "control") for which in ("mean", "largest")]
    mean_bos, head_bos, mean_control, head_control = ([f"{m:.0%}" for m in ms] for ms in masses)
    return [
        "## Perplexity by position",
        f"Byte-level Llamas of 0.84 M parameters, trained on {context} tokens of Python's standard library at a time "
        f"({runs[0]['bos']['steps']} steps, learning rate {found['learning_rate']:g}), BOS before every row, "
        f"read {found['rows']} held-out texts of {found['length']} tokens, the "
        f"same in every way. A query sees at most {found['size']} keys, {found['sinks']} of them sinks where there are any. Recomputed: "
        f"the last {found['size']} tokens run anew for every token, without BOS and with it in front. {of_seeds}. A very small model of "
        "one kind of text: it shows what each way does, not how good a large model is.",
        perplexities("bos"),
        "The same without BOS, trained and read: no token that comes first is like another, and no sink grows.",
        perplexities("control"),
        f"Of the attention within {context} tokens {', '.join(mean_bos)} goes to BOS, in the head with the most {', '.join(head_bos)}; "
        f"without BOS to the first token {', '.join(mean_control)}, {', '.join(head_control)}. How much worse a window is without "
        "sinks depends on how strong a sink has grown in training: perplexity of the window over that with sinks at "
        f"{buckets[-1]}, on fewer texts. It passes {found['shows']} after {said} steps.",
        markdown(["seed", "steps", "window / sinks", "attention on BOS"], emergence),
        "## What was expected of it",
        _gates(found),
        f"Measured on {machine.sentence(found['machine'])}, in {found['seconds'] / 60:.0f} minutes: `{found['machine']['command']}`.",
    ]


def _facts(facts: Record) -> list[str]:
    found = [run["found"] for run in facts["seeds"]]
    rows = [
        [name, *(f"{mean(of[name][n] for of in found):.0%}" for n in range(len(facts["distances"])))]
        for name in found[0]
    ]
    return [
        "## Finding a fact again",
        "A stream forgets what leaves its window, and perplexity does not show it. Smaller models have been taught to give the value of "
        f"a key named earlier within their {facts['context']} tokens. Share of {facts['rows']} values found, mean over {len(found)} "
        "seeds, by how many tokens back the fact stands, of three that each text tells of.",
        markdown(["", *(str(d) for d in facts["distances"])], rows),
        _gates(facts),
        f"Measured on {machine.sentence(facts['machine'])}, in {facts['seconds'] / 60:.0f} minutes: `{facts['machine']['command']}`.",
    ]


def _cost(found: Record) -> list[str]:
    rows, streamed = found["rows"], found["stream"]
    lengths = [f"{row['length']:,}" for row in rows]

    def cells(key: str, shown: Any) -> list[list[str]]:
        of = [by_name(row) for row in rows]
        return [
            [label, *(shown(f[name][key]) if f.get(name, {}).get(key) is not None else "–" for f in of)]
            for name, label in CONTESTANTS.items()
        ]

    return [
        "## What a token costs",
        f"One decoding step of a {rows[0]['shape'].split(' after')[0]} in {rows[0]['dtype']} after so many tokens, ms: medians of "
        f"{rows[0]['runs']} steps, all of them taken in turn in one process. Recomputed: the {rows[0]['shape'].split()[-3]} visible tokens "
        "run anew. Where nothing depends on what has passed, the text is not read to make the table: past "
        f"{READ:,} tokens the cache's counter is set, and a dense cache holds random numbers. The stream below is read in full.",
        markdown(["", *lengths], cells("median_ms", milliseconds)),
        "MB of keys and values:",
        markdown(["", *lengths], [line for line in cells("extra_bytes", megabytes) if line[0] != "window recomputed"]),
        f"{streamed['tokens']:,} tokens one by one through a patched model of one layer, in {streamed['seconds']:.0f} s; "
        f"{streamed['evicted']:,} were evicted:",
        markdown(
            ["tokens so far", "ms per token", "KB"],
            [[f"{at['tokens']:,}", f"{at['ms']:.3f}", f"{at['bytes'] / 1e3:.0f}"] for at in streamed["by_tokens"]],
        ),
        "## What was expected of it",
        _gates(found),
        f"Measured on {machine.sentence(found['machine'])}: `{found['machine']['command']}`.",
    ]


def _gates(found: Record) -> str:
    return "\n".join(f"- {'holds' if g['holds'] else '**fails**'}: {g['says']} ({g['found']})" for g in found["gates"])


# ---- pictures --------------------------------------------------------------------------------------------------------


def pictures(record: Record) -> dict[str, Figure]:
    made = {}
    if "quality" in record:
        made["positions"] = _positions(record["quality"])
    if "cost" in record:
        made["cost"] = _lengths(record["cost"]["rows"])
    return made


def _positions(found: Record) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from bench.plots import SETTINGS

    runs, places = found["seeds"], [(a * b) ** 0.5 for a, b in steps_of(found["buckets"][0][0], found["length"])]
    with rc_context(SETTINGS):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, kind, title in zip(axes, ("bos", "control"), ("trained with BOS", "without: the control")):
            for color, name in zip(COLORS, runs[0]["bos"]["ways"]):
                if name in runs[0][kind]["ways"]:
                    curve = [mean(r[kind]["ways"][name]["curve"][n] for r in runs) for n in range(len(places))]
                    axis.plot(places, curve, color=color, label=name, linewidth=2 if name == "sinks" else 1.2)
            by_position(axis, found["context"], title)
        axes[0].set_ylabel("perplexity")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def _lengths(rows: list[Record]) -> Figure:
    """ms per token and bytes against tokens seen."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from bench.plots import SETTINGS

    with rc_context(SETTINGS):
        figure = Figure(figsize=(9, 3.8), layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, key, scale, label in zip(
            axes, ("median_ms", "extra_bytes"), (1, 1e6), ("ms per token", "MB of keys and values")
        ):
            for color, (name, title) in zip(COLORS, CONTESTANTS.items()):
                points = [(r["length"], by_name(r).get(name, {}).get(key)) for r in rows]
                points = [(length, value / scale) for length, value in points if value is not None]
                if points:
                    axis.plot(*zip(*points), color=color, label=title, marker="o", markersize=4)
            axis.set(xscale="log", yscale="log", xlabel="tokens so far", ylabel=label)
            axis.set_xticks([r["length"] for r in rows], [f"{r['length']:,}" for r in rows])
            axis.minorticks_off()
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure
