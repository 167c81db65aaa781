import pytest
import torch
import torch.nn.functional as F

from fastllm.ops import _linear_rows, token_logprobs
from fastllm.rl import (
    dpo_loss,
    kto_loss,
    linear_dpo_loss,
    linear_kto_loss,
    linear_logprobs,
    linear_orpo_loss,
    linear_sequence_logprobs,
    linear_simpo_loss,
    orpo_loss,
    sequence_logprobs,
    simpo_loss,
)

NAN = float("nan")
HOW = {"temperature": 0.9, "softcap": 5.0, "logit_scale": 1.3}
LENGTHS = torch.tensor([5, 1, 4, 2, 5, 3])


def batch(dtype=torch.float32):
    """Six sequences: hidden, weight, bias (learnt), tokens, mask, and reference log-probabilities of each."""
    learnt = {
        "hidden": torch.randn(6, 5, 8), "weight": torch.randn(37, 8) * 0.6, "bias": torch.randn(37)
    }  # fmt: skip
    learnt = {n: t.to(dtype).requires_grad_() for n, t in learnt.items()}
    return learnt, torch.randint(37, (6, 5)), torch.arange(5) < LENGTHS.unsqueeze(-1), -torch.rand(6, dtype=dtype) * 9


def plain(learnt, tokens, mask):
    """Sums over the responses from whole logits, and lengths."""
    z = 5.0 * torch.tanh(F.linear(*learnt.values()) * 1.3 / 5.0) / 0.9
    logp = z.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return logp.where(mask, 0.0).sum(-1), mask.sum(-1)


DESIRABLE = torch.tensor([True, False, False, True, False, True])
# name -> (from hidden states, from sums and lengths)
LOSSES = {
    **{
        f"dpo {kind}": (
            lambda ref, kind=kind, **a: linear_dpo_loss(**a, ref_chosen_logps=ref[:3], ref_rejected_logps=ref[3:], kind=kind),
            lambda x, n, ref, kind=kind: dpo_loss(
                x[:3], x[3:], ref[:3], ref[3:], kind=kind, chosen_lengths=n[:3], rejected_lengths=n[3:]
            ),
        )
        for kind in ("sigmoid", "robust", "hinge", "ipo")
    },
    "orpo": (lambda ref, **a: linear_orpo_loss(**a, beta=0.4), lambda x, n, ref: orpo_loss(x[:3], x[3:], n[:3], n[3:], beta=0.4)),
    "simpo": (lambda ref, **a: linear_simpo_loss(**a, gamma=0.3), lambda x, n, ref: simpo_loss(x[:3], x[3:], n[:3], n[3:], gamma=0.3)),
    "kto": (
        lambda ref, **a: linear_kto_loss(**a, ref_logps=ref, desirable=DESIRABLE, undesirable_weight=0.5),
        lambda x, n, ref: kto_loss(x, ref, DESIRABLE, undesirable_weight=0.5),
    ),
}  # fmt: skip
each_loss = pytest.mark.parametrize(("linear", "loss"), LOSSES.values(), ids=LOSSES)


def compare(ours, theirs, learnt):
    torch.testing.assert_close(ours.loss, theirs.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.stats, theirs.stats, atol=1e-5, rtol=1e-5)
    found, expected = (torch.autograd.grad(x.loss, tuple(learnt.values()), retain_graph=True) for x in (ours, theirs))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@each_loss
def test_is_the_loss_from_whole_logits(monkeypatch, linear, loss):
    monkeypatch.setattr(_linear_rows, "BUFFER_BYTES", {"cpu": 37 * 4 * 3})
    monkeypatch.setattr(_linear_rows, "CPU_CLASSES", 16)
    monkeypatch.setattr(_linear_rows, "SUM_ROWS", 2)
    learnt, tokens, mask, ref = batch()
    compare(linear(ref, **learnt, tokens=tokens, mask=mask, **HOW), loss(*plain(learnt, tokens, mask), ref), learnt)


