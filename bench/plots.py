"""Pictures of measured rows: share of the machine's limit, bars against the peers, time by length, training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.results import PASSES, Row, by_name, milliseconds, ratio, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Record = Sequence[Row] | Row  # what a suite wrote, or the demo
# Okabe and Ito's colours, which the colour-blind tell apart too; shapes say the same once more.
STYLES = {"fastllm": ("#0072B2", "o"), "eager": ("#7F7F7F", "s"), "torch.compile": ("#E69F00", "^")}
OTHERS = (("#009E73", "D"), ("#CC79A7", "v"), ("#D55E00", "P"), ("#56B4E9", "X"), ("#000000", "*"))
SETTINGS = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "svg.hashsalt": "fastllm",  # the same rows give the same file
}


def draw(record: Record, folder: Path, name: str, suffix: str = ".png", note: str = "") -> list[Path]:
    """Writes every picture that a suite's rows, or the demo's record, are good for into `folder` as NAME-PICTURE;
    returns the files. `note` goes into a file's metadata."""
    paths = []
    for picture, figure in figures(record).items():
        paths.append(folder / f"{name}-{picture}{suffix}")
        save(figure, paths[-1], note)
    return paths


def save(figure: Figure, path: Path, note: str = "") -> None:
    import matplotlib

    metadata = {"Description": note} | ({"Date": None} if path.suffix == ".svg" else {})
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(path, dpi=120, metadata=metadata)


