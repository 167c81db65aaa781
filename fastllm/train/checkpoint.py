"""Checkpoints that are whole or not there: written aside, forced to disk, renamed; and which of them to keep."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastllm.errors import CheckpointError
from fastllm.train.together import is_lost

NAME = "checkpoint-"
_ASIDE = ".saving-"  # what a crash leaves behind begins so
_REPLACED = ".replaced-"  # and so what was whole and about to be replaced
_LEFT = "left-"  # a checkpoint of a course that was left for an earlier one
_SPARE = 1.05  # a save may need so much more than was counted
_NEARLY_FULL = 0.85
STATE = "trainer_state.json"


def complete(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest last. Half-written ones have another name."""
    found = [p for p in run.glob(f"{NAME}*") if re.fullmatch(rf"{NAME}\d+", p.name) and (p / STATE).is_file()]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(NAME))


def find(path: str | os.PathLike[str]) -> Path:
    """The checkpoint meant by a path: itself, or the newest complete one of a run.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint or run {folder}")
    if (folder / STATE).is_file():
        return folder
    recover(folder)
    if not (found := complete(folder)):
        raise CheckpointError(f"{folder} holds no complete checkpoint")
    return found[-1]


def size_on_disk(folder: Path) -> int:
    """Bytes."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def check_space(folder: Path, needed: int) -> None:
    """Warns where the disk is nearly full.

    Raises:
        CheckpointError: `needed` bytes do not fit.
    """
    usage = shutil.disk_usage(folder)
    if needed * _SPARE > usage.free:
        left = list(folder.glob(f"{_LEFT}{NAME}*"))
        hint = f"; there are also {told_left(left)}" if left else ""
        raise CheckpointError(
            f"{folder} has {_bytes(usage.free)} free, and a checkpoint takes {_bytes(int(needed * _SPARE))}: training stops; "
            f"the checkpoints before it are intact{hint}"
        )
    if (share := (usage.used + needed) / max(1, usage.used + usage.free)) > _NEARLY_FULL:
        print(f"warning: with this checkpoint the disk of {folder} is {share:.0%} full", file=sys.stderr)


@contextmanager
def written_whole(folder: Path, *, writes: bool, together: Any = None) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end of the block, and vanishes where the block fails.

    Args:
        folder: where the files are to be; replaced if it is there.
        writes: whether this process makes the folder and renames it; one process alone may.
        together: called by every process, to wait for the others; none where there is one process.
    """
    aside = folder.with_name(f"{_ASIDE}{folder.name}")
    if writes:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    _wait(together)
    try:
        yield aside
        _wait(together)
        if writes:
            _flush(aside)
            old = folder.with_name(f"{_REPLACED}{folder.name}")
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                os.rename(folder, old)
            os.rename(aside, folder)
            _flush_folder(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        free = shutil.disk_usage(folder.parent).free
        if writes:
            shutil.rmtree(aside, ignore_errors=True)
        if is_lost(error):
            raise
        # On a full disk torch and safetensors raise errors of their own, torch's without a word of the disk.
        if isinstance(error, (OSError, RuntimeError)) or type(error).__name__ == "SafetensorError":
            why = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
            problem = CheckpointError(
                f"{folder.name} was not written ({why}; {_bytes(free)} are free); the checkpoints before it are intact"
            )
            problem.alone = True
            raise problem from error
        raise
    _wait(together)


def recover(run: Path) -> None:
    """Gives back its name to a folder that a kill has caught between being put aside and being replaced."""
    for path in run.glob(f"{_REPLACED}*"):
        home = path.with_name(path.name.removeprefix(_REPLACED))
        with contextlib.suppress(OSError):  # another process was faster
            if not home.exists():
                os.rename(path, home)


def clean(run: Path) -> None:
    """Removes what killed saves have left in a run."""
    recover(run)
    for path in (*run.glob(f"{_ASIDE}*"), *run.glob(f"{_REPLACED}*")):
        shutil.rmtree(path, ignore_errors=True)


def leave(run: Path, step: int) -> list[Path]:
    """Puts aside the checkpoints after `step`, from which a run goes on: they are of a course that is left, and no longer the
    newest. Returns where they are now."""
    left = []
    for path in complete(run):
        if _step(path) > step:
            names = (path.with_name(f"{_LEFT}{path.name}{again}") for again in ("", *(f"-{n}" for n in range(1, 1000))))
            left.append(path.rename(next(name for name in names if not name.exists())))
    return left


def told_left(left: list[Path]) -> str:
    """Checkpoints that were put aside, their size and their fate: somebody went back from them, and may want them yet."""
    names = ", ".join(sorted((path.name for path in left), key=lambda name: [int(n) for n in re.findall(r"\d+", name)]))
    return f"{names} ({_bytes(sum(map(size_on_disk, left)))}), which nothing but you deletes"


def rotate(run: Path, keep: int | None, best: Path | None) -> None:
    """Deletes the oldest checkpoints until `keep` are left, besides the best one. A deletion cut short leaves no checkpoint."""
    if keep is None:
        return
    others = [p for p in complete(run) if best is None or p.name != best.name]
    for path in others[: max(0, len(others) - keep)]:
        gone = path.with_name(f"{_ASIDE}old-{path.name}")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)


def check_same_stage(checkpoint: Path, stage: str) -> None:
    """Compares the stage that the run of a checkpoint was begun with, where its run.json tells.

    Raises:
        CheckpointError: it is another.
    """
    try:
        before = json.loads((checkpoint.parent / "run.json").read_text(encoding="utf-8"))["course"]["stage"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    if before != stage:
        raise CheckpointError(
            f"{checkpoint} is of stage {before}, not {stage}: to begin with its weights, give it as model"
        )


def check_same_model(checkpoint: Path, model: Any) -> None:
    """Compares names and shapes of a checkpoint's weights with a model's.

    Raises:
        CheckpointError: they are another model's, named by the first difference.
    """
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors has an error type of its own in Rust
            raise CheckpointError(f"{path} cannot be read: {error}") from None
    adapter = (checkpoint / "adapter_config.json").is_file()
    if adapter != hasattr(model, "peft_config"):
        raise CheckpointError(
            f"{checkpoint} holds {'an adapter' if adapter else 'a whole model'}, and the configuration asks for "
            f"{'a run without lora' if adapter else 'lora'}"
        )
    if not found:
        raise CheckpointError(f"{checkpoint} holds no weights")
    own = _weights(model)
    kind = "another adapter" if adapter else "another model"
    for key, shape in found.items():
        if key not in own:
            if adapter and "lora_" not in key:  # peft adds embeddings to what it saves
                continue
            raise CheckpointError(f"{checkpoint} is of {kind}: it has {key}, and {type(model).__name__} has not")
        if (mine := tuple(getattr(own[key], "ds_shape", own[key].shape))) != shape:
            raise CheckpointError(f"{checkpoint} is of {kind}: its {key} is {shape}, the configuration's {mine}")
    saved = {id(own[key]) for key in found if key in own}  # of tied weights one is saved
    for key, tensor in own.items():
        if key not in found and id(tensor) not in saved:
            raise CheckpointError(f"{checkpoint} is of {kind}: it has no {key}, which {type(model).__name__} has")


def _weights(model: Any) -> dict[str, Any]:
    """A model's own tensors, by the names under which they are saved."""
    whole = model.state_dict(keep_vars=True)
    if not hasattr(model, "peft_config"):
        return whole
    import peft

    return peft.get_peft_model_state_dict(model, state_dict=whole, save_embedding_layers=False)


