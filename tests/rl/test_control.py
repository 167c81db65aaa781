import pytest
import torch

from fastllm.rl import AdaptiveKL, should_stop


def test_the_coefficient_follows_the_clipped_proportional_error():
    kl = AdaptiveKL(init=0.2, target=6.0, horizon=10000)
    assert kl.update(6.6, 256) == pytest.approx(0.2 * (1 + 0.1 * 256 / 10000))  # as TRL's AdaptiveKLController.update
    before = kl.value
    assert kl.update(torch.tensor(600.0), 500) == pytest.approx(before * (1 + 0.2 * 500 / 10000))
    before = kl.value
    kl.update(float("-inf"), 500)
    assert kl.value == pytest.approx(before * (1 - 0.2 * 500 / 10000))
    other = AdaptiveKL()
    other.load_state_dict(kl.state_dict())
    assert vars(other) == vars(kl)


def test_a_kl_that_is_no_number_changes_nothing():
    kl = AdaptiveKL()
    with pytest.raises(ValueError, match="kl must be a number, got nan"):
        kl.update(float("nan"), 10)
    assert kl.value == 0.2
    with pytest.raises(ValueError, match="n must be"):
        kl.update(1.0, -1)
    with pytest.raises(ValueError, match="target must be"):
        AdaptiveKL(target=0.0)
    with pytest.raises(ValueError, match=r"kl must have one element, got shape \(2,\)"):
        kl.update(torch.ones(2), 10)
    with pytest.raises(TypeError, match="kl must be a number or a tensor with one element, got str"):
        kl.update("much", 10)
    with pytest.raises(ValueError, match="state must hold value, target, horizon, got none for target, horizon"):
        kl.load_state_dict({"value": 1.0})
    assert repr(kl) == "AdaptiveKL(value=0.2, target=6, horizon=10000)"


def test_the_coefficient_never_turns_into_a_bonus():
    kl = AdaptiveKL(init=0.2, target=6.0, horizon=100)
    with pytest.raises(ValueError, match=r"n must be less than 5 [*] horizon = 500 .*got 500"):
        kl.update(0.0, 500)
    assert kl.value == 0.2
    assert kl.update(0.0, 499) == pytest.approx(0.2 * 0.002)
    assert kl.update(60.0, 1000) == pytest.approx(0.2 * 0.002 * 3)


def test_stops_beyond_one_and_a_half_times_the_target():
    assert not should_stop(0.015, 0.01)
    assert should_stop(0.0151, 0.01)
    assert should_stop(torch.tensor(1.0, requires_grad=True), 0.5)
    assert not should_stop(torch.tensor(-1.0), 0.5)
    assert should_stop(float("nan"), 0.5)
    assert not should_stop(float("nan"), None)
    assert not should_stop(float("nan"), 0.5, count=0)  # the mean of no token


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"policy_kl must have one element, got shape \(2,\)"):
        should_stop(torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match="target_kl must be"):
        should_stop(0.1, 0.0)
    with pytest.raises(TypeError, match="policy_kl must be a number"):
        should_stop("much", 0.1)
    with pytest.raises(ValueError, match=r"count must be a finite number >= 0[.]0, got -1"):
        should_stop(0.1, 0.1, count=-1)
