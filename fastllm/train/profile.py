"""A torch.profiler trace of a few training steps, written for TensorBoard and Perfetto and summed up in a table and in JSON."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerAction, ProfilerActivity

from fastllm.train import trace

STEPS, WARMUP = 3, 2
_SHOWN = 5  # operations in the table


class StepProfiler:
    """Records `steps` steps of a training loop after `warmup` others, then writes and tells what they were spent on.

    The loop says where it is: ``waiting()`` when it goes for a batch, ``working()`` when it has it, ``stepped()`` when the step
    is done. In between it may do what is no part of a step. Nothing is computed differently; a step that is recorded takes
    longer, by some microseconds for every operation, and ends when the device is done with it.

    Writes into `folder`, for each process: rank-R.STEP.pt.trace.json.gz, and rank-R.json with what ``trace.Profile`` holds.

    Args:
        folder: made when there is something to write.
        device: of the training.
        rank: of the process.
        first: number of the first step there is, from 1.
        left: steps there are; of fewer than asked for, those at the end are recorded.
        peak: operations a second that the device does at best, for the utilisation; None: not known.
        tell: takes the table, on rank 0; default: standard error.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        device: torch.device,
        *,
        rank: int = 0,
        first: int = 1,
        left: int = STEPS + WARMUP,
        steps: int = STEPS,
        warmup: int = WARMUP,
        peak: float | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.folder, self.device, self.rank, self.peak = Path(folder), device, rank, peak
        self.tell = tell or (lambda text: print(text, file=sys.stderr, flush=True))
        self.profile: trace.Profile | None = None
        self._record = max(1, min(steps, left))
        self._skip = max(0, min(warmup, left - self._record))
        self._first, self._done = first, 0
        self._documents: list[Sequence[int]] = []
        self._range: Any = None
        if device.type == "cpu":
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells when it starts; of a GPU it has more to say
        self._activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._paused = False
        self._torch: Any = torch.profiler.profile(
            activities=self._activities, schedule=self._action, on_trace_ready=self._write, record_shapes=True
        )
        self._torch.start()
        self.waiting()

    def _action(self, step: int) -> ProfilerAction:
        if step == self._skip + self._record - 1:
            return ProfilerAction.RECORD_AND_SAVE
        if self._skip <= step < self._skip + self._record:
            return ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == self._skip - 1 else ProfilerAction.NONE

    @property
    def recording(self) -> bool:
        return self._torch is not None and self._skip <= self._done < self._skip + self._record

    def pause(self) -> None:
        """Until the next `waiting` nothing is recorded: an evaluation may be longer than memory is large."""
        if self.recording and not self._paused:
            self._paused = True
            self._torch.toggle_collection_dynamic(False, self._activities)

    def waiting(self) -> None:
        if self._paused:
            self._paused = False
            self._torch.toggle_collection_dynamic(True, self._activities)
        self._mark(trace.DATA)

    def working(self) -> None:
        self._mark(trace.STEP)

    def stepped(self, documents: Callable[[], list[list[int]]] = list) -> None:
        """A step is done. documents: gives, for each packed batch of it, the lengths of its rows."""
        if self._torch is None:
            return
        self.wait()
        self._mark(None)
        if self.recording:
            self._documents += documents()
        self._done += 1
        self._torch.step()
        if self._done == self._skip + self._record:
            self.close()
        else:
            self.waiting()

    def wait(self) -> None:
        """Until the device is done, where the step is recorded: its work is to lie within the step's time."""
        if self.recording and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Ends, with what has been recorded if training stopped early."""
        if self._torch is not None:
            self._mark(None)
            stopped, self._torch = self._torch, None
            stopped.stop()

    def _mark(self, name: str | None) -> None:
        """What has begun; ends what came before."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if self._torch is not None and name is not None:
            self._range = torch.profiler.record_function(name)
            self._range.__enter__()

    def _write(self, recorded: Any) -> None:
        recorded_steps = min(self._done - self._skip, self._record)
        if recorded_steps < 1:
            return
        last = self._first + self._done - 1
        path = self.folder / f"rank-{self.rank}.{last}.pt.trace.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
            self.profile = found = trace.read(path, self._documents, recorded_steps)
            summary = {
                "first_step": last - recorded_steps + 1, "last_step": last, "rank": self.rank, "device": _name(self.device),
                "trace": path.name, **_plain(found), "mfu": self._mfu(found),
            }  # fmt: skip
            (self.folder / f"rank-{self.rank}.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        except (OSError, ValueError) as error:  # a full disk, say: no reason to stop training
            self.tell(f"warning: no profile: {' '.join(str(error).split())}")
            return
        if self.device.type == "cuda" and found.device == "cpu":
            self.tell("warning: the profiler has recorded no kernel of the GPU; what follows is the time of the CPU")
        if self.rank == 0:
            steps = f"step {last}" if recorded_steps == 1 else f"steps {last - recorded_steps + 1} to {last}"
            self.tell(f"profile of {steps}, {path}\n{table(found, self._mfu(found))}")

    def _mfu(self, found: trace.Profile) -> float | None:
        return found.tflops * 1e12 / self.peak if self.peak else None


def table(profile: trace.Profile, mfu: float | None = None) -> str:
    """A profile for people."""
    where = "the GPU" if profile.device == "gpu" else "the CPU"
    lines = [
        f"{profile.seconds / profile.steps:.4g} s a step, the profiler's own work included; time of {where} by kind of work"
    ]
    lines += [f"  {kind:<14}{share:>7.1%}" for kind, share in profile.shares.items()]
    flops = profile.matmul_flops + profile.attention_flops
    if flops:  # else no shapes were recorded
        told = f"{profile.tflops:.4g} TFLOPS by the shapes of {flops / profile.steps:.4g} FLOPs a step"
        lines.append(told + (f", {mfu:.1%} of the device's peak" if mfu is not None else ""))
    if profile.uncounted:
        lines.append(f"without those of {', '.join(profile.uncounted)}, whose shapes do not tell them")
    lines.append("longest by their own time:")
    for one in profile.operations[:_SHOWN]:
        calls = one.calls / profile.steps
        share = one.seconds / profile.seconds
        lines.append(f"  {share:>6.1%}  {one.kind:<14}{_short(one.name)}, {calls:,.4g} a step")
    return "\n".join(lines)


def _short(name: str, width: int = 60) -> str:
    return name if len(name) <= width else f"{name[: width - 3]}..."


def _plain(profile: trace.Profile) -> dict[str, Any]:
    return {
        **asdict(profile),
        "step_s": profile.seconds / profile.steps,
        "tflops": profile.tflops,
        "operations": [asdict(one) for one in profile.operations[:50]],
    }


def _name(device: torch.device) -> str:
    with contextlib.suppress(RuntimeError, AssertionError):
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
    return device.type
