"""Run by test_checkpoint.py: trains and saves at every step in a child process, which it kills at random moments.

    python killed_worker.py SEED (CONFIG KILLS)...

Everything slow (imports, data, the model) is done once, before the children are forked; so a kill takes a fraction of a second. Every
second kill waits for a save to begin. After each kill, prints a JSON line {"stage", "newest": step, "torn": [...], "aside": whether a save
was cut short}.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # threads do not survive a fork

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from fastllm.train import checkpoint, config
from fastllm.train.online import state
from fastllm.train.online.run import Run as OnlineRun
from fastllm.train.run import Run

torch.set_num_threads(1)
# The lock of progress bars is shared with forked processes: one that is killed while it holds it stops all that follow.
tqdm.set_lock(threading.RLock())
OFFLINE = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", checkpoint.STATE)
ONLINE = ("model.safetensors", "trained.pt", "course.pt", "process-0.pt", checkpoint.STATE)


def problems(folder: Path, needed: tuple[str, ...]) -> list[str]:
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
    return found + [f"{folder / name} is missing" for name in needed if not (folder / name).is_file()]


def train(run: Run | OnlineRun) -> None:
    newest = checkpoint.complete(run.folder)
    if isinstance(run, OnlineRun):
        if newest:
            state.load(run.course, newest[-1])
        run.go()
    else:
        run.trainer.train(resume_from_checkpoint=str(newest[-1]) if newest else None)


def wait_for(child: int, seen) -> None:
    end = time.monotonic() + 100
    while not seen():
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the child ended by itself")
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            sys.exit("the child has saved nothing for 100 seconds")
        time.sleep(0.0005)


def kill_often(options: config.Options, kills: int, chance: random.Random) -> None:
    online = options.data.stage in ("ppo", "conditional")
    run = (OnlineRun if online else Run)(options)
    for number in range(kills):
        before = {p.name for p in checkpoint.complete(run.folder)}
        child = os.fork()
        if child == 0:
            os.setsid()
            try:
                train(run)
            finally:
                os._exit(1)
        wait_for(child, lambda known=before: {p.name for p in checkpoint.complete(run.folder)} != known)
        if number % 2:
            wait_for(child, lambda: any(run.folder.glob(".saving-checkpoint-*")))
        time.sleep(chance.uniform(0, 0.01 if number % 2 else 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        complete = checkpoint.complete(run.folder)
        torn = [problem for folder in complete for problem in problems(folder, ONLINE if online else OFFLINE)]
        aside = any(run.folder.glob(".saving-checkpoint-*"))
        checkpoint.clean(run.folder)  # as a run does when it is resumed
        newest = int(complete[-1].name.removeprefix(checkpoint.NAME))
        print(json.dumps({"stage": options.data.stage, "newest": newest, "torn": torn, "aside": aside}), flush=True)


def main() -> None:
    chance = random.Random(int(sys.argv[1]))
    for path, kills in zip(sys.argv[2::2], sys.argv[3::2]):
        kill_often(config.load(path), int(kills), chance)


main()
