"""``python -m bench SUITE``: one module of this folder per suite, each with a ``main(arguments) -> exit code``; and
what is done with their results."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

SUITES = {
    "kernels": "each op beside PyTorch eager, torch.compile and other libraries",
    "attention": "attention dense, windowed, packed and dilated, and decoding over a cache",
    "loss": "the losses over a vocabulary, with and without the output head",
    "rl": "advantages and the policy loss beside the loops and compositions of RLHF trainers",
    "train": "a training step of a Llama of 134 M to 6.7 B: unpatched, compiled, patched; TFLOPS, MFU, HFU",
    "trainer": "fastllm train beside the bare training step: its own overhead; packed beside padded batches",
    "ppo": "an iteration of PPO of a Llama of 58 M to 6.7 B: rollout, scoring, training; plain, unpatched, patched",
    "stream": "text without end: perplexity with sinks, a window and without, and what a token costs after 1 k to 200 k tokens",
    "demo": "a small Llama trained on real text, unpatched and patched",
    "extrapolation": "perplexity by position and recall by distance under every RoPE scaling, with and without tuning",
    "static": "what the compilers make of every GPU kernel, without a GPU",
}
OTHERS = {
    "gpu": "all of it on a machine with a GPU, in minutes: build, tests, suites, tiles",
    "tiles": "other tiles for the attention kernels, timed on this GPU",
    "compare": "two --json files of a suite: what became slower, by the ratio to its peers",
    "report": "docs/benchmarks.md and attention's rules from bench/results",
}


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:<13} {what}" for name, what in (SUITES | OTHERS).items()]
        print("\n".join(["usage: python -m bench SUITE [-h] [...]", "", *lines]))
        return 0
    suite, *rest = arguments
    if suite not in SUITES | OTHERS:
        known = ", ".join(SUITES | OTHERS)
        print(f"python -m bench: error: unknown suite {suite!r}; there are {known}", file=sys.stderr)
        return 2
    return importlib.import_module(f"bench.{suite}").main(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
