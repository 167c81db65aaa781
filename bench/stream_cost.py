"""What a token costs after a short text and after a long one, by cache: the streaming suite's timings."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.measure import quartiles
from bench.results import Row
from bench.train import SHAPES

SINKS, WINDOW = 4, 1020
VISIBLE = SINKS + WINDOW
LENGTHS, QUICK_LENGTHS = (1024, 4096, 16384, 102_400), (1024, 2048)
READ = (
    4096  # tokens really read by the large model; that a longer text costs what its counter says, the small one shows
)
DENSE = 16_384  # the longest text that the dense cache holds here
RUNS, QUICK_RUNS = 40, 5
SELDOM = 8  # what takes long has its turn in every eighth round
STREAM, QUICK_STREAM = 200_000, 5_000  # tokens through a model of one layer, one by one
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
    "vocab_size": 256, "max_position_embeddings": 2048,
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(quick: bool, dtype: str, on: Any) -> Iterator[Row]:
    """A row for each length, as soon as it is measured."""
    runs, lengths = (QUICK_RUNS, QUICK_LENGTHS) if quick else (RUNS, LENGTHS)
    return by_length(TINY if quick else SHAPES["134m"].config, DTYPES[dtype], dtype, lengths, runs, on)


@torch.no_grad()
def stream(length: int, on: Any) -> dict[str, Any]:
    """Random tokens through a model of one layer, one by one: ms per token and bytes by how far the text has come, and how far the
    last logits are from those of a plain forward pass over sinks and window alone, which in one layer is the definition."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import fastllm

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**{**TINY, "num_hidden_layers": 1})).to(on.name).eval()
    fastllm.patch(model)
    ids = torch.randint(TINY["vocab_size"], (1, length), generator=torch.Generator().manual_seed(2)).to(on.name)
    cache = fastllm.StreamingCache(model, SINKS, WINDOW)
    ends = [n for n in (1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000) if n <= length]
    times, found, logits = [], [], torch.empty(0)
    for n, token in enumerate(ids.split(1, 1), 1):
        on.wait()
        began = time.perf_counter()
        logits = _step(model, token, cache)
        on.wait()
        times.append(time.perf_counter() - began)
        if n in ends:
            found.append({"tokens": n, "ms": 1e3 * statistics.median(times[-1000:]), "bytes": cache.memory_bytes()})
    visible = torch.cat((ids[:, :SINKS], ids[:, -WINDOW:]), 1)
    return {
        "tokens": length, "evicted": cache.evicted, "by_tokens": found, "seconds": sum(times),
        "error": (logits - _step(model, visible, None)).abs().max().item(), "largest_logit": logits.abs().max().item(),
    }  # fmt: skip


def gates(rows: Sequence[Row], streamed: dict[str, Any]) -> list[dict[str, Any]]:
    """What is asked of a token's time and memory, of medians in the same run."""
    of = [{found["name"]: found for found in row["contestants"]} for row in rows]

    def over(one: str, other: str) -> list[float]:
        return [found[one]["median_ms"] / found[other]["median_ms"] for found in of]

    ours, alone = "fastllm", "StreamingCache, unpatched"
    beside = [over(ours, "dense cache, as many keys, patched"), over(alone, "dense cache, as many keys")]
    # Lengths are minutes apart: against a peer whose work is the same at each of them, timed in the same turns.
    flat = max(max(ratios) / min(ratios) for ratios in beside)
    sizes = {found[ours]["extra_bytes"] for found in of}
    later = {at["bytes"] for at in streamed["by_tokens"] if at["tokens"] >= VISIBLE}
    again = min(over("recomputed window", alone))
    overhead = [statistics.median(ratios) for ratios in beside]
    reach = f"from {rows[0]['length']:,} to {rows[-1]['length']:,} tokens"
    return [
        {
            "says": f"ms per token {reach} the same to 20 % (±10 %), over those of a dense cache of as many keys",
            "holds": flat < 1.2,
            "found": f"{flat - 1:.1%} apart",
        },
        {
            "says": f"bytes the same {reach} and in a stream of {streamed['tokens']:,}",
            "holds": len(sizes) == len(later) == 1,
            "found": ", ".join(f"{size:,}" for size in sorted(sizes | later)),
        },
        {
            "says": "at most 5 % more time than a dense cache of as many keys (patched; unpatched)",
            "holds": max(overhead) <= 1.05,
            "found": "; ".join(f"{ratio - 1:+.1%}" for ratio in overhead),
        },
        {"says": "at least 20 times as fast as recomputing the window", "holds": again >= 20, "found": f"{again:.0f} times"},
        {
            "says": f"after {streamed['tokens']:,} tokens one by one, logits to 1e-4 those of sinks and window alone",
            "holds": streamed["error"] < 1e-4,
            "found": f"{streamed['error']:.1e}",
        },
    ]  # fmt: skip


def by_length(
    config: dict[str, int], dtype: torch.dtype, dtype_name: str, lengths: Sequence[int], runs: int, on: Any
) -> Iterator[Row]:
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
        if seen < min(length, READ):
            _step(patched, tokens(min(length, READ) - seen), caches[patched])
        seen = length
        caches[patched].stream.counts, caches[patched].stream.columns = [length], length
        _take_over(caches[plain], caches[patched])
        one = tokens(1)
        there = _step(patched, one, caches[patched]), _step(plain, one, caches[plain])
        error = (there[0] - there[1]).abs().max().item()
        wrong = error > (1e-3 if dtype == torch.float32 else 0.1) * there[1].abs().max().item()
        calls: dict[str, Callable[[], Any]] = {
            "fastllm": partial(_step, patched, one, caches[patched]),
            "StreamingCache, unpatched": partial(_step, plain, one, caches[plain]),
        }
        dense = {
            "dense cache, as many keys, patched": (patched, VISIBLE - 1),
            "dense cache, as many keys": (plain, VISIBLE - 1),
        }
        if length <= DENSE:
            dense["eager"] = (plain, length - 1)
        held = {}
        for name, (model, keys) in dense.items():
            held[name] = DynamicCache(config=plain.config)
            _fill(held[name], plain, keys, dtype, on.name)
            calls[name] = _dense_step(model, one, held[name])
        calls["recomputed window"] = partial(_step, plain, tokens(VISIBLE), None)
        samples, copies = _timed(calls, runs, on, lambda: target.copy_(source))
        seen = caches[patched].tokens_seen
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
    for turn in range(runs + 1):
        for name, call in calls.items():
            if name == "recomputed window" and turn % min(SELDOM, runs):
                continue
            on.wait()
            began = time.perf_counter()
            after = call()
            on.wait()
            samples[name].append(time.perf_counter() - began)
            if callable(after):  # a tensor is not
                after()
        copies.append(on.seconds(copy_once))
    return samples, copies
