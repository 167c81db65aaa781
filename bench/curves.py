"""What pages of evidence share: perplexity by position, over seeds, as curves and cells."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#9A9A9A", "#0072B2", "#D55E00", "#CC79A7", "#8C6D31", "#7B3294")


def steps_of(begin: int, end: int, count: int = 24) -> list[tuple[int, int]]:
    """`count` stretches of positions, each as many times longer than the last."""
    bounds = [round(begin * (end / begin) ** (n / count)) for n in range(count + 1)]
    return list(pairwise(bounds))


def spread(values: Sequence[float]) -> str:
    """Their mean, and the least and the largest where there are several."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{mean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def by_position(axis: Axes, context: int, title: str) -> None:
    axis.axvline(context, color="#999999", linewidth=1, linestyle=":")
    axis.annotate(
        "trained length",
        (context, 0.98),
        xycoords=("data", "axes fraction"),
        rotation=90,
        va="top",
        ha="right",
        fontsize=7,
    )
    axis.set(xscale="log", yscale="log", xlabel="position", title=title)
    axis.set_xticks([16, 32, 64, 128, 256, 512, 1024], ["16", "32", "64", "128", "256", "512", "1024"])
    axis.set_yticks([3, 4, 6, 10, 20, 40], ["3", "4", "6", "10", "20", "40"])
    axis.minorticks_off()
