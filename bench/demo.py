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
import resource
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench import plots
from bench.arguments import Parser

SIDES = ("unpatched", "patched")
CONTEXT, BATCH, BOS = 256, 16, 256
BLOCK = 10  # steps a side runs before the other has its turn


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="training steps of each side (default 100)")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder for the plot and the numbers")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    if options.side:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its sides itself
        train(options.side, options.steps)
        return 0
    try:  # before minutes of training, not after
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror}")
    try:
        runs = take_turns(options.steps, [sys.executable, "-W", "ignore", "-m", "bench.demo"])
    except RuntimeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    show(runs, options.out)
    return 0


# ---- one side, in its own process --------------------------------------------------------------------------------


def train(side: str, steps: int) -> None:
    """Trains in blocks, each when a line arrives on standard input; a JSON line out after each, a last one at the end.
    Ends with its parent."""
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
    before = resident()  # ahead of patching, so that what patching needs counts against it
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

    say({"ready": True, "parameters": model.num_parameters(), "report": report})
    losses: list[float] = []
    while len(losses) < steps:
        await_turn()
        times: list[float] = []
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
    peak = peak_memory()
    await_turn()
    model.eval()
    rows = torch.frombuffer(bytearray(held_out), dtype=torch.uint8).long().view(-1, CONTEXT)
    rows[:, 0] = BOS
    with torch.no_grad():
        total = sum(model(input_ids=r, labels=r).loss.item() for r in rows.split(8)) / len(rows.split(8))
    say({"peak_mb": (peak - before) / 1e6, "perplexity": math.exp(total)})


def corpus() -> bytes:
    """The standard library's modules, one after the other, the same on every run."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))


def peak_memory() -> int:
    """The most bytes of memory this process has held."""
    return memory("VmHWM")


def resident() -> int:
    """The bytes of memory this process holds now; the most it has held where the system does not tell."""
    return memory("VmRSS")


def memory(key: str) -> int:
    """Linux's own count for this process. Elsewhere ru_maxrss, which on Linux would start at the parent's peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


def await_turn() -> None:
    if not sys.stdin.readline():
        sys.exit(1)


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


# ---- both sides --------------------------------------------------------------------------------------------------


