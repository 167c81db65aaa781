"""`fastllm train`: the example configurations by name, and the last words of a run."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from fastllm.errors import ConfigError
from fastllm.train import checkpoint, config
from fastllm.train.keys import did_you_mean
from fastllm.train.online import options as online
from fastllm.train.online.run import Result as OnlineResult
from fastllm.train.online.run import Run as OnlineRun
from fastllm.train.run import Run

CONFIGS = Path(__file__).parent / "configs"


def prepare(name: str, overrides: list[str]) -> Run | OnlineRun:
    """The run that a configuration file describes, or an example that comes with the package, by its bare name.

    Raises:
        ConfigError, DataError, CheckpointError: what is wrong with the input.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # else DeepSpeed, where transformers finds it, says that it guesses
    quiet()
    example = CONFIGS / f"{name}.yaml"
    if not Path(name).exists() and not Path(name).suffix and not example.is_file():
        examples = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
        raise ConfigError(f"{name} is no file and no example{did_you_mean(name, examples)} ({', '.join(examples)})")
    options = config.load(example if not Path(name).exists() and example.is_file() else name, overrides)
    return (OnlineRun if options.data.stage in online.STAGES else Run)(options)


def finish(run: Run | OnlineRun, *, as_json: bool) -> None:
    """Trains, and says on the first process what came of it."""
    try:
        result = run.go()
    except KeyboardInterrupt:
        _say_what_stays(run.folder)
        raise
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        print(json.dumps(asdict(result), indent=2))
        return
    if isinstance(result, OnlineResult):
        print(f"{result.told()}\nmodel: {result.final}")
        return
    speed: dict[str, Any] = result.throughput
    said = [f"{result.steps} steps"]
    said.append("all made before" if result.train_loss is None else f"mean training loss {result.train_loss:.4f}")
    if result.best_perplexity is not None:
        said.append(f"best validation perplexity {result.best_perplexity:.4f}")
    elif result.best_eval_loss is not None:
        said.append(f"best validation loss {result.best_eval_loss:.4f}")
    if speed:
        said.append(f"{speed['tgs_real']:,.0f} real tokens per second and device, {speed['tflops']:.3g} TFLOPS")
    print(", ".join(said) + f"\nmodel: {result.final}")


def _say_what_stays(folder: Path) -> None:
    """Of a run that Ctrl-C has ended, on the first process."""
    if os.environ.get("RANK", "0") != "0":
        return
    found = checkpoint.complete(folder)
    after = f"resume_from_checkpoint={folder} goes on from {found[-1].name}" if found else "it has no checkpoint yet"
    bar = "\n" if sys.stderr.isatty() else ""  # whose line is not ended
    print(f"{bar}stopped: {after}", file=sys.stderr)


def quiet() -> None:
    """Libraries say what concerns their own users; the command says what concerns this one's."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