@each_loss
def test_nothing_at_masked_positions_is_seen_and_packed_is_padded(linear, loss):
    learnt, tokens, mask, ref = batch()
    expected = loss(*plain(learnt, tokens, mask), ref)
    dirty = learnt["hidden"].masked_fill(~mask.unsqueeze(-1), NAN)
    found = linear(ref, **{**learnt, "hidden": dirty}, tokens=tokens.masked_fill(~mask, -100), mask=mask, **HOW)
    compare(found, expected, learnt)
    bounds = F.pad(LENGTHS.cumsum(0), (1, 0)).int()
    packed = linear(
        ref,
        **{**learnt, "hidden": learnt["hidden"][mask]},
        tokens=tokens[mask],
        mask=mask[mask],
        cu_seqlens=bounds,
        **HOW,
    )
    compare(packed, expected, learnt)


@each_loss
def test_empty_responses_give_no_nan(linear, loss):
    learnt, tokens, mask, ref = batch()
    mask = torch.zeros_like(mask)
    result = linear(ref, **learnt, tokens=tokens, mask=mask, **HOW)
    assert result.loss.isfinite()
    assert not any(g.any() for g in torch.autograd.grad(result.loss, tuple(learnt.values())))
    if loss in (LOSSES[name][1] for name in ("dpo ipo", "orpo", "simpo")):
        assert result.loss.item() == 0


@each_loss
def test_derivatives_in_fp64(linear, loss):
    learnt, tokens, mask, ref = batch(torch.float64)

    def f(hidden, weight):
        return linear(ref, hidden=hidden, weight=weight, tokens=tokens[:, :2], mask=mask[:, :2], **HOW).loss

    hidden, weight = (
        learnt["hidden"][:, :2, :3].detach().requires_grad_(),
        learnt["weight"][:, :3].detach().requires_grad_(),
    )
    torch.autograd.gradcheck(f, (hidden, weight), fast_mode=True)


def test_micro_batches_of_one_pair_add_up_to_the_batch():
    learnt, tokens, mask, ref = batch()
    whole = linear_dpo_loss(**learnt, tokens=tokens, mask=mask, ref_chosen_logps=ref[:3], ref_rejected_logps=ref[3:])
    total = torch.zeros(())
    for i in range(3):
        pair = torch.tensor([i, i + 3])
        total = total + linear_dpo_loss(
            **{**learnt, "hidden": learnt["hidden"][pair]}, tokens=tokens[pair], mask=mask[pair],
            ref_chosen_logps=ref[i : i + 1], ref_rejected_logps=ref[i + 3 : i + 4], num_items=3,
        ).loss  # fmt: skip
    found, expected = (torch.autograd.grad(x, tuple(learnt.values())) for x in (total, whole.loss))
    torch.testing.assert_close(found, expected)


def test_sums_and_lengths_of_responses_from_logits_and_from_hidden_states():
    learnt, tokens, mask, _ = batch()
    logits = F.linear(*learnt.values())
    logps, lengths = sequence_logprobs(token_logprobs(logits, tokens).masked_fill(~mask, NAN), mask)
    expected = logits.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).where(mask, 0.0).sum(-1)
    torch.testing.assert_close(logps, expected)
    assert lengths.tolist() == LENGTHS.tolist()
    torch.testing.assert_close(linear_sequence_logprobs(**learnt, tokens=tokens, mask=mask)[0], expected)


