import pytest
import torch

import fastllm
from fastllm.ops._ppo_loss import AGGREGATIONS, KL_ESTIMATORS, LEVELS, VARIANTS
from fastllm.rl import ppo_loss


def batch(rows=4, length=7, dtype=torch.float64, masked=0.3):
    """Positional arguments and all optional tensors of a call, a mask with gaps and one row without a valid token."""
    made = {"logprobs": -torch.rand(rows, length, dtype=torch.float64) * 3}
    made |= {name: torch.randn(rows, length, dtype=torch.float64) for name in ("advantages", "values", "returns")}
    made["entropy"] = torch.rand(rows, length, dtype=torch.float64)
    for name, near in (("old_logprobs", "logprobs"), ("ref_logprobs", "logprobs"), ("old_values", "values")):
        made[name] = made[near] + 0.4 * torch.randn(rows, length, dtype=torch.float64)
    made["importance_weights"] = 2 * torch.rand(rows, length, dtype=torch.float64)
    made = {name: t.to(dtype) for name, t in made.items()}
    made["mask"] = torch.rand(rows, length) > masked
    if rows > 2:
        made["mask"][1] = False
    return made


COEFS = {"value_coef": 0.7, "entropy_coef": 0.1, "kl_coef": 0.3}
LEARNT = ("logprobs", "values", "entropy")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v != "cispo"])  # whose gradient is not its value's
def test_gradients_are_those_of_the_value(level, aggregation, variant):
    given = batch(3, 4)
    learnt = [given.pop(name).requires_grad_() for name in LEARNT]
    for estimator, dual_clip in zip(KL_ESTIMATORS, (None, 1.5, 3.0)):
        how = {"level": level, "aggregation": aggregation, "variant": variant, "kl_estimator": estimator}
        how["dual_clip"] = dual_clip if variant == "ppo" else None

        def loss(*learnt):
            return ppo_loss(**given, **dict(zip(LEARNT, learnt)), **COEFS, **how).loss  # noqa: B023

        torch.autograd.gradcheck(loss, learnt)


def test_explain_says_which_kernel_serves():
    given = batch(2, 3, torch.float32)
    assert fastllm.backends.explain("ppo_loss", **given).startswith("ppo_loss: ")
