"""``python -m bench stream``: what a token costs after a short text and after a long one, by cache."""

from __future__ import annotations

import copy
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import device, machine, plots, suite
from bench.measure import quartiles
from bench.results import Row
from bench.train import SHAPES

SINKS, WINDOW = 4, 1020
VISIBLE = SINKS + WINDOW
LENGTHS, QUICK_LENGTHS = (1024, 4096, 16384, 102_400), (1024, 2048)
DENSE = 16_384  # the longest text that the dense cache holds here
RUNS, QUICK_RUNS = 40, 5
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "vocab_size": 256, "max_position_embeddings": 2048,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: Sequence[str]) -> int:
    options = suite.parser(
        "stream",
        f"Streams random text through a Llama of 134 million parameters with a StreamingCache of {SINKS} sinks and a window of "
        f"{WINDOW}, and times one decoding step after {', '.join(f'{n:,}' for n in LENGTHS)} tokens: patched, unpatched, beside a "
        "dense cache of as many keys, a dense cache of all of them, and recomputation of the window. Takes minutes.",
    )
    options.add_argument("--dtype", choices=DTYPES, default="fp32", help="of weights and cache (default fp32)")
    options.add_argument("--device", default="cpu", choices=device.NAMES, help="where the model is (default cpu)")
    chosen = options.parse_args(arguments)
    try:
        on = device.find(chosen.device)
    except device.Absent as error:
        options.error(f"--device {chosen.device}: {error}")
    suite.check_writable(options, chosen.json, chosen.plot)
    runs, lengths = (QUICK_RUNS, QUICK_LENGTHS) if chosen.quick else (RUNS, LENGTHS)
    where, out = machine.describe(on), suite.console()
    out.print(machine.sentence(where))
    few = " (--quick: too few to quote, of a tiny model)" if chosen.quick else ""
    out.print(
        f"median and quartiles of {runs} decoding steps, taken in turn{few}; limit: weights and visible keys and values at the speed "
        "of a copy in the same run; extra MB: what the cache holds; error: of the logits, against the unpatched model's on the same "
        "cache"
    )
    config = TINY if chosen.quick else SHAPES["134m"].config
    rows = []
    for row in measure(config, DTYPES[chosen.dtype], chosen.dtype, lengths, runs, on):
        rows.append({"suite": "stream"} | row | {"machine": where})
        out.print(suite.table(rows[-1]))
        for found in row["contestants"]:
            if "missing" in found:
                out.print(f"{found['name']} is missing: {found['missing']}", style="dim")
        out.print()
        if chosen.json:  # after every row: an interrupted run leaves what it had
            Path(chosen.json).write_text(json.dumps(rows, indent=1) + "\n")
    out.print(verdict(rows))
    if chosen.plot:
        for path in plots.draw(rows, Path(chosen.plot), "stream"):
            out.print(f"plot: {path}")
    return int(any(row["contestants"][0].get("wrong") for row in rows))


def verdict(rows: Sequence[Row]) -> str:
    """Flatness, overhead and gain in one line, from the rows."""
    of = [{found["name"]: found for found in row["contestants"]} for row in rows]
    times = [found["StreamingCache, unpatched"]["median_ms"] for found in of]
    beside = [found["dense cache, as many keys"]["median_ms"] for found in of]
    again = [found["recomputed window"]["median_ms"] for found in of]
    overhead = statistics.median(t / b - 1 for t, b in zip(times, beside))
    return (
        f"ms per token from {rows[0]['length']:,} to {rows[-1]['length']:,} tokens: {min(times):.3g} to {max(times):.3g}; against a dense "
        f"cache of as many keys {overhead:+.1%}; recomputing the window takes {statistics.median(a / t for a, t in zip(again, times)):.0f} "
        "times as long (the unpatched model in all of them)"
    )


