"""What a response is worth: a Python function's word, or a reward model's, normalised and clipped where asked."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastllm.errors import ConfigError, DataError
from fastllm.train import together

# (prompts, responses, rows) -> a number for each: the last message of each prompt and each response as texts, and the rows of the
# data file, which may hold what a check needs to know.
Function = Callable[[Sequence[str], Sequence[str], Sequence[dict[str, Any]]], Sequence[float]]


def function(name: str, key: str = "reward") -> Function:
    """The function that ``module:function`` names; modules beside which the command runs are found too.

    Raises:
        ConfigError: no such module or function.
    """
    module, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's may fail in any way
        raise ConfigError(
            f"{key}: cannot import {name}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if not callable(found):
        raise ConfigError(f"{key}: {name} is no function but {type(found).__name__}")
    return found


def ask(call: Function, name: str, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> Tensor:
    """(B,) float32. Every process is to call: what fails in one ends all, and the first of them says it.

    Raises:
        DataError: the function fails, or does not return a finite number for each response.
    """

    def asked() -> Tensor:
        try:
            found = [float(value) for value in call(prompts, responses, rows)]
        except Exception as error:
            raise DataError(f"reward {name} failed: {type(error).__name__}: {' '.join(str(error).split())}") from error
        if len(found) != len(responses):
            raise DataError(f"reward {name} returned {len(found)} numbers for {len(responses)} responses")
        for value, response in zip(found, responses):
            if not math.isfinite(value):
                raise DataError(f"reward {name} returned {value} for the response {response[:60]!r}")
        return torch.tensor(found)

    scores = together.agree(asked)
    assert scores is not None
    return scores


class Normaliser:
    """Scores less the mean of all so far, over their standard deviation (Secrets of RLHF I, arXiv 2307.04964, section 5.2)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def __call__(self, scores: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
        """total: sums a tensor over processes."""
        x = scores.double()
        count, summed = total(torch.stack([torch.ones_like(x).sum(), x.sum()])).tolist()
        mean = summed / count
        squares = total((x - mean).square().sum()).item()
        whole = self.count + count  # Chan et al., 1979: moments of two parts make those of the whole
        self.squares += squares + (mean - self.mean) ** 2 * self.count * count / whole
        self.mean += (mean - self.mean) * count / whole
        self.count = whole
        deviation = math.sqrt(self.squares / self.count)
        return ((x - self.mean) / (deviation + 1e-8)).float()

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = (state[name] for name in ("count", "mean", "squares"))
