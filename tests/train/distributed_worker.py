"""Run by a launcher: trains under each ZeRO stage named, stops half way, resumes, and prints what came of it.

    deepspeed --num_accelerators 2 distributed_worker.py CONFIG STAGE...      STAGE: 0 to 3, or "ddp"

Rank 0 prints a JSON line per stage: {"stage", "whole": losses, "resumed": losses, "final": folder, "files": in a checkpoint}.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch

from fastllm.train import checkpoint, config
from fastllm.train.run import Run


def train(values: dict) -> tuple[Run, dict[int, float]]:
    run = Run(config.parse(values))
    run.go()
    torch.distributed.barrier()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return run, {line["step"]: line["loss"] for line in lines if "loss" in line}


def main() -> None:
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    values = config.read(arguments[0])
    for stage in arguments[1:]:
        mine = {**values, "output_dir": str(Path(values["output_dir"]) / stage)}
        if stage != "ddp":
            mine["zero_stage"] = int(stage)
        run, whole = train(mine)
        first, last = checkpoint.complete(run.folder)
        if os.environ["RANK"] == "0":
            files = sorted(p.name for p in first.iterdir())
            shutil.rmtree(last)
            (run.folder / "final").rename(run.folder / "final-of-whole")
        torch.distributed.barrier()
        again, resumed = train({**mine, "resume_from_checkpoint": str(run.folder)})
        if os.environ["RANK"] == "0":
            found = {"stage": stage, "whole": whole, "resumed": resumed, "folder": str(again.folder), "files": files}
            print("RESULT " + json.dumps(found), flush=True)


main()
