"""``python -m bench ppo``: an iteration of PPO on a Llama: rollout, scoring, training; samples and tokens per second, TFLOPS."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import statistics
import string
import tempfile
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from bench import device, eager, machine, plots, suite
from bench.measure import matmul_probe, quartiles
from bench.training import taking_turns
from fastllm.train import peak_flops

KINDS = ("plain", "unpatched", "patched")
PARTS = ("rollout", "score", "train")
RUNS, QUICK_RUNS = 10, 1


@dataclass(frozen=True)
class Shape:
    """A Llama of `parameters`; how many responses an iteration has, and at once in training; tokens of prompt and response."""

    name: str
    parameters: int
    config: dict[str, int]
    responses: int
    micro_batch: int
    prompt: int
    response: int


def _shape(
    name: str, parameters: int, sizes: tuple[int, ...], responses: int, micro_batch: int, prompt: int, response: int
) -> Shape:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
    more = {"vocab_size": 32000, "max_position_embeddings": prompt + response}
    config = {**dict(zip(keys, sizes)), **more, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    return Shape(name, parameters, config, responses, micro_batch, prompt, response)


SHAPES = {
    "58m": _shape("58M", 58_466_816, (512, 8, 8, 8, 1408), 8, 8, 64, 64),
    "134m": _shape("134M", 134_105_856, (768, 12, 12, 12, 2048), 8, 8, 128, 128),
    "1b": _shape("1.1B", 1_100_048_384, (2048, 22, 32, 4, 5632), 64, 16, 1024, 1024),
    "7b": _shape("6.7B", 6_738_415_616, (4096, 32, 32, 32, 11008), 16, 8, 1024, 1024),
}


def main(arguments: Sequence[str]) -> int:
    options = suite.parser(
        "ppo",
        "Times iterations of PPO (bf16, random weights, prompts and rewards; critic and reference; two passes over the responses) "
        f"with the trainer of fastllm, patched and unpatched, and with the plain composition: logits whole, GAE as a loop, the loss "
        f"in PyTorch. {RUNS} iterations each, in processes of their own: in turn on a CPU, one after the other on a GPU.",
    )
    options.add_argument("--shape", choices=SHAPES, default="58m", help="parameters of the model (default 58m)")
    options.add_argument(
        "--advantage", choices=("gae", "grpo"), default="gae",
        help="gae has a critic of the model's size; grpo compares four responses to each prompt (default gae)",
    )  # fmt: skip
    options.add_argument("--device", default="cpu", choices=device.NAMES, help="where the models are (default cpu)")
    chosen = options.parse_args(arguments)
    on = suite.found_device(options, chosen.device)
    shape = SHAPES[chosen.shape]
    together = [KINDS] if on.name == "cpu" else [(kind,) for kind in KINDS]
    trained = 2 if chosen.advantage == "gae" else 1
    least = (2 + 8 * trained) * shape.parameters * len(together[0])  # reference; weights, gradients and two moments
    suite.check_fits(options, chosen.shape, least, on)
    suite.check_writable(options, chosen.json, chosen.plot)
    runs = QUICK_RUNS if chosen.quick else RUNS
    where, out = machine.describe(on), suite.console()
    case = f"ppo {chosen.advantage} llama {shape.name} bf16 {shape.responses}x({shape.prompt}+{shape.response})"
    out.print(machine.sentence(where))
    out.print(
        f"median and quartiles of {runs} iterations{' (--quick: too few to quote)' if chosen.quick else ''} after one; AdamW. TFLOPS: "
        "model FLOPs of all passes, causal, logits of responses alone; MFU: share of the published peak; of matmul: TFLOPS over those "
        "of a large matrix product in the same run. Peak: growth within an iteration over weights and optimizer state, and these"
    )
    rows, matmul, failed = [], [], False
    for kinds in together:
        try:
            rows += measure(kinds, shape, chosen.advantage, on, runs, matmul)
        except RuntimeError as error:
            failed = True
            why = (str(error).strip().splitlines() or [""])[-1]
            out.print(f"{case}: {' and '.join(kinds)} failed: {why}", style="bold red")
    if not rows:
        return 1
    rate, base = 2 * on.matmul_size**3 / statistics.median(matmul), rows[0]
    for row in rows:
        row |= {
            "suite": "ppo", "case": case, "shape": chosen.shape, "advantage": chosen.advantage, "checkpointing": False, "runs": runs,
            "optimizer": "AdamW", "entropy_difference": abs(row["entropy"] / base["entropy"] - 1), "matmul_tflops": rate / 1e12,
            "of_matmul": row["tflops"] * 1e12 / rate, "machine": where,
        }  # fmt: skip
    out.print()
    out.print(case, style="bold")
    for one in tables(rows):
        out.print(one)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(rows, indent=1) + "\n")
    if chosen.plot:
        for path in plots.draw(rows, Path(chosen.plot), "ppo"):
            out.print(f"plot: {path}")
    return int(failed)


def measure(
    kinds: tuple[str, ...], shape: Shape, advantage: str, on: device.Cpu | device.Cuda, runs: int, matmul: list[float]
) -> list[dict[str, Any]]:
    """A row for each kind; the seconds of a large matrix product, timed between the iterations, go into `matmul`."""
    with taking_turns(build, kinds, shape, advantage, on) as trainers:
        first = {kind: trainer.call("iteration") for kind, trainer in trainers.items()}
        peak = {kind: trainer.call("measured_iteration") for kind, trainer in trainers.items()}
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        multiply = matmul_probe(torch.bfloat16, on)
        multiply()
        for _ in range(runs):
            for kind, trainer in trainers.items():
                found[kind].append(trainer.call("iteration"))
            on.wait()
            matmul.append(on.seconds(multiply))
        parameters = {kind: trainer.call("parameters") for kind, trainer in trainers.items()}
    limit = peak_flops(torch.device(on.name), torch.bfloat16)
    rows = []
    for kind in kinds:
        middle = {key: statistics.median(one[key] for one in found[kind]) for key in found[kind][0]}
        seconds = middle["seconds"]
        flops = sum(middle[f"{part}_flops"] for part in PARTS)
        row = {
            "contestant": kind, "parameters": parameters[kind], "median_s": seconds,
            "quartile_s": quartiles([one["seconds"] for one in found[kind]]), "first_s": first[kind]["seconds"],
            "samples_per_s": middle["samples"] / seconds, "tokens_per_s": middle["tokens"] / seconds, "flops": flops,
            "tflops": flops / seconds / 1e12, "mfu": flops / seconds / limit if limit else None, "peak_bytes": peak[kind],
            "entropy": first[kind]["entropy"],
        }  # fmt: skip
        for part in PARTS:
            row |= {f"{part}_s": middle[f"{part}_s"]}
            row[f"{part}_tflops"] = middle[f"{part}_flops"] / middle[f"{part}_s"] / 1e12
        rows.append(row)
    return rows


# ---- a contestant ----------------------------------------------------------------------------------------------------


def build(kind: str, shape: Shape, advantage: str, on: device.Cpu | device.Cuda) -> Iterations:
    return Iterations(kind, shape, advantage, on)


class Iterations:
    """Stage ppo of `fastllm train` at a shape, one iteration at a time; for "plain", with the composition of this file inside."""

    def __init__(self, kind: str, shape: Shape, advantage: str, on: device.Cpu | device.Cuda) -> None:
        from transformers import LlamaConfig

        from fastllm.train import config
        from fastllm.train.command import quiet
        from fastllm.train.examples import byte_tokenizer
        from fastllm.train.online.run import Run

        quiet()
        if on.name == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if kind == "plain":
            _compose()
        self.device, self.shape = on, shape
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        LlamaConfig(**shape.config).save_pretrained(place)
        byte_tokenizer().save_pretrained(place / "tokenizer")
        letters = random.Random(0)
        asked = [{"prompt": "".join(letters.choices(string.ascii_letters, k=2 * shape.prompt))} for _ in range(256)]
        (place / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        values: dict[str, Any] = {
            "stage": "ppo", "model": str(place / "config.json"), "tokenizer": str(place / "tokenizer"), "from_scratch": True,
            "dtype": "bfloat16", "patch": "auto" if kind == "patched" else False, "data": str(place / "prompts.jsonl"),
            "reward": "bench.ppo:length_of", "advantage": advantage, "max_length": shape.prompt + shape.response,
            "max_new_tokens": shape.response, "rollout_batch_size": shape.responses,
            "rollout_chunk_size": shape.responses, "per_device_train_batch_size": shape.micro_batch, "max_steps": 1000,
            "learning_rate": 1e-6, "lr_scheduler_type": "constant", "output_dir": str(place / "runs"), "save_strategy": "no",
            "cache_dir": str(place / "cache"), "kl_loss_coef": 0.0, "kl_coef": 0.05, "use_cpu": on.name == "cpu",
        }  # fmt: skip
        with contextlib.redirect_stderr(io.StringIO()):  # what a run tells its user; errors come as exceptions
            self.course = Run(config.parse(values)).course

    def parameters(self) -> int:
        return sum(p.numel() for p in self.course.engine.models.actor.parameters())

    def iteration(self) -> dict[str, float]:
        """Seconds of the whole and of its parts, FLOPs, and what the iteration tells. Samples are those of a seed by its number."""
        from fastllm.train.online import ppo

        course = self.course
        torch.manual_seed(course.step)
        self.device.wait()
        begun = time.perf_counter()
        told = ppo.iterate(course)
        self.device.wait()
        seconds = time.perf_counter() - begun
        course.step += 1
        spent = {f"{part}_s": value for part, value in course.clock.take().items()}
        return {**told, **spent, "seconds": seconds}

    def measured_iteration(self) -> int | None:
        """One more, for its memory: bytes of weights and optimizer state, and the growth above what is held between iterations."""
        before = self.device.reset_peak()
        self.iteration()
        if before is None:
            return None
        engine = self.course.engine
        kept = list(engine.models.parameters())
        kept += [v for state in engine.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return self.device.peak() - before + sum(t.nbytes for t in kept)


def length_of(prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Any]) -> list[float]:
    """A reward that costs nothing."""
    return [len(response) % 7 / 7 for response in responses]


def _compose() -> None:
    """Has this process's trainer do as the PPO trainers of RLHF libraries do: logits whole, GAE in a loop, the loss in PyTorch."""
    from fastllm import rl
    from fastllm.train.online import experience
    from fastllm.train.online import models as online

    def logits_of(self: Any, model: Any, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        whole = model(**online._inputs(model, ids, attention), use_cache=False).logits
        return whole[:, -mask.shape[1] - 1 : -1].float() / self.temperature

    def logprobs(self: Any, model: Any, ids: Tensor, attention: Tensor, mask: Tensor) -> Tensor:
        every = logits_of(self, model, ids, attention, mask).log_softmax(-1)
        found = every.gather(-1, ids[:, -mask.shape[1] :, None]).squeeze(-1)
        return found.masked_fill(~mask, 0.0)

    def policy_loss(
        self: Any, ids: Tensor, attention: Tensor, mask: Tensor, old_logprobs: Tensor, advantages: Tensor, **given: Any
    ) -> Any:
        every = logits_of(self, self.actor, ids, attention, mask).log_softmax(-1)
        found = every.gather(-1, ids[:, -mask.shape[1] :, None]).squeeze(-1)
        entropy = -(every.exp() * every).sum(-1)
        values = self.values(ids, attention, mask) if self.critic is not None else torch.zeros_like(found)
        old_values, returns = (
            torch.zeros_like(found) if given[key] is None else given[key] for key in ("old_values", "returns")
        )
        loss, *stats = eager.ppo_loss(
            found,
            old_logprobs,
            found.detach(),
            advantages,
            values,
            old_values,
            returns,
            entropy,
            mask,
            given["value_coef"],
            0.0,
            0.0,
        )
        return rl.PPOLoss(loss, dict(zip(eager.PPO_STATS, stats)))

    def gae(rewards: Tensor, values: Tensor, *, gamma: float, lam: float, mask: Tensor) -> tuple[Tensor, Tensor]:
        advantages, returns = eager.gae(rewards, values.masked_fill(~mask, 0.0), gamma, lam)
        return advantages.masked_fill(~mask, 0.0), returns.masked_fill(~mask, 0.0)

    online.Models.logprobs = logprobs  # type: ignore[method-assign]
    online.Models.policy_loss = policy_loss  # type: ignore[method-assign,assignment]
    experience.ops = types.SimpleNamespace(gae=gae)  # type: ignore[assignment]


HEADINGS = (
    "step s", "quartiles s", "speed", "rollout s", "score s", "train s", "samples/s", "tokens/s", "TFLOPS", "training's", "MFU",
    "of matmul", "peak MB", "entropy differs by",
)  # fmt: skip


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Seconds, and work; both at once are wider than a terminal."""
    made = []
    for columns in (slice(0, 8), slice(8, len(HEADINGS))):
        one = Table(box=None, pad_edge=False)
        one.add_column("", no_wrap=True)
        for heading in HEADINGS[columns]:
            one.add_column(heading, justify="right", no_wrap=True)
        for row in rows:
            one.add_row(row["contestant"], *cells(row, rows[0])[columns])
        made.append(one)
    return made


def cells(row: dict[str, Any], base: dict[str, Any]) -> list[str]:
    """What the tables and the page of results say of a contestant, by HEADINGS."""
    return [
        f"{row['median_s']:.2f}",
        "{:.2f}–{:.2f}".format(*row["quartile_s"]),
        f"{base['median_s'] / row['median_s']:.2f}×",
        *(f"{row[f'{part}_s']:.2f}" for part in PARTS),
        f"{row['samples_per_s']:.3g}",
        f"{row['tokens_per_s']:.0f}",
        f"{row['tflops']:.3g}",
        f"{row['train_tflops']:.3g}",
        "–" if row["mfu"] is None else f"{row['mfu']:.1%}",
        f"{row['of_matmul']:.0%}",
        f"{row['peak_bytes'] / 1e6:.0f}" if row["peak_bytes"] else "–",
        f"{row['entropy_difference']:.1e}",
    ]
