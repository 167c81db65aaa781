"""``python -m bench train``: the training step of a Llama in bf16: tokens per second, TFLOPS, utilisation, memory."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bench import device, machine, plots, suite
from bench.measure import matmul_probe, quartiles
from bench.training import KINDS, Trainer, taking_turns
from fastllm.train import StepFlops, Throughput, peak_flops

TOKENS = 2048


@dataclass(frozen=True)
class Shape:
    """A Llama of `parameters`, and how many rows of TOKENS a step has on a CPU and on a GPU."""

    name: str
    parameters: int
    config: dict[str, int]
    rows: dict[str, int]


def _shape(
    name: str, parameters: int, hidden: int, layers: int, heads: int, keys: int, inner: int, rows_on_gpu: int
) -> Shape:
    config = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": keys,
        "intermediate_size": inner, "vocab_size": 32000, "max_position_embeddings": TOKENS,
    }  # fmt: skip
    return Shape(name, parameters, config, {"cpu": 1, "cuda": rows_on_gpu})


SHAPES = {
    "134m": _shape("134M", 134_105_856, 768, 12, 12, 12, 2048, 16),
    "1b": _shape("1.1B", 1_100_048_384, 2048, 22, 32, 4, 5632, 8),
    "7b": _shape("6.7B", 6_738_415_616, 4096, 32, 32, 32, 11008, 4),  # 93 GB unpatched, by fastllm plan
}
RUNS, QUICK_RUNS = 10, 3


def main(arguments: Sequence[str]) -> int:
    options = suite.parser(
        "train",
        f"Times the training step of a Llama of 134 million to 6.7 billion parameters (bf16, rows of {TOKENS} random "
        f"tokens): forward pass with labels, backward pass, optimizer. Unpatched, compiled and patched, {RUNS} steps "
        "each, in processes of their own: in turn on a CPU, one after the other on a GPU. Takes minutes.",
    )
    options.add_argument("--shape", choices=SHAPES, default="134m", help="parameters of the model (default 134m)")
    options.add_argument(
        "--checkpointing", choices=("without", "with", "both"), default="without",
        help="gradient checkpointing of every layer (default without)",
    )  # fmt: skip
    options.add_argument("--device", default="cpu", choices=device.NAMES, help="where the model is (default cpu)")
    chosen = options.parse_args(arguments)
    on = suite.found_device(options, chosen.device)
    shape = SHAPES[chosen.shape]
    together = [KINDS] if on.name == "cpu" else [(kind,) for kind in KINDS]
    least = 4 * shape.parameters * len(together[0])  # weights and gradients in bf16, and nothing else
    suite.check_fits(options, chosen.shape, least, on)
    suite.check_writable(options, chosen.json, chosen.plot)
    runs = QUICK_RUNS if chosen.quick else RUNS
    where, out = machine.describe(on), suite.console()
    out.print(machine.sentence(where))
    out.print(
        f"median and quartiles of {runs} steps{' (--quick: too few to quote)' if chosen.quick else ''}; a step: "
        f"forward with labels, backward, {OPTIMIZERS[on.name][0]}. All tokens are real; of each row's first nothing is "
        "predicted. TFLOPS: model FLOPs, causal; MFU and HFU: share of the published peak, without and with what "
        "checkpointing repeats; of matmul: TFLOPS over those of a large matrix product in the same run. Step peak: weights, "
        "optimizer state and the growth within a step; run growth: the most held, preparations included, over the built model"
    )

    rows: list[dict[str, Any]] = []
    failed = False
    for checkpointing in {"without": (False,), "with": (True,), "both": (False, True)}[chosen.checkpointing]:
        name = f"train step llama {shape.name} bf16 {shape.rows[on.name]}x{TOKENS}"
        case = f"{name}{' checkpointing' if checkpointing else ''}"
        of_case: list[dict[str, Any]] = []
        matmul: list[float] = []
        for kinds in together:
            try:
                of_case += measure(kinds, shape, checkpointing, on, runs, matmul)
            except RuntimeError as error:
                failed = True
                why = (str(error).strip().splitlines() or [""])[-1]
                out.print(f"{case}: {' and '.join(kinds)} failed: {why}", style="bold red")
        if not of_case:
            continue
        rate = 2 * on.matmul_size**3 / statistics.median(matmul)
        base = of_case[0]["losses"]
        for row in of_case:
            differences = [abs(ours - theirs) for ours, theirs in zip(row.pop("losses"), base)]
            row |= {
                "suite": "train", "case": case, "shape": chosen.shape, "checkpointing": checkpointing, "runs": runs,
                "optimizer": OPTIMIZERS[on.name][0], "first_loss_difference": differences[0],
                "largest_loss_difference": max(differences), "matmul_tflops": rate / 1e12,
                "of_matmul": row["tflops"] * 1e12 / rate, "machine": where,
            }  # fmt: skip
        rows += of_case
        out.print()
        out.print(case, style="bold")
        out.print(speeds(of_case))
        out.print(memory(of_case))
        out.print(next((row["patched"] for row in of_case if row["contestant"] == "patched"), ""), soft_wrap=True)
        if chosen.json:  # after every case: an interrupted run leaves what it had
            Path(chosen.json).write_text(json.dumps(rows, indent=1) + "\n")
    if not rows:
        return 1
    if chosen.plot:
        for path in plots.draw(rows, Path(chosen.plot), "train"):
            out.print(f"plot: {path}")
    return int(failed)


def measure(
    kinds: tuple[str, ...],
    shape: Shape,
    checkpointing: bool,
    on: device.Cpu | device.Cuda,
    runs: int,
    matmul: list[float],
) -> list[dict[str, Any]]:
    """A row for each kind, with its losses; the seconds of a large matrix product, timed between the steps, go into `matmul`."""
    with taking_turns(build, kinds, shape, checkpointing, on) as trainers:
        first = {kind: trainer.call("steps", 1)[0] for kind, trainer in trainers.items()}
        step_peak = {kind: trainer.call("measured_step") for kind, trainer in trainers.items()}
        steps: dict[str, list[Any]] = {kind: [first[kind]] for kind in kinds}
        multiply = matmul_probe(torch.bfloat16, on)
        multiply()
        for _ in range(runs):
            for kind, trainer in trainers.items():
                steps[kind] += trainer.call("steps", 1)
            on.wait()
            matmul.append(on.seconds(multiply))
        del multiply
        told = {kind: trainer.call("describe") for kind, trainer in trainers.items()}
    peak = peak_flops(torch.device(on.name), torch.bfloat16)
    rows = []
    for kind in kinds:
        seconds = [step.seconds for step in steps[kind][1:]]
        of = told[kind]
        flops = StepFlops(of["flops"], of["hardware_flops"])
        done = Throughput(
            statistics.median(seconds), of["tokens"], of["tokens"], of["trainable_tokens"], flops, peak=peak
        )
        rows.append(
            {
                "contestant": kind, "parameters": of["parameters"],
                "median_s": done.seconds, "quartile_s": quartiles(seconds),
                "tokens_per_s": done.tokens_per_s, "real_tokens_per_s": done.real_tokens_per_s,
                "trainable_tokens_per_s": done.trainable_tokens_per_s,
                "flops": flops.model, "hardware_flops": flops.hardware,
                "tflops": done.tflops, "hardware_tflops": done.hardware_tflops, "mfu": done.mfu, "hfu": done.hfu,
                "peak_bytes": step_peak[kind], "peak_over_built_bytes": of["peak_over_built"],
                "first_s": first[kind].seconds, "first_loss": first[kind].loss,
                "losses": [step.loss for step in steps[kind]], "patched": of["report"],
            }
        )  # fmt: skip
    return rows


OPTIMIZERS = {
    "cpu": ("SGD", torch.optim.SGD),
    "cuda": ("AdamW, its state in bf16", partial(torch.optim.AdamW, fused=True)),
}


def build(kind: str, shape: Shape, checkpointing: bool, on: device.Cpu | device.Cuda) -> Trainer:
    """Random tokens: their loss stays near log(vocabulary), which is all that a comparison of speed needs."""

    def batch(step: int) -> Tensor:
        size = (shape.rows[on.name], TOKENS)
        return torch.randint(shape.config["vocab_size"], size, generator=torch.Generator().manual_seed(step))

    rate = 1e-2 if on.name == "cpu" else 1e-5
    return Trainer(
        kind, shape.config, torch.bfloat16, batch, OPTIMIZERS[on.name][1], lambda step: rate,
        checkpointing=checkpointing, device=on,
    )  # fmt: skip


def speeds(rows: list[dict[str, Any]]) -> Table:
    headings = (
        "step s", "quartiles s", "speed", "tokens/s", "trainable/s", "TFLOPS", "MFU", "HFU", "of matmul", "first s",
    )  # fmt: skip
    made = _table(headings)
    for row in rows:
        made.add_row(
            row["contestant"],
            f"{row['median_s']:.2f}",
            "{:.2f}–{:.2f}".format(*row["quartile_s"]),
            f"{rows[0]['median_s'] / row['median_s']:.2f}×",
            f"{row['tokens_per_s']:.0f}",
            f"{row['trainable_tokens_per_s']:.0f}",
            f"{row['tflops']:.3g}",
            *("–" if row[key] is None else f"{row[key]:.1%}" for key in ("mfu", "hfu")),
            f"{row['of_matmul']:.0%}",
            f"{row['first_s']:.1f}",
        )
    return made


def memory(rows: list[dict[str, Any]]) -> Table:
    made = _table(("step peak MB", "", "run growth MB", "", "loss differs by"))
    for row in rows:
        of_row = [_memory(row, rows[0], key) for key in ("peak_bytes", "peak_over_built_bytes")]
        made.add_row(row["contestant"], *of_row[0], *of_row[1], f"{row['largest_loss_difference']:.1e}")
    return made


def _table(headings: Sequence[str]) -> Table:
    made = Table(box=None, pad_edge=False)
    made.add_column("", no_wrap=True)
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def _memory(row: dict[str, Any], base: dict[str, Any], key: str) -> tuple[str, str]:
    return (f"{row[key] / 1e6:.0f}", f"{row[key] / base[key]:.2f}×") if row[key] else ("–", "–")
