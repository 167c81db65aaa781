"""The main job: one small Llama trained twice on real text from the same seed, unpatched and patched, side by side.

    python -m bench.demo [--steps N] [--out FOLDER]

The text is the Python standard library's own source, byte by byte. Each side runs in a process of its own, so that its
peak memory is its own, and the two take turns in blocks of steps, so that whatever else the machine does hits both alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from statistics import median
from typing import Any

SIDES = ("unpatched", "patched")
CONTEXT, BATCH, BOS = 256, 16, 256
BLOCK = 10  # steps a side runs before the other has its turn


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps of each side (default 100)")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for the plot and the numbers")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.side:
        train(options.side, options.steps)
        return 0
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"demo: cannot write to {options.out}: {error}", file=sys.stderr)
        return 2
    runs = take_turns(options.steps)
    show(runs, options.out)
    return 0


# ---- one side, in its own process --------------------------------------------------------------------------------


def train(side: str, steps: int) -> None:
    """Trains in blocks, each when a line arrives on standard input; a JSON line out after each, a last one at the end."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    text = corpus()
    held_out = text[: 64 * CONTEXT]
    text = text[64 * CONTEXT :]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=257, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    report = ""
    if side == "patched":
        import fastllm

        report = str(fastllm.patch(model))
    order = torch.Generator().manual_seed(1)
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def batch() -> torch.Tensor:
        starts = torch.randint(0, len(data) - CONTEXT, (BATCH,), generator=order)
        rows = torch.stack([data[s : s + CONTEXT - 1].long() for s in starts])
        return torch.cat((torch.full((BATCH, 1), BOS), rows), dim=1)

    before = peak_memory()
    say({"ready": True, "parameters": model.num_parameters(), "report": report})
    losses: list[float] = []
    while len(losses) < steps:
        sys.stdin.readline()
        times = []
        while len(losses) < steps:
            began = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1.0, (len(losses) + 1) / 20)
            ids = batch()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            times.append(time.perf_counter() - began)
            if len(times) == BLOCK:
                break
        say({"losses": losses[-len(times) :], "seconds": times})
    sys.stdin.readline()
    model.eval()
    rows = torch.frombuffer(bytearray(held_out), dtype=torch.uint8).long().view(-1, CONTEXT)
    rows[:, 0] = BOS
    with torch.no_grad():
        total = sum(model(input_ids=r, labels=r).loss.item() for r in rows.split(8)) / len(rows.split(8))
    say({"peak_mb": (peak_memory() - before) / 2**20, "perplexity": math.exp(total)})


def corpus() -> bytes:
    """The standard library's modules, one after the other, the same on every run."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def peak_memory() -> int:
    """The most bytes of memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


# ---- both sides --------------------------------------------------------------------------------------------------


def take_turns(steps: int) -> dict[str, dict[str, Any]]:
    """Runs both sides, block by block; returns what each measured."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.demo", "--steps", str(steps), "--side"]
    processes = {
        side: subprocess.Popen([*command, side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for side in SIDES
    }
    runs: dict[str, dict[str, Any]] = {side: {"losses": [], "seconds": []} for side in SIDES}
    for side, process in processes.items():
        runs[side].update(answer(process))
    print(
        f"Training a Llama of {runs['patched']['parameters'] / 1e6:.1f} M parameters for {steps} steps of {BATCH} x {CONTEXT} bytes "
        "of Python's standard library, twice.", flush=True,
    )  # fmt: skip
    while len(runs["patched"]["losses"]) < steps:
        for side in SIDES:
            block = answer(processes[side], "go")
            runs[side]["losses"] += block["losses"]
            runs[side]["seconds"] += block["seconds"]
        done = len(runs["patched"]["losses"])
        print(
            f"  step {done:4d}   loss {runs['unpatched']['losses'][-1]:.4f} unpatched, {runs['patched']['losses'][-1]:.4f} patched",
            flush=True,
        )
    for side, process in processes.items():
        runs[side].update(answer(process, "finish"))
        process.wait()
    return runs


def answer(process: subprocess.Popen[str], request: str = "") -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    if request:
        process.stdin.write(request + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"demo: a training process ended early with exit code {process.wait()}")
    return json.loads(line)


def show(runs: dict[str, dict[str, Any]], out: Path) -> None:
    import rich.table
    import torch
    import transformers
    from rich.console import Console

    import fastllm

    warm = min(BLOCK, len(runs["patched"]["seconds"]) - 1)  # the first block warms both sides up
    step = {side: median(runs[side]["seconds"][warm:]) for side in SIDES}
    rate = {side: BATCH * CONTEXT / step[side] for side in SIDES}
    apart = max(abs(a - b) for a, b in zip(runs["unpatched"]["losses"], runs["patched"]["losses"]))
    rows = [
        ("final loss", *(f"{runs[s]['losses'][-1]:.4f}" for s in SIDES), f"curves at most {apart:.1e} apart"),
        ("held-out perplexity per byte", *(f"{runs[s]['perplexity']:.4f}" for s in SIDES), ""),
        ("tokens per second", *(f"{rate[s]:,.0f}" for s in SIDES), f"{rate['patched'] / rate['unpatched']:.2f} x"),
        ("step time, median", *(f"{1e3 * step[s]:.0f} ms" for s in SIDES), f"{step['patched'] / step['unpatched']:.2f} x"),
        (
            "peak memory of training", *(f"{runs[s]['peak_mb']:.0f} MB" for s in SIDES),
            f"{runs['patched']['peak_mb'] / runs['unpatched']['peak_mb']:.2f} x",
        ),
    ]  # fmt: skip
    versions = (
        f"{processor()}, {torch.get_num_threads()} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, fastllm {fastllm.__version__}; fp32"
    )
    table = rich.table.Table(title="The same training run, unpatched and patched", caption=versions)
    for heading in ("", *SIDES, "patched against unpatched"):
        table.add_column(heading, justify="left" if heading in ("", "patched against unpatched") else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(100, Console().width))
    console.print()
    console.print(table)
    print()
    print(runs["patched"]["report"])
    plot(runs, out / "demo.png")
    record = {"environment": versions, "rows": rows, "runs": runs}
    (out / "demo.json").write_text(json.dumps(record, indent=1))
    print(f"\nBoth curves: {out / 'demo.png'}   numbers: {out / 'demo.json'}")


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def plot(runs: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_time) = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    for side, color, style in (("unpatched", "#888888", "-"), ("patched", "#d1495b", "--")):
        losses, seconds = runs[side]["losses"], runs[side]["seconds"]
        elapsed = [sum(seconds[: i + 1]) for i in range(len(seconds))]
        by_step.plot(range(1, len(losses) + 1), losses, style, color=color, label=side)
        by_time.plot(elapsed, losses, style, color=color, label=side)
    by_step.set(xlabel="step", ylabel="training loss, nats per byte", title="Same seed, same data: the same curve")
    by_time.set(xlabel="seconds of training", title="Against time")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
