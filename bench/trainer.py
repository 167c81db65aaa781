"""What `fastllm train` adds to a bare training step, and what packing and patching are worth inside it.

    python -m bench trainer [--quick] [--only overhead|packing] [--json F]          seven minutes on 2 cores

Overhead: a Llama of 134 million parameters (bf16, rows of 2048 tokens, SGD without clipping) is trained by `fastllm train` patched and
unpatched, beside the bare loop of `python -m bench train`, a step of each in turn. Everything of a step but forward pass, backward
pass and optimizer is the trainer's own. Packing: stage sft on conversations of mixed length, packed and padded in turn.
"""

from __future__ import annotations

import json
import os
import queue
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from bench import device, machine, suite, trainer_page
from bench.arguments import Parser
from bench.measure import quartiles
from bench.train import SHAPES, TOKENS, build
from bench.training import taking_turns

PARTS = ("overhead", "packing")
STEPS, QUICK_STEPS = 8, 2
PATCHED, UNPATCHED, PADDED, PACKED = "fastllm train, patched", "fastllm train, unpatched", "padded", "packed"
BARE = {"bare loop, unpatched": "unpatched", "bare loop, patched": "patched"}
SMALL = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 32000,
}  # fmt: skip
ROWS, LONGEST, CAPACITY = 8, 1024, 1088  # rows of a padded batch; tokens of the longest, and of a packed row


