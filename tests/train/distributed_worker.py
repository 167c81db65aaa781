"""Run by a launcher: trains by each configuration named, stops half way, resumes, and prints what came of it.

    deepspeed --num_accelerators 2 distributed_worker.py CONFIG CASE...      CASE: keys and values over CONFIG's, as JSON

Cases without ZeRO come first: accelerate does not forget DeepSpeed. MACHINE in CONFIG's output_dir is the number of the machine; where
it is there, prints at the end what machines are told that do not fit together.

Rank 0 prints a JSON line per case: {"case", "whole": losses, "resumed": losses, "folder", "files": of each process in a checkpoint}.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from fastllm import FastLLMError
from fastllm.train import checkpoint, config, folder, together
from fastllm.train.run import Run
from tests.ranks import compile_nothing
from tests.train.halfway import back_to_half_way

MACHINE = os.environ.get("GROUP_RANK", "0")
folder._PATIENCE = 0.2


def train(values: dict) -> tuple[Run, dict[int, float]]:
    run = Run(config.parse(values))
    run.go()
    torch.distributed.barrier()
    if os.environ["RANK"] != "0":
        return run, {}
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return run, {line["step"]: line["loss"] for line in lines if "loss" in line}


def machines(values: dict, run: Run) -> dict:
    """What becomes of runs whose machines do not fit together, and of a run of which one has lost the last checkpoint.

    Args:
        run: one that is done, with its files on both machines.
    """
    shared = {**values, "output_dir": values["output_dir"].replace("MACHINE", "all"), "save_on_each_node": False}
    mine = {**values, "output_dir": values["output_dir"].replace("MACHINE", MACHINE)}
    found = {"names": [together.everywhere(str(Run(config.parse(shared)).folder)) for _ in range(2)]}
    before = sorted(Path(shared["output_dir"]).iterdir())
    for name, wrong in (
        ("not shared", {**mine, "save_on_each_node": False}),
        ("shared", {**shared, "save_on_each_node": True}),
        ("other settings", {**shared, "learning_rate": 0.1 if MACHINE == "0" else 0.2}),
        ("nothing to resume", {**shared, "resume_from_checkpoint": str(run.folder) if MACHINE == "0" else "nowhere"}),
    ):
        try:
            Run(config.parse(wrong))
        except FastLLMError as error:
            found[name] = together.everywhere(str(error))
    assert sorted(Path(shared["output_dir"]).iterdir()) == before, "a run that was refused has left something"
    if MACHINE == "1":
        shutil.rmtree(checkpoint.complete(run.folder)[-1])
    for wanted in (str(run.folder), "latest"):
        again = config.parse({**mine, "resume_from_checkpoint": wanted})
        found[f"resumed from {'latest' if wanted == 'latest' else 'run'}"] = together.everywhere(
            str(folder.checkpoint_to_resume(again))
        )
    return found


def main() -> None:
    compile_nothing()
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    values = config.read(arguments[0])
    for number, case in enumerate(map(json.loads, arguments[1:])):
        place = str(Path(values["output_dir"]) / str(number))
        mine = {**values, **case, "output_dir": place.replace("MACHINE", MACHINE)}
        run, whole = train(mine)
        files = together.everywhere(back_to_half_way(run.folder))
        again, resumed = train({**mine, "resume_from_checkpoint": str(run.folder)})
        if os.environ["RANK"] == "0":
            found = {"case": case, "whole": whole, "resumed": resumed, "folder": str(again.folder), "files": files}
            print("RESULT " + json.dumps(found), flush=True)
    if "MACHINE" in values["output_dir"]:
        found = machines({**values, "output_dir": place}, again)
        if os.environ["RANK"] == "0":
            print("RESULT " + json.dumps({"machines": found}), flush=True)


main()
