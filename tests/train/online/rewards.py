"""Reward functions for tests, and ways in which one can be wrong."""

import random

import numpy
import torch


def printable(prompts, responses, rows):
    """The share of each response's characters that are printable ASCII: two in five of random bytes."""
    return [sum(" " <= c <= "~" for c in response) / max(1, len(response)) for response in responses]


def draws(prompts, responses, rows):
    """Printable, and what it draws at random is drawn from the generators of the process."""
    torch.rand(3)
    random.random()
    numpy.random.random()  # noqa: NPY002
    return printable(prompts, responses, rows)


def echo(prompts, responses, rows):
    """What the row says."""
    return [row["worth"] for row in rows]


def too_few(prompts, responses, rows):
    return [0.0]


def not_a_number(prompts, responses, rows):
    return [float("nan")] * len(responses)


def fails(prompts, responses, rows):
    raise KeyError("answer")


constant = 3
