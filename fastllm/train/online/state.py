"""Checkpoints of a course, whole or not there, and the model at its end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fastllm.errors import CheckpointError
from fastllm.train import checkpoint, models, together
from fastllm.train.config import ModelOptions
from fastllm.train.online.course import Course, random_state, set_random_state

_COURSE = "course.pt"


def save(course: Course, run: Path, keep: int | None, *, writes: bool) -> None:
    """checkpoint-STEP in `run`: the actor as from_pretrained takes it, and all that training goes on from.

    Raises:
        CheckpointError: no room; the checkpoints before it are intact.
    """
    _check_space(course, run, writes)
    folder = run / f"{checkpoint.NAME}{course.step}"
    with checkpoint.written_whole(folder, writes=writes, together=_together(course)) as aside:
        with course.engine.whole():
            if writes:
                models.export(course.engine.models.actor, course.tokenizer, aside, "adapter")
        course.engine.save(aside, writes=writes)
        torch.save({"random": random_state(), "memory": course.memory}, aside / f"process-{course.rank}.pt")
        if writes:
            torch.save({**course.state_dict(), "world": course.world}, aside / _COURSE)
            told: dict[str, Any] = {"global_step": course.step, "prompts": course.asked}
            if course.best:
                told |= {"best_metric": course.best[0], "best_global_step": course.best[1]}
            (aside / checkpoint.STATE).write_text(json.dumps(told), encoding="utf-8")
    if writes:
        checkpoint.rotate(run, keep, run / f"{checkpoint.NAME}{course.best[1]}" if course.best else None)


def load(course: Course, folder: Path) -> None:
    """Goes on from a checkpoint, bit for bit.

    Raises:
        CheckpointError: it is of another stage, other models or another number of processes.
    """

    def read() -> tuple[dict[str, Any], dict[str, Any]]:
        if not (folder / _COURSE).is_file():
            raise CheckpointError(f"{folder} is no checkpoint of this stage: it has no {_COURSE}")
        state = checkpoint.load(folder / _COURSE)
        if state["world"] != course.world:
            raise CheckpointError(
                f"{folder} was written by {state['world']} processes, and this run has {course.world}"
            )
        # pickled: Python's and numpy's generators have states that safe loading does not know
        return state, checkpoint.load(folder / f"process-{course.rank}.pt", only_weights=False)

    found = together.agree(read)  # before the engine's load, in which processes wait for each other
    assert found is not None
    state, own = found
    course.engine.load(folder)
    course.load_state_dict(state)
    course.memory = own["memory"]
    set_random_state(own["random"])


def export(course: Course, run: Path, options: ModelOptions, *, writes: bool) -> Path:
    """The trained actor in `run`/final, and merged in final-merged where both are asked for, for plain transformers or peft."""
    kinds = {"adapter": ["adapter"], "merged": ["merged"], "both": ["adapter", "merged"]}[options.export]
    final = run / "final"
    for kind in kinds if options.lora else ["adapter"]:
        final = run / ("final-merged" if kind == "merged" and len(kinds) > 1 else "final")
        with checkpoint.written_whole(final, writes=writes, together=_together(course)) as aside, course.engine.whole():
            if writes:
                models.export(course.engine.models.actor, course.tokenizer, aside, kind)
    return final


def _together(course: Course) -> Any:
    return torch.distributed.barrier if course.world > 1 else None


def _check_space(course: Course, run: Path, writes: bool) -> None:
    """On every process that writes; all stop where one finds no room."""

    def check() -> None:
        earlier = checkpoint.complete(run)
        checkpoint.check_space(run, checkpoint.size_on_disk(earlier[-1]) if earlier else _bytes_to_save(course))

    together.agree(check, here=writes)


def _bytes_to_save(course: Course) -> int:
    """Before the first save: the actor, and of all that is trained weights and two moments, with DeepSpeed's copy in float32."""
    size = lambda p: getattr(p, "ds_numel", p.numel())  # noqa: E731
    actor = sum(size(p) * p.element_size() for p in course.engine.models.actor.parameters())
    return actor + sum(16 * size(p) for p in course.engine.models.parameters() if p.requires_grad)
