import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.rl import explained_variance, group_advantages, whiten
from fastllm.rl.advantages import GROUP_KINDS

NAN = float("nan")


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_whiten_is_the_definition(rows, length, shift_mean, unbiased, seed):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    found = whiten(x.masked_fill(~mask, NAN), mask, shift_mean=shift_mean, unbiased=unbiased)
    values = x[mask].tolist()
    assert not found[~mask].any()
    if not values:
        return
    mean = statistics.fmean(values)
    divisor = max(1, len(values) - unbiased)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / divisor + 1e-8)
    expected = [(v - mean) / std + (0 if shift_mean else mean) for v in values]
    torch.testing.assert_close(found[mask], torch.tensor(expected, dtype=torch.float64))


def test_whiten_keeps_its_digits_far_from_zero():
    x = 1e4 + torch.randn(1000)
    found = whiten(x, torch.ones(1000, dtype=torch.bool))
    expected = x.double()
    expected = (expected - expected.mean()) / expected.std(unbiased=False)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_whiten_of_nothing_of_one_token_and_of_equal_tokens_is_zero():
    for mask in ([False, False], [True, False], [True, True]):
        for unbiased in (False, True):
            assert whiten(torch.full((2,), 0.1), torch.tensor(mask), unbiased=unbiased).tolist() == [0.0, 0.0]


def test_whiten_as_trl_and_verl_unbiased_and_as_openrlhf_biased():
    """masked_whiten of TRL and verl: Bessel's correction, rsqrt(var + 1e-8); OpenRLHF: sum of squares by the count."""
    x, mask = torch.randn(3, 8), torch.rand(3, 8) < 0.6
    n = mask.sum()
    mean = (x * mask).sum() / n
    biased = ((x - mean).square() * mask).sum() / n
    for unbiased, variance in ((True, biased * n / (n - 1)), (False, biased)):
        expected = (x - mean) * torch.rsqrt(variance + 1e-8)
        torch.testing.assert_close(whiten(x, mask, unbiased=unbiased), expected * mask)


@pytest.mark.parametrize("unbiased", [False, True])
def test_group_advantages_are_the_definitions(unbiased):
    rewards = torch.randn(12, dtype=torch.float64)
    groups = [rewards[i : i + 4].tolist() for i in range(0, 12, 4)]
    spread = statistics.stdev if unbiased else statistics.pstdev
    mean = statistics.fmean
    by_hand = {
        "grpo": [(r - mean(g)) / (spread(g) + 0.01) for g in groups for r in g],
        "dr_grpo": [r - mean(g) for g in groups for r in g],
        "rloo": [r - (sum(g) - r) / 3 for g in groups for r in g],  # less the mean of the others
    }
    everyone = rewards.tolist()
    by_hand["reinforce++"] = [(r - mean(everyone)) / math.sqrt(spread(everyone) ** 2 + 1e-8) for r in everyone]
    centred = by_hand["dr_grpo"]
    by_hand["reinforce++-baseline"] = [r / math.sqrt(spread(centred) ** 2 + 1e-8) for r in centred]
    assert by_hand.keys() == set(GROUP_KINDS)
    for kind, expected in by_hand.items():
        found = group_advantages(rewards, 4, kind=kind, eps=0.01, unbiased=unbiased)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=1e-12)


def test_grpo_as_trl_and_verl_have_it():
    """(r - group mean) / (group std + 1e-4), torch.std and so Bessel's correction."""
    rewards = torch.rand(24)
    groups = rewards.view(-1, 8)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 8, unbiased=True), expected.view(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_equal_rewards_give_zero_exactly(kind, dtype):
    rewards = torch.full((6,), 0.1, dtype=dtype)
    assert not group_advantages(rewards, 3, kind=kind).any()
    if kind != "reinforce++":
        rewards = torch.tensor([0.1, 0.1, 0.1, 1.0, 0.3, 0.3], dtype=dtype)
        found = group_advantages(rewards, 3, kind=kind)
        assert not found[:3].any()
        assert found[3:].all()


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_group_advantages_follow_a_permutation_of_the_groups(kind):
    rewards, order = torch.randn(5, 4), torch.randperm(5)
    found = group_advantages(rewards.view(-1), 4, kind=kind).view(5, 4)
    torch.testing.assert_close(group_advantages(rewards[order].view(-1), 4, kind=kind).view(5, 4), found[order])


def test_explained_variance():
    returns = torch.randn(4, 6, dtype=torch.float64)
    values = returns + 0.3 * torch.randn(4, 6, dtype=torch.float64)
    mask = torch.rand(4, 6) < 0.7
    r, v = returns[mask].tolist(), values[mask].tolist()
    expected = 1 - statistics.pvariance([a - b for a, b in zip(r, v)]) / statistics.pvariance(r)
    found = explained_variance(values.masked_fill(~mask, NAN), returns.masked_fill(~mask, NAN), mask)
    assert found.item() == pytest.approx(expected)
    assert explained_variance(returns + 5, returns, mask).item() == pytest.approx(1)
    assert explained_variance(torch.full_like(returns, 3.0), returns, mask).item() == pytest.approx(0)
    assert explained_variance(values, torch.ones_like(returns), mask).item() == 0  # nothing to explain
    assert explained_variance(values, returns, torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(6), 4), {}, ValueError, r"group_size must divide the number of rewards \(6\), got 4"),
        ((torch.zeros(6), 0), {}, ValueError, "group_size must be at least 1, got 0"),
        ((torch.zeros(6), 1), {"kind": "rloo"}, ValueError, "group_size must be at least 2, got 1"),
        ((torch.zeros(6), 2.0), {}, TypeError, "group_size must be an integer"),
        (
            (torch.zeros(6), 2),
            {"kind": "ppo"},
            ValueError,
            "kind must be one of 'grpo', 'dr_grpo', 'rloo', .*got 'ppo'",
        ),
        ((torch.zeros(3, 2), 2), {}, ValueError, r"rewards must have shape \(N,\), got \(3, 2\)"),
        ((torch.zeros(6), 2), {"eps": -1.0}, ValueError, "eps must be"),
        ((torch.zeros(6, dtype=torch.long), 2), {}, TypeError, "rewards must be a floating-point tensor"),
    ],
)
def test_bad_arguments_of_group_advantages_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        group_advantages(*arguments, **options)


def test_numbers_of_numpy_are_numbers():
    rewards = torch.randn(6)
    numpy = pytest.importorskip("numpy")
    found = group_advantages(rewards, numpy.int64(3), eps=numpy.float32(0.5))
    torch.testing.assert_close(found, group_advantages(rewards, 3, eps=0.5))
    with pytest.raises(TypeError, match="group_size must be an integer"):
        group_advantages(rewards, numpy.float32(3))


def test_bad_arguments_of_whiten_are_named():
    with pytest.raises(TypeError, match="mask must be a bool tensor"):
        whiten(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"x must have shape \(2,\)"):
        whiten(torch.zeros(3), torch.ones(2, dtype=torch.bool))