def main(arguments: Sequence[str]) -> int:
    options = suite.parser("trainer", (__doc__ or "").split("\n\n")[0])
    options.add_argument("--only", choices=PARTS, help="this part alone; the other stays what it was in --json")
    chosen = options.parse_args(arguments)
    if chosen.plot:
        options.error("--plot: there is nothing to draw")
    suite.check_writable(options, chosen.json)
    record = _before(options, chosen.json) if chosen.only else {}
    record = {"suite": "trainer"} | record
    out = suite.console()
    for part in PARTS:
        if chosen.only in (None, part):
            measure = overhead if part == "overhead" else packing
            with tempfile.TemporaryDirectory() as folder:
                found = measure(Path(folder), QUICK_STEPS if chosen.quick else STEPS)
            record[part] = found | {"machine": machine.describe()}
            if chosen.json:
                Path(chosen.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record["machine"] = next(record[part]["machine"] for part in PARTS if part in record)
    if chosen.json:
        Path(chosen.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out.print(trainer_page.page(record), soft_wrap=True, markup=False)
    if chosen.quick:
        print("--quick: too few steps to quote")
    return 0


def _before(options: Parser, path: str | None) -> dict[str, Any]:
    try:
        return json.loads(Path(path or "").read_text(encoding="utf-8")) if path and Path(path).stat().st_size else {}
    except (OSError, ValueError) as error:
        options.error(f"--json {path} holds no record to add to: {error}")


# ---- measuring ---------------------------------------------------------------------------------------------------


def overhead(folder: Path, steps: int) -> dict[str, Any]:
    kinds = (*BARE, UNPATCHED, PATCHED)
    seconds, parts = _in_turn(_build_overhead, kinds, folder, steps)
    own = {
        kind: [
            1 - sum(part[name] for name in ("forward", "backward", "optimizer")) / part["whole"] for part in parts[kind]
        ]
        for kind in (UNPATCHED, PATCHED)
    }
    return {"case": f"llama 134M bf16 1x{TOKENS}", "steps": steps, "seconds": seconds, "parts": parts, "own_share": own}


def packing(folder: Path, steps: int) -> dict[str, Any]:
    _, parts = _in_turn(_build_packing, (PADDED, PACKED), folder, steps)
    lengths = _lengths(random.Random(0), 2000)
    told = {"mean": statistics.mean(lengths), "quartiles": quartiles(lengths), "longest": max(lengths)}
    return {
        "case": f"llama 42M bf16, stage sft, {ROWS} rows padded",
        "steps": steps,
        "parts": parts,
        "capacity": CAPACITY,
        "lengths": told,
    }


def _in_turn(build_one: Callable[..., Any], kinds: tuple[str, ...], folder: Path, steps: int) -> Any:
    """Seconds, and what else each step told, by kind; a step of each kind in turn, after a first that warms up."""
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    parts: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    with taking_turns(build_one, kinds, str(folder), steps + 2) as trainers:
        for step in range(steps + 1):
            for kind, trainer in trainers.items():
                found = trainer.call("step") if kind not in BARE else trainer.call("steps", 1)[0].seconds
                if step:
                    parts[kind].append(found if isinstance(found, dict) else {"whole": found})
                    seconds[kind].append(parts[kind][-1]["whole"])
    return seconds, parts


def _build_overhead(kind: str, folder: str, steps: int) -> Any:
    if kind in BARE:
        return build(BARE[kind], SHAPES["134m"], False, device.Cpu())
    texts = [{"text": "".join(random.Random(n).choices("abcdefgh ", k=TOKENS - 1))} for n in range(steps + 1)]
    return Stepped(
        Path(folder) / kind.replace(" ", "-"), SHAPES["134m"].config, texts, steps,
        {
            "stage": "pretrain", "patch": "auto" if kind == PATCHED else False, "max_length": TOKENS,
            "per_device_train_batch_size": 1, "optim": "sgd", "max_grad_norm": 0.0, "packing": kind == PATCHED,
        },
    )  # fmt: skip


def _lengths(random_numbers: random.Random, count: int) -> list[int]:
    """Of conversations: log-normal, half of them below 200 tokens, cut at LONGEST."""
    return [min(LONGEST, max(24, round(random_numbers.lognormvariate(5.3, 0.8)))) for _ in range(count)]


def _build_packing(kind: str, folder: str, steps: int) -> Any:
    numbers = random.Random(0)
    rows = []
    for length in _lengths(numbers, 60 * steps):
        asked = "".join(numbers.choices("abcdefgh ", k=length // 4))
        rows.append({"prompt": asked, "response": "".join(numbers.choices("abcdefgh ", k=length - length // 4))})
    mean = statistics.mean(_lengths(random.Random(0), 2000))
    bins = max(1, round(ROWS * mean / CAPACITY))
    return Stepped(
        Path(folder) / kind, SMALL, rows, steps,
        {
            "stage": "sft", "max_length": CAPACITY, "per_device_train_batch_size": bins if kind == PACKED else ROWS,
            "packing": kind == PACKED, "optim": "sgd",
        },
    )  # fmt: skip


class Stepped:
    """A run of `fastllm train` that makes a step when told to; between its steps it waits where the Trainer calls back."""

    def __init__(
        self, folder: Path, shape: dict[str, Any], rows: list[dict[str, str]], steps: int, settings: dict[str, Any]
    ) -> None:
        from fastllm.train import config
        from fastllm.train.examples import byte_tokenizer
        from fastllm.train.run import Run

        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  what runs tell their user; errors come by the pipe
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        folder.mkdir(parents=True)
        shape = {"max_position_embeddings": 2 * TOKENS, **shape}
        transformers.LlamaConfig(**shape, use_cache=False).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.run = Run(
            config.parse({
                "model": str(folder), "from_scratch": True, "dtype": "bfloat16", "data": str(folder / "rows.jsonl"),
                "cache_dir": str(folder / "cache"), "output_dir": str(folder / "runs"), "max_steps": steps,
                "num_train_epochs": 1000, "save_strategy": "no", "learning_rate": 1e-3, **settings,
            })
        )  # fmt: skip
        trainer = self.run.trainer
        self.spent = dict.fromkeys(("forward", "backward", "optimizer", "positions", "tokens"), 0.0)
        trainer.model.forward = self._timed("forward", trainer.model.forward)
        trainer.model.register_forward_pre_hook(self._count, with_kwargs=True)
        trainer.accelerator.backward = self._timed("backward", trainer.accelerator.backward)
        self.gate = _Gate(self)
        trainer.add_callback(self.gate)
        threading.Thread(target=self._train, daemon=True).start()

    def _train(self) -> None:
        try:
            self.run.trainer.train()
        except BaseException as error:
            self.gate.done.put(error)
            raise

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            result = function(*args, **kwargs)
            self.spent[part] += time.perf_counter() - begun
            return result

        return timed

    def _count(self, model: Any, _: Any, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        self.spent["positions"] += inputs["input_ids"].numel()
        self.spent["tokens"] += inputs["input_ids"].numel() if mask is None else int(mask.sum())

    def step(self) -> dict[str, float]:
        """The next step, from the end of the one before: its whole seconds, those of its parts, positions and real tokens."""
        self.spent.update(dict.fromkeys(self.spent, 0.0))
        self.gate.go.release()
        found = self.gate.done.get()
        if isinstance(found, BaseException):
            raise RuntimeError(str(found)) from found
        return {**found, **self.spent}


class _Gate(transformers.TrainerCallback):
    """The last callback: a step begins and ends where it lets the Trainer go on."""

    def __init__(self, of: Stepped) -> None:
        self.of, self.go, self.begun = of, threading.Semaphore(0), 0.0
        self.done: queue.Queue[Any] = queue.Queue()

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        optimizer, model = given["optimizer"], given["model"]
        optimizer.step = self.of._timed("optimizer", optimizer.step)
        model.zero_grad = self.of._timed("optimizer", model.zero_grad)
        self._wait()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done.put({"whole": time.perf_counter() - self.begun})
        self._wait()

    def _wait(self) -> None:
        self.go.acquire()
        self.begun = time.perf_counter()
