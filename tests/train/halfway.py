"""What the workers on two ranks do between a whole run and its resumption."""

import os
import shutil
from pathlib import Path

import torch

from fastllm.train import checkpoint


def back_to_half_way(folder: Path) -> list[str]:
    """Takes a finished run back to its last checkpoint but one, as every rank calls it, on every machine; returns the names in
    that one."""
    *_, half, last = checkpoint.complete(folder)
    names = sorted(path.name for path in half.iterdir())
    torch.distributed.barrier()  # all ranks have looked before anything goes
    if os.environ["LOCAL_RANK"] == "0":
        shutil.rmtree(last)
        if (folder / "final").exists():  # of a machine on which nothing is gathered it is not
            (folder / "final").rename(folder / "final-of-whole")
    torch.distributed.barrier()
    return names