def figures(record: Record) -> dict[str, Figure]:
    """Picture -> figure. Rows without a time of ours (WRONG, or failed) are in none but the first."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        if isinstance(record, dict):
            return {"curves": curves(record["runs"])} if "runs" in record else {}
        if "contestant" in record[0]:
            of_case: dict[bool, list[Row]] = {}
            for row in record:
                of_case.setdefault(row["checkpointing"], []).append(row)
            return {f"steps{'-checkpointing' * repeated}": steps(rows) for repeated, rows in of_case.items()}
        made = {"limit": limits(record)}
        timed = [row for row in record if "median_ms" in by_name(row).get("fastllm", {})]
        for which, short_name in PASSES.items():
            of_pass = [row for row in timed if row["pass"] == which]
            if any("ratio" in found for row in of_pass for found in _peers(row)):
                made[f"peers-{short_name.replace('+', '-')}"] = against_peers(of_pass, which)
        if grown := series(timed):
            made["length"] = by_length(grown)
        return made


def limits(rows: Sequence[Row]) -> Figure:
    """The roofline, case by case: how much of what the machine can do each contestant reaches."""
    figure, axes = _chart(0.24 * len(rows))
    styles = _styles(rows)
    shares = [1.0]
    for place, row in enumerate(rows):
        for name, found in reversed(by_name(row).items()):  # ours last, on top
            if "share_of_limit" in found:
                color, marker = styles[name]
                size = 56 if name == "fastllm" else 32
                axes.scatter(
                    100 * found["share_of_limit"], place, size, color, marker=marker, label=name,
                    zorder=3, edgecolors="white", linewidths=0.5,
                )  # fmt: skip
                shares.append(found["share_of_limit"])
        ours = by_name(row).get("fastllm", {})
        reached = (
            f"{ours['share_of_limit']:.0%}" if "share_of_limit" in ours else "WRONG" if "error" in ours else "failed"
        )
        beside = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8, "clip_on": False}
        axes.text(1.01, place, reached, color=STYLES["fastllm"][0] if "%" in reached else "#D55E00", **beside)
    axes.text(1.01, -0.9, "fastllm", color=STYLES["fastllm"][0], **beside)
    axes.axvline(100, color="black", linewidth=1)
    axes.text(100, -0.9, "limit", ha="center", va="center", fontsize=8)
    axes.set_xlim(-1.5 * max(shares), 105 * max(shares))
    axes.set_xticks(range(0, int(105 * max(shares)) + 1, 20 if max(shares) < 2 else 100))
    axes.set_xlabel("% of the limit: bytes at the speed of a copy, or FLOPs at that of a matmul, in the same run")
    _by_case(axes, rows)
    return _finish(figure, axes, rows, "Share of the machine's limit", styles)


def against_peers(rows: Sequence[Row], which: str) -> Figure:
    """How many times as long as ours every peer takes."""
    bars = [[found for found in _peers(row) if "ratio" in found] for row in rows]
    figure, axes = _chart(sum(0.19 * len(found) + 0.12 for found in bars))
    styles = _styles(rows)
    ratios = [found["ratio"] for row in bars for found in row]
    middles, place = [], 0.0
    for group in bars:
        top = place
        for found in group:
            color, _ = styles[found["name"]]
            axes.barh(place, found["ratio"] - 1, 0.85, left=1, color=color, edgecolor=color, label=found["name"])
            faster = found["ratio"] >= 1
            axes.annotate(
                ratio(found["ratio"]), (found["ratio"], place), (3 if faster else -3, 0), textcoords="offset points",
                va="center", ha="left" if faster else "right", fontsize=7.5,
            )  # fmt: skip
            place += 1
        middles.append((top + place - 1) / 2)
        place += 0.6
    axes.axvline(1, color="black", linewidth=1, zorder=0.9)  # under a bar of 1×, which is but an edge
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, 0.6 * min(ratios)), 1.3 * max(2, *ratios))
    _plain_ticks(axes.xaxis, "×")
    axes.set_ylim(place - 0.9, -0.7)
    axes.set_yticks(middles, [short(row) for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("time over fastllm's, medians of the same run: right of 1× fastllm is faster")
    return _finish(figure, axes, rows, f"Time of the peers over fastllm's, {which}", styles, without="fastllm")


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Cases that differ in nothing but their length, by the name they share; shortest first."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if length := row.get("length"):
            shape = re.sub(rf"(?<!\d){length}(?!\d)", "L", row["shape"], count=1)
            found.setdefault(short(row | {"shape": shape}), []).append(row)
    return {
        name: sorted(of_name, key=lambda row: row["length"])
        for name, of_name in found.items()
        if len({row["length"] for row in of_name}) > 1
    }


def by_length(grown: dict[str, list[Row]]) -> Figure:
    """A panel per series: time against length, with the limit."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(len(grown), 2)
    lines = -(-len(grown) // columns)
    rows = [row for of_name in grown.values() for row in of_name]
    styles = _styles(rows)
    figure = Figure(figsize=(5.2 * columns + 1.2, 3.4 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, (title, of_name) in zip(panels, grown.items()):
        for name, (color, marker) in reversed(styles.items()):
            points = [(r["length"], by_name(r)[name]) for r in of_name if "median_ms" in by_name(r).get(name, {})]
            low, high = ([found["quartile_ms"][n] for _, found in points] for n in (0, 1))
            lengths = [length for length, _ in points]
            axes.fill_between(lengths, low, high, color=color, alpha=0.2, linewidth=0)
            axes.plot(lengths, [found["median_ms"] for _, found in points], color=color, marker=marker, markersize=5)
        lengths = [row["length"] for row in of_name]
        axes.plot(lengths, [row["limit_ms"] for row in of_name], color="black", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.xaxis.minorticks_off()
        _plain_ticks(axes.yaxis)
        axes.grid(alpha=0.3)
        axes.set_title(title, fontsize=8)
        axes.set(xlabel="L", ylabel="ms, median and quartiles")
    for axes in panels[len(grown) :]:
        axes.remove()
    handles = [Line2D([], [], color=c, marker=m, markersize=5, label=n) for n, (c, m) in styles.items()]
    handles.append(Line2D([], [], color="black", linewidth=1, linestyle="--", label="limit of the machine"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    figure.suptitle(f"Time by length · {_where(rows[0])}", x=0.01, ha="left", fontweight="bold")
    return figure


def steps(rows: Sequence[Row]) -> Figure:
    """A training step: its time with quartiles, and its memory where the system told it."""
    from matplotlib.figure import Figure

    measured: dict[str, Any] = {
        "peak_bytes": "MB at the peak of a step",
        "peak_over_built_bytes": "MB at the peak of a run",
    }
    kept = [key for key in measured if all(row.get(key) for row in rows)]
    figure = Figure(figsize=(3.2 * (1 + len(kept)) + 1, 0.4 * len(rows) + 1.4), layout="constrained")
    panels = figure.subplots(1, 1 + len(kept), sharey=True, squeeze=False)[0]
    names = {"patched": "fastllm", "unpatched": "eager"}
    colors = [STYLES.get(names.get(row["contestant"], row["contestant"]), OTHERS[0])[0] for row in rows]
    places = range(len(rows))

    def panel(axes: Axes, values: list[float], words: list[str], title: str, ends: list[float]) -> None:
        axes.barh(places, values, 0.7, color=colors)
        for place, word in zip(places, words):
            axes.annotate(word, (ends[place], place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        axes.set_xlim(0, 1.35 * max(ends))
        axes.set_xlabel(title)
        axes.tick_params(axis="y", length=0)

    seconds = [row["median_s"] for row in rows]
    words = [
        f"{milliseconds(s)} ({ratio(seconds[0] / s)} as fast)" if n else milliseconds(s) for n, s in enumerate(seconds)
    ]
    panel(panels[0], seconds, words, "seconds a step, median and quartiles", [row["quartile_s"][1] for row in rows])
    spread = [[abs(row["quartile_s"][n] - row["median_s"]) for row in rows] for n in (0, 1)]
    panels[0].errorbar(seconds, places, xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
    panels[0].set_xlim(0, 1.6 * max(seconds))
    for axes, key in zip(panels[1:], kept):
        used = [row[key] / 1e6 for row in rows]
        words = [f"{u:.0f} ({ratio(u / used[0])})" if n else f"{u:.0f}" for n, u in enumerate(used)]
        panel(axes, used, words, measured[key], used)
    panels[0].set_yticks(places, [row["contestant"] for row in rows])
    panels[0].invert_yaxis()
    figure.suptitle(f"{rows[0]['case']} · {_where(rows[0])}", x=0.01, ha="left", fontweight="bold")
    return figure


def curves(runs: dict[str, dict[str, Any]]) -> Figure:
    """The two loss curves of the demo, by step and by time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for side, name, style in (("unpatched", "eager", "-"), ("patched", "fastllm", "--")):
        losses, seconds = runs[side]["losses"], [second for block in runs[side]["blocks"] for second in block]
        elapsed = [sum(seconds[: i + 1]) for i in range(len(seconds))]
        by_step.plot(range(1, len(losses) + 1), losses, style, color=STYLES[name][0], label=side)
        by_time.plot(elapsed, losses, style, color=STYLES[name][0])
    by_step.set(xlabel="step", ylabel="training loss, nats per byte", title="Same seed, same data: the same curve")
    by_time.set(xlabel="seconds of training", title="Against time")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
    by_step.legend(frameon=False)
    return figure


def _peers(row: Row) -> list[Row]:
    return [found for found in row["contestants"] if found["name"] != "fastllm"]


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Contestant -> colour and marker, for those that were timed."""
    timed = dict.fromkeys(f["name"] for row in rows for f in row["contestants"] if "median_ms" in f)
    others = [name for name in timed if name not in STYLES]
    return {n: s for n, s in STYLES.items() if n in timed} | {n: OTHERS[i % len(OTHERS)] for i, n in enumerate(others)}


def _chart(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, height + 1.5), layout="constrained")
    return figure, figure.subplots()


def _by_case(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [short(row) for row in rows], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)


def _plain_ticks(axis: Axis, unit: str = "") -> None:
    """1, 2, 5, 10, ... on a logarithmic axis whose limits are set."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = axis.get_view_interval()
    ticks = [m * 10.0**e for e in range(-6, 7) for m in (1, 2, 5)]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(lambda value, _: f"{value:g}{unit}")
    axis.set_minor_locator(NullLocator())


def _finish(
    figure: Figure, axes: Axes, rows: Sequence[Row], title: str, styles: dict[str, tuple[str, str]], without: str = ""
) -> Figure:
    found = dict(zip(*reversed(axes.get_legend_handles_labels())))
    names = [name for name in styles if name != without and name in found]
    figure.legend([found[n] for n in names], names, loc="outside lower center", ncols=len(names) or 1, frameon=False)
    figure.suptitle(f"{title} · {_where(rows[0])}", x=0.01, ha="left", fontweight="bold")
    return figure


def _where(row: Row) -> str:
    machine = row["machine"]
    quick = f", {row['runs']} runs" if row.get("runs") else ""
    return f"{machine.get('gpu') or machine['cpu']}, {machine['threads']} threads{quick}"