BAD = [
    (linear_dpo_loss, {"mask": torch.ones(3, 5, dtype=torch.bool)}, ValueError, "mask must be of 2B sequences.*got 3"),
    (linear_dpo_loss, {"mask": None}, TypeError, "mask must be a tensor, got NoneType"),
    (linear_orpo_loss, {"mask": torch.ones(4, 5)}, TypeError, "mask must be a bool tensor"),
    (linear_simpo_loss, {"mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"mask must have shape \(B, T\), or"),
    (linear_dpo_loss, {"ref_chosen_logps": torch.zeros(1)}, ValueError, r"ref_chosen_logps must have shape \(2,\)"),
    (linear_dpo_loss, {"ref_rejected_logps": [0.0]}, TypeError, "ref_rejected_logps must be a tensor, got list"),
    (linear_dpo_loss, {"kind": "apo"}, ValueError, "kind must be one of 'sigmoid', .*got 'apo'"),
    (linear_dpo_loss, {"kind": torch.zeros(3, 9)}, ValueError, r"got a tensor of shape \(3, 9\)"),
    (linear_dpo_loss, {"tokens": torch.zeros(4, 6, dtype=torch.long)}, ValueError, r"tokens must have shape \(4, 5\)"),
    (linear_dpo_loss, {"cu_seqlens": torch.tensor([0, 5]).int()}, ValueError, r"cu_seqlens is for packed tokens"),
    (linear_orpo_loss, {"cu_seqlens": [0, 5]}, ValueError, "cu_seqlens is for packed tokens"),
    (linear_dpo_loss, {"weight": torch.nn.Conv1d(8, 37, 1)}, ValueError, "weight must be a tensor .*got a Conv1d"),
    (linear_orpo_loss, {"beta": -1.0}, ValueError, "beta must be a finite number >= 0.0, got -1.0"),
    (linear_orpo_loss, {"num_items": -1}, ValueError, "num_items must be a finite number"),
    (linear_simpo_loss, {"beta": 0.0}, ValueError, "beta must be a finite number > 0.0, got 0.0"),
    (linear_simpo_loss, {"gamma": True}, TypeError, "gamma must be a number, got True"),
    (linear_kto_loss, {"beta": "x"}, TypeError, "beta must be a number, got 'x'"),
    (linear_kto_loss, {"gamma": 1.0}, TypeError, "unexpected keyword argument 'gamma'"),
    (linear_kto_loss, {"ref_logps": torch.zeros(3)}, ValueError, r"ref_logps must have shape \(4,\)"),
    (linear_kto_loss, {"desirable": torch.ones(4)}, TypeError, "desirable must be a bool tensor"),
]


@pytest.mark.parametrize(("loss", "change", "error", "message"), BAD)
def test_bad_arguments_are_named_before_any_product(monkeypatch, loss, change, error, message):
    monkeypatch.setattr(_linear_rows, "_sweep", lambda *a: pytest.fail("work was done"))
    good = {
        "hidden": torch.zeros(4, 5, 8), "weight": torch.zeros(37, 8), "tokens": torch.zeros(4, 5, dtype=torch.long),
        "mask": torch.ones(4, 5, dtype=torch.bool),
    }  # fmt: skip
    if loss is linear_dpo_loss:
        good |= {"ref_chosen_logps": torch.zeros(2), "ref_rejected_logps": torch.zeros(2)}
    if loss is linear_kto_loss:
        good |= {"ref_logps": torch.zeros(4), "desirable": torch.ones(4, dtype=torch.bool)}
    with pytest.raises(error, match=message) as caught:
        loss(**{**good, **change})
    assert "\n" not in str(caught.value)


def test_log_probabilities_of_tokens_are_those_of_whole_logits_and_0_where_masked():
    learnt, tokens, mask, _ = batch()
    given = {**learnt, "hidden": learnt["hidden"].detach().masked_fill(~mask.unsqueeze(-1), NAN).requires_grad_()}
    found = linear_logprobs(**given, tokens=tokens.masked_fill(~mask, 10**6), mask=mask, **HOW)
    z = 5.0 * torch.tanh(F.linear(*learnt.values()) * 1.3 / 5.0) / 0.9
    expected = z.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1).where(mask, 0.0)
    torch.testing.assert_close(found, expected)
    assert not found[~mask].any()
    weights = torch.randn(6, 5)
    grads = [
        torch.autograd.grad((x * weights).sum(), list(of.values())) for x, of in ((found, given), (expected, learnt))
    ]
    for got, wanted in zip(*grads):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
