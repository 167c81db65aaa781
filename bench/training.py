"""Trainers in processes of their own, which take turns: each has its own peak memory and its own model, and a
disturbance of the machine meets them all."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from bench.device import Cpu, Cuda
from fastllm.train import step_flops

KINDS = ("unpatched", "torch.compile", "patched")


@dataclass(frozen=True)
class Step:
    loss: float
    seconds: float


class Trainer:
    """A Llama from Transformers with random weights, and its training step: forward pass with labels, backward pass,
    optimizer step, gradients released. Everything random follows from `seed`. Batches are full rows, without padding."""

    def __init__(
        self,
        kind: str,
        config: dict[str, Any],
        dtype: torch.dtype,
        batch: Callable[[int], Tensor],
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        rate: Callable[[int], float],
        seed: int = 0,
        checkpointing: bool = False,
        device: Cpu | Cuda | None = None,
    ) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        import fastllm

        self.device = device or Cpu()
        torch.manual_seed(seed)
        whole = LlamaConfig(attn_implementation="sdpa", use_cache=False, **config)
        with torch.device(self.device.name):
            self.model = LlamaForCausalLM(whole).to(dtype)
        self.model.train()
        if checkpointing:
            newer = getattr(self.model, "activation_checkpointing_enable", None)  # the name since transformers 5.23
            (newer or self.model.gradient_checkpointing_enable)()
        self.built = self.device.reset_peak()  # ahead of patching and compiling, so that what they need counts
        self.peak = 0
        self.report = str(fastllm.patch(self.model)) if kind == "patched" else ""
        if kind == "torch.compile":
            self.model.compile(dynamic=False)
        self.batch, self.rate = batch, rate
        self.optimizer = optimizer(list(self.model.parameters()))
        self.step = 0

    def describe(self) -> dict[str, Any]:
        rows, length = self.batch(0).shape
        flops = step_flops(self.model, [length] * rows)
        return {
            "tokens": rows * length,
            "trainable_tokens": rows * (length - 1),  # of a row's first token nothing is predicted
            "flops": flops.model,
            "hardware_flops": flops.hardware,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "report": self.report,
            "peak_over_built": self._peak_over_built(),
        }

    def _peak_over_built(self) -> int | None:
        """Bytes: the most this process has held since the model was built, less what it held then. Unlike
        measured_step it counts what is kept from one step to the next, and preparations."""
        if self.built is None:
            return None
        self.peak = max(self.peak, self.device.peak())
        return self.peak - self.built

    def steps(self, count: int) -> list[Step]:
        """Trains on the next `count` batches."""
        return [self._one() for _ in range(count)]

    def measured_step(self) -> int | None:
        """One more step, for its memory: bytes of weights and optimizer state, and the growth above what the process holds
        between steps. None where the system does not tell."""
        self._peak_over_built()  # which the reset would lose
        before = self.device.reset_peak()
        self._one()
        if before is None:
            return None
        kept = [p for p in self.model.parameters()]
        kept += [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return self.device.peak() - before + sum(t.nbytes for t in kept)

    def held_out_loss(self, first: int, count: int) -> float:
        """Mean loss over batches `first` to `first + count`, without training."""
        self.model.eval()
        with torch.no_grad():
            losses = [self._loss(self.batch(n).to(self.device.name)).item() for n in range(first, first + count)]
        self.model.train()
        return sum(losses) / count

    def _loss(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, labels=tokens).loss

    def _one(self) -> Step:
        tokens = self.batch(self.step).to(self.device.name)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step)
        self.device.wait()
        begin = time.perf_counter()
        loss = self._loss(tokens)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.device.wait()
        seconds = time.perf_counter() - begin
        self.step += 1
        return Step(loss.item(), seconds)


class Turns:
    """An object built in a process of its own; its methods are called by name, one call at a time."""

    def __init__(self, build: Callable[..., Any], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, build, arguments), daemon=True)
        self.process.start()
        theirs.close()

    def call(self, method: str, *arguments: Any) -> Any:
        try:
            self.connection.send((method, arguments))
            good, result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise RuntimeError(f"a training process ended early, with exit code {self.process.exitcode}") from None
        if not good:
            raise RuntimeError(result)
        return result

    def close(self) -> None:
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.terminate()


def _serve(connection: Connection, build: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    served: Any = None
    while True:
        try:
            method, given = connection.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            served = served or build(*arguments)
            answer = (True, getattr(served, method)(*given))
        except KeyboardInterrupt:
            return
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send(answer)


@contextmanager
def taking_turns(build: Callable[..., Any], kinds: tuple[str, ...], *arguments: Any) -> Iterator[dict[str, Turns]]:
    """One process per kind, each holding ``build(kind, *arguments)``; all end with the block."""
    made = {kind: Turns(build, kind, *arguments) for kind in kinds}
    try:
        yield made
    finally:
        for turns in made.values():
            turns.close()