def check_same_ranks(checkpoint: Path, processes: int, *, sharded: bool, zero3: bool = False) -> None:
    """Checks that a checkpoint was written by a Trainer as this run has one, in as many processes, under DeepSpeed or without, and under
    ZeRO-3 or below it: what lies in it beside the weights is a part for each, cut otherwise under ZeRO-3.

    Raises:
        CheckpointError: it was not.
    """
    if (checkpoint / "course.pt").is_file():
        raise CheckpointError(f"{checkpoint} is of a stage that samples, and this one does not")
    parts = len(list(checkpoint.glob("rng_state_*.pth"))) or int((checkpoint / "rng_state.pth").is_file())
    if not parts:  # weights alone (save_only_model)
        return
    if parts != processes:
        raise CheckpointError(
            f"{checkpoint} was written by {_processes(parts)}, and this run has {_processes(processes)}"
        )
    if sharded != (under := any(checkpoint.glob("global_step*"))):
        raise CheckpointError(
            f"{checkpoint} was written {'under' if under else 'without'} DeepSpeed, and this run is {'under' if sharded else 'without'} it"
        )
    if sharded and zero3 != (was := any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))):
        raise CheckpointError(
            f"{checkpoint} was written {'under' if was else 'below'} ZeRO-3, and this run is {'under' if zero3 else 'below'} it"
        )


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def check_resumable(checkpoint: Path, *, rank: int, world: int) -> None:
    """That all is there from which training goes on to the bit: not the weights alone, and nothing torn.

    Raises:
        CheckpointError: something is not, named.
    """
    sharded = any(path.is_dir() for path in checkpoint.glob("global_step*"))  # DeepSpeed's
    states = [f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"]
    if not sharded:
        states += ["scheduler.pt"] if (checkpoint / "optimizer.bin").is_file() else ["optimizer.pt", "scheduler.pt"]
    for name in states:
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(
                f"{checkpoint} has no {name}, without which training cannot go on as if it had not stopped: to begin with its weights, "
                "give it as model"
            )
        if not zipfile.is_zipfile(path):  # torch.save writes one, with its table of contents at the end
            raise CheckpointError(f"{path} cannot be read: it is torn")


def load(path: Path, *, only_weights: bool = True) -> Any:
    """``torch.load`` onto the CPU.

    Raises:
        CheckpointError: the file is not there or torn.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=only_weights)
    except Exception as error:  # of pickle, zip and torch
        why = "it is not there" if not path.is_file() else "it is torn" if not zipfile.is_zipfile(path) else str(error)
        raise CheckpointError(f"{path} cannot be read: {why.splitlines()[0]}") from error


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What the Trainer knew at a checkpoint: step, best metric, history.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / STATE} cannot be read: {error}") from None


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one go."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _flush_folder(path.parent)


def _wait(together: Any) -> None:
    if together is not None:
        together()


def _flush(folder: Path) -> None:
    """Forces every file of a folder and the folders themselves to disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
