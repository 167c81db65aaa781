"""Run by a launcher: trains stage ppo under each way named, stops half way, resumes, and prints what came of it.

    deepspeed --num_accelerators 2 ranks_worker.py CONFIG WAY...      WAY: 2 or 3 (ZeRO), or "ddp", the last

MACHINE in CONFIG's output_dir is the number of the machine. Rank 0 prints a JSON line per way: {"way", "whole": log, "resumed": log,
"folder", "gathers": of all weights, by iteration}.
"""

import json
import os
import sys
from pathlib import Path

import torch

from fastllm.train import config
from fastllm.train.online import engines
from fastllm.train.online.run import Run
from tests.ranks import compile_nothing
from tests.train.halfway import back_to_half_way


def train(values: dict) -> tuple[Run, list[dict]]:
    run = Run(config.parse(values))
    run.go()
    torch.distributed.barrier()
    log = run.folder / "metrics.jsonl"
    return run, [json.loads(line) for line in log.read_text().splitlines()] if os.environ["RANK"] == "0" else []


def main() -> None:
    compile_nothing()
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    values = config.read(arguments[0])
    gathered = []
    plain_whole = engines.Zero.whole

    def counted(self):
        gathered.append(sum(p.numel() == 0 for p in self.models.actor.parameters()))
        return plain_whole(self)

    engines.Zero.whole = counted
    for way in arguments[1:]:
        gathered.clear()
        place = values["output_dir"].replace("MACHINE", os.environ.get("GROUP_RANK", "0"))
        mine = {**values, "output_dir": str(Path(place) / way)}
        if way != "ddp":
            mine["zero_stage"] = int(way)
        run, whole = train(mine)
        gathers = list(gathered)
        back_to_half_way(run.folder)
        again, resumed = train({**mine, "resume_from_checkpoint": str(run.folder)})
        if os.environ["RANK"] == "0":
            found = {"way": way, "whole": whole, "resumed": resumed, "folder": str(again.folder), "gathers": gathers}
            print("RESULT " + json.dumps(found), flush=True)


main()
