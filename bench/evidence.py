"""Pages and pictures of what a suite found out about models rather than kernels: docs/extrapolation.md, docs/streaming-measured.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from bench import machine
from bench import streaming_page as streaming
from bench.curves import COLORS, by_position, spread, steps_of
from bench.results import Unreadable, markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Record = dict[str, Any]
IMAGES = Path("images") / "evidence"


def draw(record: Record, folder: Path, suffix: str = ".png", note: str = "") -> list[Path]:
    """Every picture of a record, as SUITE-PICTURE in the folder."""
    from bench import plots

    made = []
    for name, figure in PICTURES[record["suite"]](record).items():
        made.append(folder / f"{record['suite']}-{name}{suffix}")
        plots.save(figure, made[-1], note)
    return made


def extrapolation_page(record: Record, pictures: str) -> str:
    within = sum(distance < record["context"] for distance in record["distances"])
    learned = [r for r in record["seeds"] if "recall_steps" in r and min(r["methods"]["none"]["recall"][:within]) > 0.9]
    runs, buckets = record["seeds"], [f"{a}–{b}" for a, b in record["buckets"]]
    names = list(runs[0]["methods"])

    def perplexities(when: str) -> str:
        rows = [
            [name, *(spread([r["methods"][name][when]["buckets"][n] for r in runs]) for n in range(len(buckets)))]
            for name in names
        ]
        return markdown(["", *buckets], rows)

    def recalled() -> str:
        distances = record["distances"]
        rows = [
            [name, *(f"{mean(r['methods'][name]['recall'][n] for r in learned):.0%}" for n in range(len(distances)))]
            for name in names
        ]
        return markdown(["", *(str(d) for d in distances)], rows)

    holds = [
        f"- {'holds' if gate['holds'] else '**fails**'}: {gate['says']} ({gate['found']})" for gate in record["gates"]
    ]
    context, length, seeds = record["context"], record["length"], len(runs)
    of_seeds = f"Means over {seeds} seeds, with the least and the largest" if seeds > 1 else "One seed"
    parts = [
        "# Longer contexts, measured",
        "Written by `make docs` from [bench/results](../bench/results); no number here was typed. "
        "`python -m bench extrapolation` makes the same tables on your machine. What the methods are: "
        "[longer contexts](context.md).",
        f"A byte-level Llama of 0.84 M parameters was trained on {context} tokens of Python's standard library at a time "
        f"({runs[0]['steps']} steps), then extended to {length} by `fastllm.extend_context`. Perplexity on the same "
        f"{record['rows']} held-out rows for every method, by position. {of_seeds}. This is a very small model of one kind of "
        "text: it shows what each method does to angles a model has and has not seen, not how good a large model becomes.",
        "## As they are, without tuning",
        perplexities("zero_shot"),
        f"## After {record['tuning_steps']} steps of tuning at {length} tokens",
        perplexities("tuned"),
        pictures,
        "## Finding a fact again",
        "Perplexity hides it: a model can guess the next byte well and no longer find what it read. A second, smaller model has "
        f"been taught to give the value of a key named earlier within its {context} tokens; {len(learned)} of {len(runs)} seeds "
        "learned it (over 90 % found there), and one that did not shows nothing, so these alone count here. Share of "
        f"{record['recall_rows']} values found, by how many tokens back the fact stands; a guess is right one time in 26.",
        recalled() if learned else "",
        "## What was expected",
        "\n".join(holds),
        *(
            f"{what} on {machine.sentence(part['machine'])}, in {part['seconds'] / 60:.0f} minutes: `{part['machine']['command']}`."
            for what, part in (("Measured", record), ("The facts were measured", record.get("facts")))
            if part
        ),
    ]
    return "\n\n".join(parts) + "\n"


def extrapolation_pictures(record: Record) -> dict[str, Figure]:
    from matplotlib import pyplot, rc_context

    from bench.plots import SETTINGS

    runs, places = record["seeds"], [(a * b) ** 0.5 for a, b in steps_of(record["buckets"][0][0], record["length"])]
    with rc_context(SETTINGS):
        figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
        titles = ("as they are", f"after {record['tuning_steps']} steps")
        for axis, when, title in zip(axes, ("zero_shot", "tuned"), titles):
            for color, name in zip(COLORS, runs[0]["methods"]):
                curve = [mean(r["methods"][name][when]["curve"][n] for r in runs) for n in range(len(places))]
                axis.plot(places, curve, color=color, label=name, linewidth=2 if name in ("none", "yarn") else 1.2)
            by_position(axis, record["context"], title)
        axes[0].set_ylabel("perplexity")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        pyplot.close(figure)
    return {"positions": figure}


PAGES: dict[str, Callable[[Record, str], str]] = {"extrapolation": extrapolation_page, "stream": streaming.page}
PICTURES: dict[str, Callable[[Record], dict[str, Figure]]] = {
    "extrapolation": extrapolation_pictures,
    "stream": streaming.pictures,
}
NAMES = {"extrapolation": "extrapolation.md", "stream": "streaming-measured.md"}


def files(results: Path) -> list[Path]:
    """Of each suite with a page the newest result."""
    found = []
    for suite in PAGES:
        of_suite = [file for file in results.glob(f"*/{suite}.json") if file.stat().st_size]
        found += sorted(of_suite, key=lambda file: load(file)["machine"]["date"])[-1:]
    return found


def load(file: Path) -> Record:
    """A suite's record. Raises Unreadable for another file."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        record["machine"]["date"], record["suite"]
    except (ValueError, TypeError, KeyError) as error:
        raise Unreadable(f"{file} holds no record of a suite ({type(error).__name__}: {error})") from None
    return record


def page(file: Path) -> str:
    record = load(file)
    suite = record["suite"]
    pictures = [
        f"![{suite}: {name}]({(IMAGES / f'{suite}-{name}.svg').as_posix()})" for name in PICTURES[suite](record)
    ]
    return PAGES[suite](record, "\n".join(pictures))


def write(file: Path, docs: Path, digest: str) -> None:
    (docs / IMAGES).mkdir(parents=True, exist_ok=True)
    (docs / NAMES[file.stem]).write_text(page(file), encoding="utf-8")
    draw(load(file), docs / IMAGES, ".svg", digest)


def old(file: Path, docs: Path, digest: str) -> list[Path]:
    """What is not as the file says."""
    there, wrong = docs / NAMES[file.stem], []
    if not there.exists() or there.read_text(encoding="utf-8") != page(file):
        wrong.append(there)
    for name in PICTURES[file.stem](load(file)):
        picture = docs / IMAGES / f"{file.stem}-{name}.svg"
        if not picture.exists() or digest not in picture.read_text(encoding="utf-8"):
            wrong.append(picture)
    return wrong
