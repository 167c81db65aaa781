"""``python -m fastllm.train CONFIG.yaml``, by which launchers start it: deepspeed --module, torchrun -m."""

import sys

from fastllm.cli import main

if __name__ == "__main__":
    # deepspeed says the rank in an argument as well as in the environment, which is where it is read
    sys.exit(main(["train", *(a for a in sys.argv[1:] if not a.startswith("--local_rank"))]))
