import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.rl import sequence_scores, token_rewards

NAN = float("nan")


def loop(scores, logprobs, ref, mask, kl_coef, estimator, clip):
    """The definition, a token at a time, in Python's floats."""
    rewards = [[0.0] * mask.shape[1] for _ in range(mask.shape[0])]
    kls = []
    for b in range(mask.shape[0]):
        valid = [t for t in range(mask.shape[1]) if mask[b, t]]
        for t in valid:
            d = logprobs[b, t].item() - ref[b, t].item()
            k = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[estimator]
            kls.append(k)
            rewards[b][t] = -kl_coef * k
        if valid:
            score = scores[b].item()
            rewards[b][valid[-1]] += score if clip is None else min(max(score, -clip), clip)
    return torch.tensor(rewards, dtype=torch.float64), sum(kls) / max(1, len(kls))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 5), st.integers(0, 6), st.sampled_from(["k1", "k2", "k3"]), st.booleans(), st.integers(0, 2**31))
def test_is_the_definition_token_by_token(rows, length, estimator, clips, seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs, ref, scores = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((rows, length), (rows, length), (rows,))
    )
    mask = torch.rand(rows, length, generator=generator) < 0.6
    clip = 0.5 if clips else None
    expected, kl = loop(scores, logprobs, ref, mask, 0.3, estimator, clip)
    rewards, mean_kl = token_rewards(scores, logprobs, ref, mask, kl_coef=0.3, estimator=estimator, clip=clip)
    torch.testing.assert_close(rewards, expected.view(rows, length), atol=1e-12, rtol=1e-12)
    assert mean_kl.item() == pytest.approx(kl, abs=1e-12)


def test_nothing_at_masked_positions_is_seen_and_an_empty_row_keeps_no_score():
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    logprobs = torch.tensor([[-1.0, NAN, -2.0, float("inf")], [NAN] * 4], requires_grad=True)
    rewards, kl = token_rewards(torch.tensor([3.0, NAN]), logprobs, torch.zeros(2, 4), mask, kl_coef=0.5)
    assert rewards.tolist() == [[0.5, 0.0, 4.0, 0.0], [0.0] * 4]
    assert kl.item() == -1.5
    assert not rewards.requires_grad


def test_the_score_stands_at_the_last_valid_token_wherever_padding_is():
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 0]], dtype=torch.bool)
    rewards, _ = token_rewards(torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3, 4), torch.zeros(3, 4), mask)
    assert rewards.tolist() == [[0, 0, 1, 0], [0, 0, 0, 2], [0, 0, 3, 0]]


def test_bf16_log_probabilities_give_fp32_rewards():
    logprobs = torch.randn(2, 3).bfloat16()
    rewards, kl = token_rewards(torch.randn(2).bfloat16(), logprobs, logprobs, torch.ones(2, 3, dtype=torch.bool))
    assert rewards.dtype == kl.dtype == torch.float32


def test_matches_the_reward_of_trl_s_ppo_trainer_and_of_openrlhf():
    """TRL: rewards = -kl_coef * kl, then rewards[arange, last token] += scores. OpenRLHF: the same by scatter, scores clamped."""
    scores, logprobs, ref = torch.randn(4), torch.randn(4, 6), torch.randn(4, 6)
    lengths = torch.tensor([6, 1, 3, 4])
    mask = torch.arange(6) < lengths.unsqueeze(-1)
    trl = -0.05 * torch.where(mask, logprobs - ref, 0.0)
    trl[torch.arange(4), lengths - 1] += scores
    torch.testing.assert_close(token_rewards(scores, logprobs, ref, mask)[0], trl)
    ratio = ref - logprobs
    penalty = -0.1 * torch.where(mask, ratio.exp() - 1 - ratio, 0.0)
    last = 6 - 1 - mask.long().fliplr().argmax(1, keepdim=True)
    openrlhf = penalty + torch.zeros(4, 6).scatter_(1, last, scores.clamp(-0.5, 0.5).unsqueeze(1))
    ours, _ = token_rewards(scores, logprobs, ref, mask, kl_coef=0.1, estimator="k3", clip=0.5)
    torch.testing.assert_close(ours, openrlhf)


def test_sequence_scores_are_read_at_the_last_valid_token():
    scores = torch.tensor([[1.0, 2.0, NAN], [4.0, NAN, NAN], [NAN] * 3], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    read = sequence_scores(scores, mask)
    assert read.tolist() == [2.0, 4.0, 0.0]
    (grad,) = torch.autograd.grad(read.sum(), scores)
    assert grad.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"estimator": "kl"}, ValueError, "estimator must be one of 'k1', 'k2', 'k3', got 'kl'"),
        ({"scores": torch.zeros(3)}, ValueError, r"scores must have shape \(2,\) .* got \(3,\)"),
        ({"ref_logprobs": torch.zeros(2, 4)}, ValueError, r"ref_logprobs must have shape \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor"),
        ({"kl_coef": -1.0}, ValueError, "kl_coef must be"),
        ({"clip": 0.0}, ValueError, "clip must be"),
        ({"logprobs": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "logprobs must be a floating-point tensor"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {"scores": torch.zeros(2), "logprobs": torch.zeros(2, 3), "ref_logprobs": torch.zeros(2, 3)}
    good["mask"] = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(error, match=message):
        token_rewards(**{**good, **change})
