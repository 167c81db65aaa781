"""``python -m bench report``: docs/benchmarks.md, the pages of evidence, their pictures and the rules by which attention goes to
other libraries, from the files in bench/results and nothing else.

Each folder of bench/results is a device, each file in it what a suite wrote with --json (or the demo's demo.json).
With --check nothing is written; exit code 1 when the page or a picture is not what the results say.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import evidence, machine, plots, ppo, rules, trainer_page
from bench.__main__ import SUITES
from bench.arguments import Parser
from bench.results import Row, Unreadable, by_name, markdown, megabytes, milliseconds, ratio, rows_of, short

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
IMAGES = Path("images") / "benchmarks"
ENOUGH_RUNS = 10

HEAD = """\
# Benchmarks

Written by `make docs` from [bench/results](../bench/results); no number here was typed. On your machine:
`python -m bench kernels --json F --plot DIR`, and `make demo`; `python -m bench compare OLD.json NEW.json` tells whether
something became slower.

Every contestant of a case takes its turn in one process, on fresh random inputs that no cache holds; times are medians.
A turn of what takes under 10 ms is several calls in a row, of which the first, which finds its code cold, does not count.
Results are checked in the same run against fp64: a wrong one is marked WRONG and has no time. The limit is the bytes
that must move at the speed of a large copy, or the FLOPs at that of a large matrix product of PyTorch (in fp32 not the
most a processor can do), both timed in turn with the contestants; tokens under a mask count in it, so that a kernel that
passes them over, as ppo_loss does, may go beyond it. "3.00×" under a peer means that it takes three times as long as
fastllm; below 1× it is the faster one. Memory is what a call needs at its peak beyond its inputs, results
included.
"""


def main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="python -m bench report", description=(__doc__ or "").split("\n\n")[0].split("``: ")[1])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is old")
    chosen = parser.parse_args(arguments)
    try:
        if not chosen.check:
            write(RESULTS, DOCS)
            rules.FILE.write_text(_rules(RESULTS), encoding="utf-8")
            return 0
        wrong = check(RESULTS, DOCS)
        if rules.FILE.read_text(encoding="utf-8") != _rules(RESULTS):
            wrong.append(rules.FILE.relative_to(ROOT).as_posix())
    except Unreadable as error:
        parser.error(str(error))
    if wrong:
        print(f"{', '.join(wrong)}: not what bench/results says; run `make docs`", file=sys.stderr)
    return 1 if wrong else 0


def write(results: Path, docs: Path) -> None:
    (docs / "benchmarks.md").write_text(page(results), encoding="utf-8")
    wanted = {docs / path for path, _ in pictures(results)}
    for path in set((docs / IMAGES).rglob("*.svg")) - wanted:
        path.unlink()
    for file in _files(results):
        folder = docs / IMAGES / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        plots.draw(_load(file), folder, file.stem, ".svg", _digest(file))
    for file in evidence.files(results):
        evidence.write(file, docs, _digest(file))


def check(results: Path, docs: Path) -> list[str]:
    """What is missing, old or left over. A picture is old when it was drawn from another file: the file's digest
    stands in its metadata (its bytes differ between versions of matplotlib)."""
    there = docs / "benchmarks.md"
    wrong = [] if there.exists() and there.read_text(encoding="utf-8") == page(results) else ["docs/benchmarks.md"]
    wanted = {docs / path: digest for path, digest in pictures(results)}
    for path, digest in wanted.items():
        if not path.exists() or digest not in path.read_text(encoding="utf-8"):
            wrong.append(f"docs/{path.relative_to(docs).as_posix()}")
    for file in evidence.files(results):
        wrong += [path.relative_to(docs.parent).as_posix() for path in evidence.old(file, docs, _digest(file))]
    left = set((docs / IMAGES).rglob("*.svg")) - wanted.keys()
    return wrong + sorted(f"docs/{path.relative_to(docs).as_posix()} (left over)" for path in left)


def page(results: Path) -> str:
    parts = [HEAD]
    for folder in sorted({file.parent for file in _files(results)}):
        files = [file for file in _files(results) if file.parent == folder]
        parts.append(f"## {_device(files)}")
        for file in files:
            record = _load(file)
            if isinstance(record, list):
                parts += _suite(file, record)
            else:
                parts += _demo(file, record) if "runs" in record else ["### trainer", trainer_page.page(record)]
    return "\n".join(part.rstrip() + "\n" for part in parts if part)


def pictures(results: Path) -> list[tuple[Path, str]]:
    """(path below docs, digest of its data) of every picture that the page shows."""
    found = []
    for file in _files(results):
        folder, digest = IMAGES / file.parent.name, _digest(file)
        found += [(folder / f"{file.stem}-{name}.svg", digest) for name in plots.figures(_load(file))]
    return found


def _rules(results: Path) -> str:
    return rules.text([rows_of(json.loads(file.read_text())) for file in _files(results) if file.stem == "attention"])


def _files(results: Path) -> list[Path]:
    """What suites wrote (other files and those of interrupted runs are not shown), by device, in the order of the suites."""
    order = {name: place for place, name in enumerate(SUITES)}
    rows = SUITES.keys() - evidence.PAGES
    found = [file for file in results.glob("*/*.json") if file.stem in rows and file.stat().st_size]
    return sorted(found, key=lambda f: (f.parent.name, order.get(f.stem, len(order)), f.stem))


def _load(file: Path) -> plots.Record:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(record, list):
            rows_of(record)
        else:
            record["machine"], record["runs" if file.stem == "demo" else "suite"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise Unreadable(f"{file} holds no results of a suite ({type(error).__name__}: {error})") from None
    return record


def _digest(file: Path) -> str:
    return f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def _device(files: Sequence[Path]) -> str:
    record = _load(files[0])
    where = (record if isinstance(record, dict) else record[0])["machine"]
    return where.get("gpu") or f"{where['cpu']}, {where['cores']} cores"


def _demo(file: Path, record: Row) -> list[str]:
    where = record["machine"]
    return [
        "### demo",
        f"{machine.sentence(where)}; `make demo`, {where['date'][:10]}: a small Llama trained twice on real text, in fp32.",
        markdown(["", "unpatched", "patched", "patched against unpatched"], record["rows"]),
        record["sentence"],
        _picture(file, "curves", "training loss by step and by time"),
    ]


def _suite(file: Path, record: list[Row]) -> list[str]:
    rows = rows_of(record)
    runs = sorted({row["runs"] for row in rows})
    few = " **Too few runs to quote.**" if runs[0] < ENOUGH_RUNS else ""
    where = list(dict.fromkeys((machine.sentence(r["machine"]), r["machine"]["command"]) for r in rows))
    dates = sorted({row["machine"]["date"][:10] for row in rows})
    parts = [f"### {file.stem}"]
    parts += [f"{sentence}; `{command}`." for sentence, command in where]
    parts.append(f"{' and '.join(map(str, runs))} runs of each contestant, {' and '.join(dates)}.{few}")
    shown = _iterations if "rollout_s" in record[0] else _training
    parts.append(shown(record) if "contestant" in record[0] else _cases(rows))
    missing = dict.fromkeys(
        f"{f['name']}: {f['missing']}" for row in rows for f in row["contestants"] if "missing" in f
    )
    if missing:
        parts.append(f"Missing: {'; '.join(missing)}.")
    captions = {
        "limit": "share of the machine's limit",
        "length": "time by length",
        "steps": "time and memory of a step",
        "steps-checkpointing": "time and memory of a step with checkpointing",
    }
    parts += [
        _picture(file, name, captions.get(name, "time of the peers over fastllm's")) for name in plots.figures(record)
    ]
    return parts


def _cases(rows: Sequence[Row]) -> str:
    made = []
    for row in rows:
        found = by_name(row)
        ours = found.get("fastllm", {})
        if "median_ms" not in ours:
            made.append([short(row), "**WRONG**" if ours.get("wrong") else "**failed**", *[""] * 9])
            continue
        peers = {n: ratio(f["ratio"]) for n, f in found.items() if "ratio" in f and n != "fastllm"}
        columns = [peers.pop(name, "–") for name in ("eager", "torch.compile")]
        rate = ours["gflop_per_s"] / 1e3 if row["limited_by"] == "matmul" else ours["gb_per_s"]
        made.append(
            [
                short(row),
                milliseconds(ours["median_ms"]),
                "–".join(map(milliseconds, ours["quartile_ms"])),
                f"{milliseconds(rate)} {'TFLOP/s' if row['limited_by'] == 'matmul' else 'GB/s'}",
                f"{ours['share_of_limit']:.0%}",
                *columns,
                ", ".join(f"{name} {value}" for name, value in peers.items()),
                f"{megabytes(ours['extra_bytes'])} / {megabytes(found['eager'].get('extra_bytes'))}",
                f"{ours['error']:.1e}",
                milliseconds(ours["first_ms"]),
            ]
        )
    headings = [
        "",
        "ms",
        "quartiles",
        "rate",
        "of limit",
        "eager",
        "torch.compile",
        "others",
        "MB / eager's",
        "max error",
    ]
    return markdown([*headings, "first call ms"], made)


def _training(rows: Sequence[Row]) -> str:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return "\n\n".join(_steps(case, of_case) for case, of_case in cases.items())


def _iterations(rows: Sequence[Row]) -> str:
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    told = (
        "{}: an iteration of stage ppo: responses sampled, scored by policy, reference and critic, two passes of training with {}. plain: "
        "logits whole, GAE as a loop in Python, the loss in PyTorch; unpatched and patched: the trainer of fastllm. TFLOPS: model FLOPs of "
        "all passes, logits of responses alone; of matmul: TFLOPS over those of a large matrix product in the same run."
    )
    parts = []
    for case, of_case in cases.items():
        made = [[row["contestant"], *ppo.cells(row, of_case[0])] for row in of_case]
        parts += [told.format(case, of_case[0]["optimizer"]), markdown(["", *ppo.HEADINGS], made)]
    return "\n\n".join(parts)


def _steps(case: str, rows: Sequence[Row]) -> str:
    base, made = rows[0], []
    headings = ["", "step s", "quartiles s", "speed", "tokens/s", "trainable/s", "TFLOPS", "MFU", "HFU", "of matmul"]
    headings += ["step peak MB", "run growth MB", "loss differs by", "first s"]
    for row in rows:
        memory = [
            f"{megabytes(row[key])} ({ratio(row[key] / base[key])})" if row.get(key) and base.get(key) else "–"
            for key in ("peak_bytes", "peak_over_built_bytes")
        ]
        made.append(
            [
                row["contestant"],
                f"{row['median_s']:.2f}",
                "{:.2f}–{:.2f}".format(*row["quartile_s"]),
                ratio(base["median_s"] / row["median_s"]),
                f"{row['tokens_per_s']:.0f}",
                f"{row['trainable_tokens_per_s']:.0f}",
                f"{row['tflops']:.3g}",
                *("–" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "hfu")),
                f"{row['of_matmul']:.0%}",
                *memory,
                f"{row['largest_loss_difference']:.1e}",
                f"{row['first_s']:.1f}",
            ]
        )
    told = (
        f"{case}: forward with labels, backward, {base['optimizer']}. TFLOPS: model FLOPs, causal; MFU and HFU: share of the "
        "device's published peak, where there is one; of matmul: TFLOPS over those of a large matrix product in the same run."
    )
    return f"{told}\n\n{markdown(headings, made)}"


def _picture(file: Path, name: str, caption: str) -> str:
    return f"![{file.stem}: {caption}]({(IMAGES / file.parent.name / f'{file.stem}-{name}.svg').as_posix()})"