def measure(
    config: dict[str, int], dtype: torch.dtype, dtype_name: str, lengths: Sequence[int], runs: int, on: Any
) -> Any:
    """A row for each length, as soon as it is measured."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    import fastllm

    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**config)).to(on.name, dtype).eval().requires_grad_(False)
    patched = copy.deepcopy(plain)
    for ours, theirs in zip(patched.parameters(), plain.parameters()):
        ours.data = theirs.data
    fastllm.patch(patched)
    weights = sum(p.nbytes for p in plain.parameters()) - plain.model.embed_tokens.weight.nbytes
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> Tensor:
        return torch.randint(config["vocab_size"], (1, count), generator=generator).to(on.name)

    caches = {model: fastllm.StreamingCache(model, SINKS, WINDOW) for model in (plain, patched)}
    seen = 0
    source, target = (torch.ones(on.copied_bytes // 4, device=on.name) for _ in range(2))
    for length in lengths:
        while seen < length:
            count = min(length - seen, 4096)
            _step(patched, tokens(count), caches[patched])
            seen += count
        _take_over(caches[plain], caches[patched])
        one = tokens(1)
        there = _step(patched, one, caches[patched]), _step(plain, one, caches[plain])
        seen += 1
        error = (there[0] - there[1]).abs().max().item()
        wrong = error > (1e-3 if dtype == torch.float32 else 0.1) * there[1].abs().max().item()
        calls: dict[str, Callable[[], Any]] = {
            "fastllm": partial(_step, patched, one, caches[patched]),
            "StreamingCache, unpatched": partial(_step, plain, one, caches[plain]),
        }
        dense = {"dense cache, as many keys": VISIBLE - 1}
        if length <= DENSE:
            dense["eager"] = length - 1
        held = {}
        for name, keys in dense.items():
            held[name] = DynamicCache(config=plain.config)
            _fill(held[name], plain, keys, dtype, on.name)
            calls[name] = _dense_step(plain, one, held[name])
        calls["recomputed window"] = partial(_step, plain, tokens(VISIBLE), None)
        samples, copies = _timed(calls, runs, on, lambda: target.copy_(source))
        seen += runs + 1
        yield _row(
            config, dtype_name, length, runs, samples, copies, on, weights, caches, held, error, wrong, length > DENSE
        )
        held.clear()


def _row(
    config: dict[str, int], dtype: str, length: int, runs: int, samples: dict[str, list[float]], copies: list[float], on: Any,
    weights: int, caches: Any, held: Any, error: float, wrong: bool, no_dense: bool,
) -> Row:  # fmt: skip
    speed = 2 * on.copied_bytes / statistics.median(copies)
    streaming = next(iter(caches.values()))
    moved = weights + streaming.memory_bytes()
    ours = statistics.median(samples["fastllm"][1:])
    contestants = []
    for name, (first, *seconds) in samples.items():
        median = statistics.median(seconds)
        extra = streaming.memory_bytes() if "Streaming" in name or name == "fastllm" else None
        if name in held:
            extra = sum(t.nbytes for layer in held[name].layers for t in (layer.keys, layer.values))
        contestants.append(
            {
                "name": name, "first_ms": 1e3 * first, "median_ms": 1e3 * median,
                "quartile_ms": [1e3 * q for q in quartiles(seconds)], "gb_per_s": moved / median / 1e9,
                "share_of_limit": moved / speed / median, "ratio": median / ours,
                "extra_bytes": extra, "error": error if name == "fastllm" else 0.0,
            }
        )  # fmt: skip
    contestants[0]["wrong"] = wrong
    if no_dense:
        contestants.append({"name": "eager", "missing": f"a dense cache of more than {DENSE:,} tokens is not tried"})
    return {
        "case": f"decode {_name(config)} {SINKS}+{WINDOW} after {length} {dtype}", "op": "decode",
        "shape": f"{_name(config)} {SINKS}+{WINDOW} after {length}", "length": length, "dtype": dtype, "pass": "forward",
        "runs": runs, "bytes": moved, "flops": 0, "copy_gb_per_s": speed / 1e9, "limit_ms": 1e3 * moved / speed,
        "limited_by": "memory", "contestants": contestants,
    }  # fmt: skip


def _name(config: dict[str, int]) -> str:
    return "llama 134M" if config["hidden_size"] == 768 else "llama tiny"


@torch.no_grad()
def _step(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """Logits after these tokens."""
    return model(tokens, past_key_values=cache, use_cache=cache is not None, logits_to_keep=1).logits[0, -1].float()


def _dense_step(model: Any, one: Tensor, cache: Any) -> Callable[[], Any]:
    def step() -> Callable[[], None]:
        _step(model, one, cache)
        return lambda: cache.crop(-1)  # not part of the time

    return step


def _fill(cache: Any, model: Any, keys: int, dtype: torch.dtype, where: str) -> None:
    """A dense cache of this many keys. Numbers of any kind cost the same."""
    config = model.config
    shape = (1, config.num_key_value_heads, keys, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=where).to(dtype) for _ in range(2)), layer)


def _take_over(cache: Any, other: Any) -> None:
    """What another model's cache of the same kind holds."""
    cache.stream.counts, cache.stream.columns = list(other.stream.counts), other.stream.columns
    for mine, theirs in zip(cache.rings, other.rings):
        mine.lazy_initialization(theirs.keys, theirs.values)
        mine.keys.copy_(theirs.keys)
        mine.values.copy_(theirs.values)
        mine.masters.copy_(theirs.masters)


def _timed(
    calls: dict[str, Callable[[], Any]], runs: int, on: Any, copy_once: Callable[[], Any]
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each run, the first call's ahead of them, contestants taking turns; and of a copy."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    copies: list[float] = []
    gc.collect()
    for _ in range(runs + 1):
        for name, call in calls.items():
            on.wait()
            began = time.perf_counter()
            after = call()
            on.wait()
            samples[name].append(time.perf_counter() - began)
            if callable(after):  # a tensor is not
                after()
        copies.append(on.seconds(copy_once))
    return samples, copies