def take_turns(steps: int, command: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Runs `command` with --steps and --side for both sides, block by block; returns what each measured. Neither side
    outlives the other's failure."""
    processes: dict[str, subprocess.Popen[str]] = {}
    runs: dict[str, dict[str, Any]] = {side: {"losses": [], "blocks": []} for side in SIDES}
    try:
        for side in SIDES:
            processes[side] = subprocess.Popen(
                [*command, "--steps", str(steps), "--side", side],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        for side, process in processes.items():
            runs[side].update(answer(process))
        print(
            f"Training a Llama of {runs['patched']['parameters'] / 1e6:.1f} M parameters for {steps} steps of "
            f"{BATCH} x {CONTEXT} bytes of Python's standard library, twice.", flush=True,
        )  # fmt: skip
        while (done := len(runs["patched"]["losses"])) < steps:
            for side in SIDES:
                block = answer(processes[side], "go")
                runs[side]["losses"] += block["losses"]
                runs[side]["blocks"].append(block["seconds"])
            done = len(runs["patched"]["losses"])
            now = ", ".join(f"{runs[side]['losses'][-1]:.4f} {side}" for side in SIDES)
            print(f"  step {done:4d}   loss {now}", flush=True)
        for side, process in processes.items():
            runs[side].update(answer(process, "finish"))
    except BaseException:
        for process in processes.values():
            process.terminate()
        raise
    finally:
        for process in processes.values():
            process.communicate()
    return runs


def answer(process: subprocess.Popen[str], request: str = "") -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    line = ""
    try:
        if request:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        pass
    if not line:
        raise RuntimeError(f"a training process ended early, with exit code {process.wait()}")
    return json.loads(line)


def summary(runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the table and the sentence say, from what both sides measured. A block's rate is its tokens over its
    seconds; the first block warms both sides up and is left out where there is another."""
    blocks = {side: runs[side]["blocks"][1:] or runs[side]["blocks"] for side in SIDES}
    rates = {side: [BATCH * CONTEXT * len(block) / sum(block) for block in blocks[side]] for side in SIDES}
    speedups = [b / a for a, b in zip(rates["unpatched"], rates["patched"])]
    return {
        "apart": max(abs(a - b) for a, b in zip(runs["unpatched"]["losses"], runs["patched"]["losses"])),
        "rate": {side: median(rates[side]) for side in SIDES},
        "step": {side: median(second for block in blocks[side] for second in block) for side in SIDES},
        "speedup": median(rates["patched"]) / median(rates["unpatched"]),
        "speedup_quartiles": quantiles(speedups, n=4, method="inclusive")[::2] if len(speedups) > 2 else None,
        "memory": runs["patched"]["peak_mb"] / runs["unpatched"]["peak_mb"],
    }


def sentence(found: dict[str, Any], losses: Sequence[float]) -> str:
    """What the table means, in words that the numbers choose."""
    same = found["apart"] <= 1e-4 * max(1.0, abs(losses[-1]))
    curve = f"The curves differ by at most {found['apart']:.1e}: " + (
        "the kernels change rounding, not training."
        if same
        else "more than rounding in fp32 explains; please report it."
    )
    memory = f"{found['memory']:.2f} times the unpatched side's memory"
    if found["speedup_quartiles"] is None:
        return f"{curve} The patched side needed {memory}. Too few steps to compare speeds: at least {4 * BLOCK} tell."
    low, high = found["speedup_quartiles"]
    spread = f"{low:.2f} to {high:.2f} in the middle half of the blocks"
    if low <= 1 <= high:
        speed = f"No difference in speed stands out from the noise of this machine ({spread})"
    else:
        speed = f"The patched side trained {found['speedup']:.2f} times as fast ({spread})"
    return f"{curve} {speed}; it needed {memory}."


def show(runs: dict[str, dict[str, Any]], out: Path) -> None:
    import rich.table
    from rich.console import Console

    from bench import machine

    found = summary(runs)
    rate, step = found["rate"], found["step"]
    rows = [
        ("final loss", *(f"{runs[s]['losses'][-1]:.4f}" for s in SIDES), f"curves at most {found['apart']:.1e} apart"),
        ("held-out perplexity per byte", *(f"{runs[s]['perplexity']:.4f}" for s in SIDES), ""),
        ("tokens per second, median of blocks", *(f"{rate[s]:,.0f}" for s in SIDES), f"{found['speedup']:.2f} x"),
        ("step time, median", *(f"{1e3 * step[s]:.0f} ms" for s in SIDES), f"{step['patched'] / step['unpatched']:.2f} x"),
        ("peak memory over the built model", *(f"{runs[s]['peak_mb']:.0f} MB" for s in SIDES), f"{found['memory']:.2f} x"),
    ]  # fmt: skip
    where = machine.describe()
    table = rich.table.Table(
        title="The same training run, unpatched and patched", caption=f"{machine.sentence(where)}; fp32"
    )
    for heading in ("", *SIDES, "patched against unpatched"):
        table.add_column(heading, justify="left" if heading in ("", "patched against unpatched") else "right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(100, Console().width))
    console.print()
    console.print(table)
    words = sentence(found, runs["unpatched"]["losses"])
    console.print(words)
    print()
    print(runs["patched"]["report"])
    record = {"machine": where, "rows": rows, "sentence": words, "runs": runs}
    plots.save(plots.figures(record)["curves"], out / "demo.png")
    (out / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"\nBoth curves: {out / 'demo.png'}   numbers: {out / 'demo.json'}")


if __name__ == "__main__":
    sys.exit(main())
