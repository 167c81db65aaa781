"""A run's folder: its name, its place on every machine, the checkpoint it goes on from, and what it tells of the run."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from fastllm import __version__
from fastllm.doctor import version
from fastllm.errors import CheckpointError, ConfigError
from fastllm.train import checkpoint, lock, metrics, models, together
from fastllm.train.config import STAGES, Options
from fastllm.train.online import options as online

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "deepspeed", "triton")
_PATIENCE = 5.0  # seconds in which a network's file system shows one machine what another wrote


# ---- the place ---------------------------------------------------------------------------------------------------


def new(options: Options) -> Path:
    """A folder that no other run has, MODEL-STAGE-HOST-TIME in output_dir, the same for all processes of this run. With
    save_on_each_node every machine has one of that name in its own output_dir.

    Until this run ends no other one trains there.

    Raises:
        ConfigError: it cannot be made; the machines do not share it, or do where save_on_each_node says that they do not.
    """
    root = _root(options)
    stem = together.of_first(f"{_prefix(options)}{socket.gethostname()}-{time.strftime('%Y%m%d-%H%M%S')}")
    for n in range(1000):
        path = root / (f"{stem}-{n}" if n else stem)
        told, mark = _placed(path, options, make=True)
        if "taken" not in told:
            return _checked(path, told, mark, options)
        _unmark(mark, told, keep=False)
    raise ConfigError(f"output_dir: {root} has a thousand runs of this second")


def _take(path: Path, options: Options) -> None:
    """Of the folder of a run that goes on. Raises: as `new`, and where another run trains there."""
    told, mark = _placed(path, options, make=False)
    _checked(path, told, mark, options)


def _placed(path: Path, options: Options, *, make: bool) -> tuple[list[str], Path]:
    """What each process says of the folder: "made" by it, "seen" with the mark of another machine in it, "apart" where that does not
    appear, "taken" by another run, or what is wrong; nothing, where another process speaks for its machine."""
    args = options.arguments
    mark = path / f".{together.of_first(uuid.uuid4().hex)}"
    said = _marked(path, mark, make, 0.0) if together.rank() == 0 else ""
    if together.of_first(said) == "made" and together.rank() and args.local_process_index == 0:
        if args.save_on_each_node:
            said = _marked(path, mark, make, _PATIENCE)
        else:
            said = "seen" if _appears(mark, _PATIENCE) else "apart"
    return together.everywhere(said), mark


def _marked(path: Path, mark: Path, make: bool, patience: float) -> str:
    try:
        if mark.exists():
            return "seen"
        if make:
            path.mkdir(parents=True)
        if other := lock.hold(path):
            return f"resume_from_checkpoint: {other}"
        mark.touch()
    except FileExistsError:
        return "seen" if _appears(mark, patience) else "taken"
    except OSError as error:
        return f"output_dir: cannot {'make' if make else 'write to'} {path}: {error.strerror}"
    return "made"


def _appears(mark: Path, patience: float) -> bool:
    until = time.monotonic() + patience
    while not (there := mark.exists()) and time.monotonic() < until:
        time.sleep(0.1)
    return there


def _checked(path: Path, told: list[str], mark: Path, options: Options) -> Path:
    """The folder, where what was told of it fits the configuration; else what was made of it is taken away."""
    wrong = [one for one in told if one not in ("made", "seen", "apart", "")]
    if not wrong and "apart" in told:
        wrong.append(
            f"output_dir: process {told.index('apart')} does not see what the first wrote to {path.parent}: share it between the "
            "machines, or give save_on_each_node: true"
        )
    elif not wrong and "seen" in told and options.arguments.save_on_each_node:
        wrong.append(
            f"save_on_each_node: true is for machines that each have an output_dir of their own, and process {told.index('seen')} "
            f"sees that of another, {path.parent}: leave it out"
        )
    _unmark(mark, told, keep=not wrong)
    if wrong:
        raise ConfigError(wrong[0])
    return path


def _unmark(mark: Path, told: list[str], *, keep: bool) -> None:
    """Takes away what this process has put there: the mark and, unless it is kept, the lock and the folder."""
    if told[together.rank()] == "made":
        mark.unlink(missing_ok=True)
        if not keep:
            lock.release(mark.parent)
            if not any(mark.parent.iterdir()):
                mark.parent.rmdir()


def _root(options: Options) -> Path:
    return Path(str(options.arguments.output_dir)).expanduser()


def _prefix(options: Options) -> str:
    path = Path(options.model.model.rstrip("/"))
    name = path.name.removesuffix(".json")
    # What a run has left is called after that run's model.
    of_run = re.match(rf"(.+?)-(?:{'|'.join(STAGES)})-", path.parent.name)
    if of_run and re.fullmatch(rf"final(-merged)?|{checkpoint.NAME}\d+", name):
        name = of_run[1]
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', name) or 'model'}-{options.data.stage}-"


# ---- the checkpoint to go on from ----------------------------------------------------------------------------------


def checkpoint_to_resume(options: Options) -> Path | None:
    """The newest checkpoint meant by resume_from_checkpoint that is complete on every machine, in a folder that from now on no other
    run trains in; None for a run from the beginning.

    Raises:
        CheckpointError: there is none. ConfigError: another run trains there; as `new`.
    """
    found = _newest(options)
    if found is None:
        return None
    _take(found.parent, options)
    if _newest(options) != found:
        raise CheckpointError(f"{found.parent} went on while it was looked at, and that has just ended: start again")
    return found


def _newest(options: Options) -> Path | None:
    wanted = options.arguments.resume_from_checkpoint
    if wanted is None:
        return None
    speaks = options.arguments.local_process_index == 0
    mine = together.agree(lambda: _candidates(str(wanted), options), here=speaks or wanted != "latest") or {}
    told = together.everywhere(list(mine) if speaks else None)
    lists = [names for names in told if names is not None]
    common = [name for name in lists[0] if all(name in names for names in lists)]
    if common:
        run, folder = common[-1]
        return mine[run, folder] if (run, folder) in mine else _root(options).resolve() / run / folder
    if any(lists):
        raise CheckpointError(f"resume_from_checkpoint: {wanted}: no checkpoint is complete on all machines")
    models.say(
        f"no run of this model and stage in {options.arguments.output_dir} has a checkpoint to resume: a new run begins"
    )
    return None


def _candidates(wanted: str, options: Options) -> dict[tuple[str, str], Path]:
    """Complete checkpoints by the names of run and checkpoint, the newest last."""
    if wanted != "latest":
        newest = checkpoint.find(wanted).resolve()
        checkpoint.check_same_stage(newest, options.data.stage)
        named = (Path(wanted).expanduser() / checkpoint.STATE).is_file()
        found = [newest] if named else checkpoint.complete(newest.parent)
    else:
        runs = sorted(_root(options).resolve().glob(f"{_prefix(options)}*"), key=lambda run: run.stat().st_mtime)
        for run in runs:
            checkpoint.recover(run)
        found = [folder for run in runs for folder in checkpoint.complete(run)]
    return {(path.parent.name, path.name): path for path in found}


# ---- what it tells -----------------------------------------------------------------------------------------------


# Keys that machines may each have in their own way, but that all have or none.
_OWN = frozenset({
    "model", "tokenizer", "chat_template", "data", "eval_data", "pretrain_data", "cache_dir", "output_dir", "deepspeed", "reward",
    "eval_reward", "critic", "resume_from_checkpoint",
})  # fmt: skip


def check_settings(options: Options) -> None:
    """Before processes first wait for each other: one that resumes, evaluates or stops elsewhere than the others would wait alone.

    Raises:
        ConfigError: processes were started with different settings.
    """
    given = {key: value for key, value in options.values.items() if value is not None}
    _check_same({key: "given" if key in _OWN else value for key, value in given.items()})


def check_course(options: Options, sets: dict[str, Any]) -> None:
    """Raises: ConfigError: processes were started with different settings or data."""
    _check_same({**_course(options, sets), "model": _prefix(options)})


def _check_same(mine: dict[str, Any]) -> None:
    told = together.everywhere((socket.gethostname(), _plain(mine)))
    host, first = told[0]
    for number, (other, course) in enumerate(told):
        for key in sorted(first.keys() | course.keys()):
            here, there = first.get(key, "not given"), course.get(key, "not given")
            if here != there:
                raise ConfigError(
                    f"all processes must have one configuration and the same data: {key} is {here} in process 0 ({host}) and "
                    f"{there} in process {number} ({other})"
                )


def describe(run: Path, options: Options, sets: dict[str, Any], resumed_from: Path | None) -> None:
    """config.yaml, with which the run can be started again, and run.json, which says what it ran with and on.

    Args:
        sets: what was read, by key: each with its report and fingerprint.
    """
    checkpoint.clean(run)
    given = {key: value for key, value in options.values.items() if key not in ("resume_from_checkpoint",)}
    whole = {**given, **asdict(options.model), **asdict(options.data)}
    course = _course(options, sets)
    about = {
        "fastllm": __version__,
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := version(name))},
        "git_commit": _git_commit(),
        "command": sys.argv,
        "host": socket.gethostname(),
        "folder": os.getcwd(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "course": course,
        "sources": {
            key: {source: asdict(totals) for source, totals in data.report.sources.items()}
            for key, data in sets.items()
        },
        "totals": {key: asdict(data.report.total) for key, data in sets.items()},
        "arguments": options.arguments.to_sanitized_dict(),
    }
    if resumed_from:
        _warn_of_changes(run, course, resumed_from)
        about["resumed_from"] = str(resumed_from)
        step = checkpoint.read_state(resumed_from)["global_step"]
        if left := checkpoint.leave(run, step):
            print(
                f"going on from {resumed_from.name}; later checkpoints are now {checkpoint.told_left(left)}",
                file=sys.stderr,
            )
        if (log := run / metrics.NAME).is_file():
            metrics.cut(log, step)
    checkpoint.write_whole(run / "config.yaml", yaml.safe_dump(_plain(whole), sort_keys=False))
    checkpoint.write_whole(run / "run.json", json.dumps(about, indent=2, default=str))


def _course(options: Options, sets: dict[str, Any]) -> dict[str, Any]:
    """What decides the course of a run, and is to be the same where it goes on."""
    args, stage = options.arguments, options.data.stage
    own: Any = {"dpo": options.dpo, "rm": options.rm, **dict.fromkeys(online.STAGES, options.online)}.get(stage)
    return {
        "stage": stage,
        "data": {key: data.fingerprint for key, data in sets.items()},
        "packing": options.data.packing,
        "pretrain_share": options.data.pretrain_share,
        **(asdict(own) if own else {}),
        "batch": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "seed": [args.seed, args.data_seed],
        "precision": [options.model.dtype, "bf16" if args.bf16 else "fp16" if args.fp16 else "as it is"],
        "optimizer": str(args.optim),
        "learning_rate": args.learning_rate,
        "schedule": str(args.lr_scheduler_type),
    }


def _warn_of_changes(run: Path, course: dict[str, Any], resumed_from: Path) -> None:
    try:
        before = json.loads((run / "run.json").read_text(encoding="utf-8"))["course"]
    except (OSError, ValueError, KeyError):
        before = {}
    now = json.loads(json.dumps(course))
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    if changed:
        print(f"warning: {resumed_from.name} is resumed with other settings: {'; '.join(changed)}", file=sys.stderr)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _git_commit() -> str | None:
    """Of the folder the run is started in; with "+" where files differ from it."""
    try:
        said = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None
