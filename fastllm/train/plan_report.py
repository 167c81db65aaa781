"""`fastllm plan`: a plan as tables, and what the command is given as numbers."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastllm.errors import ConfigError
from fastllm.streaming.budget import parsed
from fastllm.train import metrics
from fastllm.train.plan import SPARE, Layout, Plan


def bytes_of(text: str, name: str) -> int:
    """Bytes of "80" (gigabytes), "80GB" or "80GiB"."""
    try:
        return parsed(f"{text}GB" if text.replace(".", "", 1).isdigit() else text)
    except ConfigError:
        raise ConfigError(f'{name} must be a number of gigabytes or a size like "80GiB", got {text!r}') from None


def mfu_of(text: str) -> float:
    """A share such as "0.45", or the mean that a run of `fastllm train` has measured, named by its folder."""
    try:
        return float(text)
    except ValueError:
        pass
    path = Path(text)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(f"--mfu must be a number or the folder of a run, got {text!r}")
    found = [line["mfu"] for line in metrics.read(path) if "mfu" in line][1:]  # the first step warms up
    if not found:
        raise ConfigError(f"{path} tells no MFU: the peak of the device it ran on is not known")
    return sum(found) / len(found)


def as_json(plan: Plan) -> str:
    """The fields of the plan, and of each layout its name, by which one is recommended."""
    layouts = [{"name": one.name, **asdict(one)} for one in plan.layouts]
    return json.dumps(asdict(plan) | {"layouts": layouts}, indent=2)


def render(plan: Plan, width: int | None = None) -> str:
    """The plan as tables for a person."""
    import io

    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=width or 120, highlight=False, color_system=None)
    given = plan.settings
    trained = f", {plan.trained / 1e6:,.0f} million of them trained (LoRA)" if plan.trained < plan.parameters else ""
    console.print(f"{plan.model}, {plan.parameters / 1e6:,.0f} million parameters{trained}")
    micro = f"micro batches of {given['batch']} x {given['seq']} tokens"
    steps = f", {given['accumulation']} of them a step" if given["accumulation"] > 1 else ""
    console.print(
        f"{given['gpus']} GPU(s), {micro}{steps}, {given['precision']}, {given['optimizer']}; sizes in GB (1e9 bytes)\n"
    )
    console.print(_memory_table(plan))
    console.print(_activations_table(plan))
    console.print(f"KV cache: {plan.kv_bytes_per_token / 1e3:,.0f} KB a token", end="")
    console.print("" if plan.kv_tokens is None else f"; {plan.kv_tokens:,} tokens fit on one GPU beside the weights")
    console.print(_speed(plan))
    if plan.recommended:
        console.print(f"recommended: {plan.recommended} ({SPARE:.0%} of the memory is left to CUDA and its allocator)")
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _memory_table(plan: Plan) -> Any:
    from rich.table import Table

    table = Table(title="per GPU", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("weights", "gradients", "optimizer", "buffers", "peak", "", "checkpointed", "", "on the host"):
        table.add_column(heading, justify="right")
    for one in plan.layouts:
        sizes = [_gb(n) for n in (one.weights, one.gradients, one.optimizer, one.buffers)]
        table.add_row(
            one.name, *sizes, _gb(one.total), _fits(one.fits), _gb(one.total_checkpointed), _fits(one.fits_checkpointed),
            _host(one),
        )  # fmt: skip
    return table


def _activations_table(plan: Plan) -> Any:
    from rich.table import Table

    table = Table(title="activations of a micro batch at their peak", title_justify="left", box=None, pad_edge=False)
    for heading in ("", "kept", "checkpointed"):
        table.add_column(heading, justify="right" if heading else "left")
    names = {
        "fused": "fused loss and attention", "sdpa": "fused attention, logits stored",
        "eager": "logits and attention scores stored",
    }  # fmt: skip
    for kind, found in plan.activations.items():
        table.add_row(names[kind], _gb(found["kept"]), _gb(found["checkpointed"]))
    return table


def _speed(plan: Plan) -> str:
    speed = plan.speed
    said = [f"{speed['flops_per_gpu'] / 1e12:,.3g} TFLOPs a step and GPU"]
    if "step_s" in speed:
        said.append(f"{speed['step_s']:.3g} s a step, {speed['tgs']:,.0f} tokens per second and GPU")
    if speed["zero3_bytes"]:
        took = f", {speed['zero3_s']:.3g} s on the link" if "zero3_s" in speed else ""
        said.append(f"ZeRO-3 moves {_gb(round(speed['zero3_bytes']))} GB a step and GPU each way{took}")
    return "; ".join(said)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}" if size < 100e9 else f"{size / 1e9:,.0f}"


def _fits(fits: bool | None) -> str:
    return "" if fits is None else "fits" if fits else "-"


def _host(one: Layout) -> str:
    return _gb(one.host) if one.host else ""
