"""Run by test_checkpoint.py: trains and saves at every step in a child process, which it kills at random moments.

    python killed_worker.py CONFIG KILLS SEED

Everything slow (imports, data, the model) is done once, before the children are forked; so a kill takes a fraction of a second. After
each kill, prints a JSON line {"newest": step, "torn": [...], "aside": whether a save was cut short}.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import torch
from safetensors.torch import load_file

from fastllm.train import checkpoint, config
from fastllm.train.run import Run

torch.set_num_threads(1)


def problems(folder: Path) -> list[str]:
    """What of a checkpoint does not load."""
    found = []
    for path in folder.iterdir():
        try:
            if path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix in (".pt", ".pth"):
                torch.load(path, weights_only=False)
            elif path.suffix == ".json":
                json.loads(path.read_text())
        except Exception as error:
            found.append(f"{path}: {error}")
    needed = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", checkpoint.STATE)
    return found + [f"{folder / name} is missing" for name in needed if not (folder / name).is_file()]


def main() -> None:
    path, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    run = Run(config.load(path))
    chance = random.Random(seed)
    for _ in range(kills):
        before = {p.name for p in checkpoint.complete(run.folder)}
        child = os.fork()
        if child == 0:
            os.setsid()
            newest = checkpoint.complete(run.folder)
            run.trainer.train(resume_from_checkpoint=str(newest[-1]) if newest else None)
            os._exit(0)
        # Once it has saved for the first time, it is saving nearly all of the time.
        while {p.name for p in checkpoint.complete(run.folder)} == before:
            if os.waitpid(child, os.WNOHANG)[0]:
                sys.exit("the child ended by itself")
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        complete = checkpoint.complete(run.folder)
        torn = [problem for folder in complete for problem in problems(folder)]
        aside = any(run.folder.glob(".saving-checkpoint-*"))
        newest = int(complete[-1].name.removeprefix(checkpoint.NAME))
        print(json.dumps({"newest": newest, "torn": torn, "aside": aside}), flush=True)


main()
