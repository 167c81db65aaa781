"""Runs one case: correctness against fp64 first, then interleaved timings, then memory."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.case import BOTH, DTYPE_NAMES, Case, Missing
from bench.device import Cpu, Cuda
from bench.results import Row

TURN_SECONDS, TURN_CALLS = 0.01, 9
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
Inputs = tuple[tuple[Any, ...], list[int], list[Tensor]]


def run_case(case: Case, dtype: torch.dtype, which: str, runs: int, device: Cpu | Cuda) -> Row:
    """One row: what every contestant of the case took, `runs` times each in turn, and how far it was from fp64."""
    torch._dynamo.reset()  # a row's compiled peer is compiled for that row, never for the shapes of several
    sets = input_sets(case, dtype, which, device)
    row: Row = {
        "case": case.label(dtype, which),
        "op": case.op,
        "shape": case.shape,
        "length": case.length,
        "dtype": DTYPE_NAMES[dtype],
        "pass": which,
        "runs": runs,
    }
    found: dict[str, Row] = {}
    ready: dict[str, Callable[..., Any]] = {}
    results: dict[str, list[Tensor]] = {}
    for name, build in case.contestants().items():
        found[name] = {"name": name}
        try:
            function = build()
            begin = time.perf_counter()
            results[name] = tensors(call(function, *sets[0]))
            device.wait()
            found[name]["first_ms"] = 1e3 * (time.perf_counter() - begin)
            ready[name] = function
        except Exception as error:  # whatever a peer raises, the others are still wanted, and this one's reason is told
            found[name]["missing"] = reason(error)
    row["bytes"] = _bytes_moved(sets[0], results.get("fastllm") or results.get("eager") or [], which)
    row["flops"] = case.flops * (3 if which == BOTH else 1)
    check(case, sets[0], dtype, results, found)
    results.clear()
    if found["fastllm"].get("wrong"):
        ready.pop("fastllm")

    probes = _probes(dtype, bool(case.flops), device)
    samples = _interleave({**{n: bound(f, sets) for n, f in ready.items()}, **probes}, runs, device)
    copy = statistics.median(samples["copy"])
    row["copy_gb_per_s"] = 2 * device.copied_bytes / copy / 1e9
    limits = [row["bytes"] / row["copy_gb_per_s"] / 1e9]
    if case.flops:
        row["matmul_gflop_per_s"] = 2 * device.matmul_size**3 / statistics.median(samples["matmul"]) / 1e9
        limits.append(row["flops"] / row["matmul_gflop_per_s"] / 1e9)
    row["limit_ms"] = 1e3 * max(limits)
    row["limited_by"] = "matmul" if limits[-1] > limits[0] else "memory"
    probes.clear()
    for name, function in ready.items():
        seconds = sorted(samples[name])
        median = statistics.median(seconds)
        found[name] |= {
            "median_ms": 1e3 * median,
            "quartile_ms": [1e3 * q for q in quartiles(seconds)],
            "gb_per_s": row["bytes"] / median / 1e9,
            "gflop_per_s": row["flops"] / median / 1e9,
            "share_of_limit": row["limit_ms"] / (1e3 * median),
            "extra_bytes": device.peak_extra(lambda f=function: call(f, *sets[0])),
        }
    if "fastllm" in ready:
        for contestant in found.values():
            if "median_ms" in contestant:
                contestant["ratio"] = contestant["median_ms"] / found["fastllm"]["median_ms"]
    row["contestants"] = list(found.values())
    return row


def reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, Missing):
        return lines[0]
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def input_sets(case: Case, dtype: torch.dtype, which: str, device: Cpu | Cuda) -> list[Inputs]:
    """(arguments, positions that get a gradient, gradients of the outputs), made on the device, and enough of them
    that no call finds its arguments in the last-level cache."""
    sets: list[Inputs] = []
    size = 0
    while len(sets) < 2 or size < 2 * device.cache_bytes:
        with torch.device(device.name):
            arguments = case.inputs(dtype)
        floating = [n for n, a in enumerate(arguments) if isinstance(a, Tensor) and a.is_floating_point()]
        wanted = [n for n in floating if n not in case.constants] if which == BOTH else []
        for n in wanted:
            arguments[n].requires_grad_()
        grads = []
        if which == BOTH:
            with torch.no_grad():
                outputs = outputs_of(case.eager(*arguments))
            grads = [torch.randn_like(y) if y.dim() else torch.ones_like(y) for y in outputs]
        sets.append((arguments, wanted, grads))
        size += sum(a.nbytes for a in arguments if isinstance(a, Tensor)) or 2 * device.cache_bytes
    return sets


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def call(function: Callable[..., Any], arguments: tuple[Any, ...], wanted: list[int], grads: list[Tensor]) -> Any:
    """One pass: the outputs, and the gradients where some are wanted."""
    if not wanted:
        with torch.no_grad():
            return function(*arguments), ()
    outputs = outputs_of(function(*arguments))
    # an output's gradient has its dtype, which need not be eager's: a loss may come in fp32 or in the inputs' dtype; what is
    # told beside a result, as statistics are, has none
    pairs = [(y, g if g.dtype == y.dtype else g.to(y.dtype)) for y, g in zip(outputs, grads) if y.requires_grad]
    return outputs, torch.autograd.grad([y for y, _ in pairs], [arguments[n] for n in wanted], [g for _, g in pairs])


def tensors(result: Any) -> list[Tensor]:
    outputs, grads = result
    return [t.detach() for t in (*outputs_of(outputs), *grads)]


def _bytes_moved(inputs: Inputs, results: list[Tensor], which: str) -> int:
    """What the pass must move at least: inputs read, outputs written; and for the backward pass inputs and the outputs'
    gradients read, the inputs' gradients written. A tensor written into by the caller's wish counts once."""
    arguments, _, grads = inputs
    given = {a.data_ptr(): a.nbytes for a in arguments if isinstance(a, Tensor)}
    read = sum(given.values())
    written = sum(t.nbytes for t in results if t.data_ptr() not in given)
    return read + written + (read + sum(g.nbytes for g in grads) if which == BOTH else 0)


def check(
    case: Case,
    inputs: Inputs,
    dtype: torch.dtype,
    results: dict[str, list[Tensor]],
    found: dict[str, Row],
) -> None:
    """Adds to each contestant its largest error against fp64; ours is wrong beyond the project's one tolerance rule:
    twice the error of eager PyTorch in the same dtype, plus atol * max(1, largest |reference|)."""
    arguments, wanted, grads = inputs
    wide = tuple(
        a.detach().double().requires_grad_(n in wanted) if isinstance(a, Tensor) and a.is_floating_point() else a
        for n, a in enumerate(arguments)
    )
    exact = tensors(call(case.exact, wide, wanted, [g.double() for g in grads]))
    del wide
    errors: dict[str, list[float]] = {}
    for name, values in results.items():
        errors[name] = [_error(value, reference) for value, reference in zip(values, exact)]
        found[name]["error"] = max(errors[name])
    if "fastllm" not in errors or "eager" not in errors:
        return
    scales = [max(1.0, reference.abs().max().item() if reference.numel() else 0.0) for reference in exact]
    allowed = [2 * eager + ATOL[dtype] * scale for eager, scale in zip(errors["eager"], scales)]
    found["fastllm"]["allowed"] = max(allowed)
    same = len(results["fastllm"]) == len(exact)
    found["fastllm"]["wrong"] = not (same and all(e <= a for e, a in zip(errors["fastllm"], allowed)))


def _error(value: Tensor, reference: Tensor) -> float:
    if value.shape != reference.shape:
        return math.inf
    if not value.numel():
        return 0.0
    worst = (value.double() - reference).abs_().max().item()
    return math.inf if math.isnan(worst) else worst


def _probes(dtype: torch.dtype, matmul: bool, device: Cpu | Cuda) -> dict[str, Callable[[], Any]]:
    """The device's own limits, timed in turn with the contestants: copy_ of a large tensor, and a matrix product."""
    source, target = (torch.ones(device.copied_bytes // 4, device=device.name) for _ in range(2))
    probes: dict[str, Callable[[], Any]] = {"copy": lambda: target.copy_(source)}
    if matmul:
        probes["matmul"] = matmul_probe(dtype, device)
    return probes


def matmul_probe(dtype: torch.dtype, device: Cpu | Cuda) -> Callable[[], Any]:
    """One product of 2 * device.matmul_size**3 operations."""
    a, b, c = (torch.randn(2 * (device.matmul_size,), device=device.name).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=c)


def bound(function: Callable[..., Any], sets: Sequence[Any]) -> Callable[[], Any]:
    turn = 0

    def run() -> None:
        nonlocal turn
        turn += 1
        call(function, *sets[turn % len(sets)])

    return run


def _interleave(contestants: dict[str, Callable[[], Any]], runs: int, device: Cpu | Cuda) -> dict[str, list[float]]:
    """Seconds of each turn, the contestants taking turns, so that a disturbance of the machine meets them all. The
    release of a run's results belongs to its time. A turn is one call; of what takes less than TURN_SECONDS it is several in
    a row, each on inputs that no cache holds, and the median of all but the first: the turns of the others push out not only
    the inputs but the code and what the allocator keeps, as no training loop does."""
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    calls = {name: min(TURN_CALLS, 1 + int(TURN_SECONDS / device.seconds(run))) for name, run in contestants.items()}
    gc.collect()
    gc.disable()
    try:
        for _ in range(runs):
            for name, run in contestants.items():
                first, *rest = [device.seconds(run) for _ in range(calls[name])]
                samples[name].append(statistics.median(rest) if rest else first)
    finally:
        gc.enable()
    return samples


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return low, high
