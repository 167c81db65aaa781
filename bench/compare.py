"""``python -m bench compare OLD.json NEW.json``: What became slower between two runs of a suite. A slow-down shows although
machines differ, because each time is taken relative to a peer's in the same run. Exit code 1 when a row is slower beyond
noise, has vanished or turned WRONG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from bench.arguments import Parser
from bench.results import Row, Unreadable, by_name, ratio, read
from bench.suite import console

LEAST = 0.03  # a smaller change fails nothing, however narrow the quartiles of a quiet machine are
FAILURES = ("slower", "WRONG", "failed", "vanished", "no common peer")


@dataclass(frozen=True)
class Change:
    """A row of both files: `old` and `new` are (lowest, median, highest) of the peer's time over ours. `moved`: how the
    peer itself changed, its time over the machine's limit; far from 0 the two runs met different conditions, which a
    ratio need not survive (what a page of fresh memory costs, say)."""

    case: str
    verdict: str
    peer: str = ""
    old: tuple[float, float, float] | None = None
    new: tuple[float, float, float] | None = None
    moved: float | None = None


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m bench compare", description=" ".join((__doc__ or "").split("``: ")[-1].split()))
    parser.add_argument("old", metavar="OLD.json", type=Path, help="what a suite wrote with --json")
    parser.add_argument("new", metavar="NEW.json", type=Path, help="the same suite, later")
    chosen = parser.parse_args(arguments)
    try:
        old, new = ({row["case"]: row for row in read(path)} for path in (chosen.old, chosen.new))
    except Unreadable as error:
        parser.error(str(error))
    if not old.keys() & new.keys():
        parser.error(f"{chosen.old} and {chosen.new} have no case in common")
    changes = [change for case in old for change in compare(old[case], new.get(case))]
    out = console()
    out.print(table(changes))
    added = len(new.keys() - old.keys())
    bad = [change for change in changes if change.verdict in FAILURES]
    out.print(
        f"{len(old)} rows: {len({c.case for c in bad})} failed, "
        f"{len({c.case for c in changes if c.verdict == 'faster'})} faster"
        + (f"; {added} are new in {chosen.new} and not compared" if added else "")
    )
    return 1 if bad else 0


def compare(old: Row, new: Row | None) -> list[Change]:
    """Against the peer that was fastest in OLD among those of both runs, and against eager; empty where there was
    nothing to lose."""
    before = by_name(old)
    if "median_ms" not in before.get("fastllm", {}):
        return []
    if new is None:
        return [Change(old["case"], "vanished")]
    after = by_name(new)
    ours = after.get("fastllm", {})
    if "median_ms" not in ours:
        return [Change(old["case"], "WRONG" if ours.get("wrong") else "failed")]
    peers = [name for name, found in before.items() if name != "fastllm" and "median_ms" in found]
    peers = [name for name in peers if "median_ms" in after.get(name, {})]
    if not peers:
        return [Change(old["case"], "no common peer")]
    best = min(peers, key=lambda name: before[name]["median_ms"])
    changes = []
    for peer in dict.fromkeys([best, *(["eager"] if "eager" in peers else [])]):
        then, now = _bounds(before, peer), _bounds(after, peer)
        moved = None
        if "limit_ms" in old and "limit_ms" in new:
            moved = before[peer]["share_of_limit"] / after[peer]["share_of_limit"] - 1
        changes.append(Change(old["case"], verdict(then, now), peer, then, now, moved))
    return changes


def _bounds(found: dict[str, Row], peer: str) -> tuple[float, float, float]:
    ours, theirs = found["fastllm"], found[peer]
    (low, high), (their_low, their_high) = ours["quartile_ms"], theirs["quartile_ms"]
    return their_low / high, theirs["median_ms"] / ours["median_ms"], their_high / low


def verdict(old: tuple[float, float, float], new: tuple[float, float, float]) -> str:
    """Slower or faster only where the two ranges, from quartile to quartile, do not meet."""
    if new[2] < old[0] and new[1] < (1 - LEAST) * old[1]:
        return "slower"
    if new[0] > old[2] and new[1] > (1 + LEAST) * old[1]:
        return "faster"
    return "same"


def table(changes: Sequence[Change]) -> Table:
    made = Table(
        box=None, pad_edge=False, title="time of the peer over fastllm's, with its range", title_justify="left"
    )
    for heading, side in (
        ("", "left"),
        ("peer", "left"),
        ("old", "right"),
        ("new", "right"),
        ("change", "right"),
        ("peer itself", "right"),
    ):
        made.add_column(heading, justify=side, overflow="fold")  # type: ignore[arg-type]
    made.add_column("", no_wrap=True)
    case = ""
    for change in changes:
        name, case = ("" if change.case == case else change.case), change.case
        style = "bold red" if change.verdict in FAILURES else "green" if change.verdict == "faster" else None
        cells = [f"{ratio(r[1])} ({r[0]:.2f}–{r[2]:.2f})" if r else "–" for r in (change.old, change.new)]
        moved = f"{change.new[1] / change.old[1] - 1:+.0%}" if change.old and change.new else ""
        itself = f"{change.moved:+.0%}" if change.moved is not None else ""
        made.add_row(name, change.peer, *cells, moved, itself, change.verdict, style=style)
    return made
