"""Run by a launcher: trains by each configuration named, stops half way, resumes, and prints what came of it.

    deepspeed --num_accelerators 2 distributed_worker.py CONFIG CASE...      CASE: keys and values over CONFIG's, as JSON

Rank 0 prints a JSON line per case: {"case", "whole": losses, "resumed": losses, "folder", "files": in a checkpoint}.
"""

import json
import os
import sys
from pathlib import Path

import torch

from fastllm.train import config
from fastllm.train.run import Run
from tests.ranks import compile_nothing
from tests.train.halfway import back_to_half_way


def train(values: dict) -> tuple[Run, dict[int, float]]:
    run = Run(config.parse(values))
    run.go()
    torch.distributed.barrier()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return run, {line["step"]: line["loss"] for line in lines if "loss" in line}


def main() -> None:
    compile_nothing()
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    values = config.read(arguments[0])
    for number, case in enumerate(map(json.loads, arguments[1:])):
        mine = {**values, **case, "output_dir": str(Path(values["output_dir"]) / str(number))}
        run, whole = train(mine)
        files = back_to_half_way(run.folder)
        again, resumed = train({**mine, "resume_from_checkpoint": str(run.folder)})
        if os.environ["RANK"] == "0":
            found = {"case": case, "whole": whole, "resumed": resumed, "folder": str(again.folder), "files": files}
            print("RESULT " + json.dumps(found), flush=True)


main()
