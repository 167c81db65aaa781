import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm.rl import dpo_loss, kto_loss, orpo_loss, reward_loss, simpo_loss

NAMES = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


def log_sigmoid(x):
    return -math.log1p(math.exp(-x)) if x > -700 else x


def mean(values):
    return sum(values) / len(values)


def pairs(rows=6, dtype=torch.float64, seed=0):
    """Sums of log-probabilities of responses of 1 to 9 tokens, under policy and reference, and the lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (2, rows), generator=generator)
    logps = [-torch.rand(rows, generator=generator, dtype=torch.float64) * n for n in (*lengths, *lengths)]
    return [x.to(dtype) for x in logps], list(lengths)


def dpo_by_hand(lc, lr, rc, rr, beta, kind, e, n=None, m=None):
    if kind == "ipo":
        lc, rc, lr, rr = lc / n, rc / n, lr / m, rr / m
    difference = (lc - lr) - (rc - rr)
    z = beta * difference
    return {
        "sigmoid": -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z),
        "robust": (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e),
        "hinge": max(0.0, 1 - z),
        "ipo": (difference - 1 / (2 * beta)) ** 2,
    }[kind]


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([("sigmoid", 0.0), ("sigmoid", 0.3), ("robust", 0.0), ("robust", 0.2), ("hinge", 0.0), ("ipo", 0.0)]),
    st.integers(1, 5), st.floats(0.01, 2.0), st.integers(0, 2**31),
)  # fmt: skip
def test_dpo_is_the_definition(how, rows, beta, seed):
    (kind, smoothing), (logps, (n, m)) = how, pairs(rows, seed=seed)
    found = dpo_loss(
        *logps, beta=beta, kind=kind, label_smoothing=smoothing, chosen_lengths=n, rejected_lengths=m
    )  # fmt: skip
    expected = [
        dpo_by_hand(*(x[i].item() for x in logps), beta, kind, smoothing, n[i].item(), m[i].item()) for i in range(rows)
    ]
    assert found.loss.item() == pytest.approx(mean(expected), rel=1e-10)
    lc, lr, rc, rr = ([v.item() for v in x] for x in logps)
    if kind == "ipo":
        lc, rc, lr, rr = ([v / k.item() for v, k in zip(x, y)] for x, y in ((lc, n), (rc, n), (lr, m), (rr, m)))
    chosen, rejected = ([beta * (a - b) for a, b in zip(x, y)] for x, y in ((lc, rc), (lr, rr)))
    assert found.stats["chosen_rewards"].item() == pytest.approx(mean(chosen))
    assert found.stats["rejected_rewards"].item() == pytest.approx(mean(rejected))
    assert found.stats["accuracy"].item() == pytest.approx(mean([float(a > b) for a, b in zip(chosen, rejected)]))
    assert found.stats["margin"].item() == pytest.approx(mean(chosen) - mean(rejected), abs=1e-12)


def test_dpo_matches_the_formulas_of_trl():
    """DPOTrainer: logits = (lc - lr) - (rc - rr); its losses of loss_type sigmoid, robust, hinge and ipo. OpenRLHF's DPOLoss has
    the same sigmoid with label smoothing, and the same ipo."""
    (lc, lr, rc, rr), (n, m) = pairs(dtype=torch.float32)
    beta, e = 0.2, 0.1
    logits = (lc - lr) - (rc - rr)
    averaged = (lc / n - lr / m) - (rc / n - rr / m)
    trl = {
        "sigmoid": -F.logsigmoid(beta * logits) * (1 - e) - F.logsigmoid(-beta * logits) * e,
        "robust": (-F.logsigmoid(beta * logits) * (1 - e) + F.logsigmoid(-beta * logits) * e) / (1 - 2 * e),
        "hinge": torch.relu(1 - beta * logits),
        "ipo": (averaged - 1 / (2 * beta)) ** 2,
    }
    for kind, expected in trl.items():
        smoothing = e if kind in ("sigmoid", "robust") else 0.0
        found = dpo_loss(
            lc, lr, rc, rr, beta=beta, kind=kind, label_smoothing=smoothing, chosen_lengths=n, rejected_lengths=m
        )
        torch.testing.assert_close(found.loss, expected.mean())


def test_ipo_takes_log_probabilities_as_they_are_without_lengths():
    (lc, lr, rc, rr), _ = pairs()
    expected = mean([dpo_by_hand(*(x[i].item() for x in (lc, lr, rc, rr)), 0.1, "ipo", 0.0, 1, 1) for i in range(6)])
    assert dpo_loss(lc, lr, rc, rr, kind="ipo").loss.item() == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.floats(0.0, 2.0), st.integers(0, 2**31))
def test_orpo_and_simpo_are_the_definitions(rows, beta, seed):
    (lc, lr, _, _), (n, m) = pairs(rows, seed=seed)
    orpo, simpo = [], []
    for a, b in zip((lc / n).tolist(), (lr / m).tolist()):
        odds = [math.exp(x) / (1 - math.exp(x)) for x in (a, b)]
        orpo.append(-a - beta * log_sigmoid(math.log(odds[0] / odds[1])))
        simpo.append(-log_sigmoid((beta + 0.1) * (a - b) - 0.7))
    found = orpo_loss(lc, lr, n, m, beta=beta)
    assert found.loss.item() == pytest.approx(mean(orpo), rel=1e-9)
    assert found.stats["nll"].item() == pytest.approx(-(lc / n).mean().item())
    assert simpo_loss(lc, lr, n, m, beta=beta + 0.1, gamma=0.7).loss.item() == pytest.approx(mean(simpo), rel=1e-9)


def test_orpo_simpo_and_kto_match_the_formulas_of_trl():
    (lc, lr, rc, _), (n, m) = pairs(dtype=torch.float32)
    a, b = lc / n, lr / m
    log_odds = (a - b) - (torch.log1p(-torch.exp(a)) - torch.log1p(-torch.exp(b)))  # ORPOTrainer.odds_ratio_loss
    torch.testing.assert_close(
        orpo_loss(lc, lr, n, m, beta=0.3).loss, -a.mean() - (0.3 * F.logsigmoid(log_odds)).mean()
    )
    simpo = -F.logsigmoid(
        2.0 * ((a - b) - 0.5 / 2.0)
    )  # CPOTrainer, loss_type simpo: gamma / beta is taken from the logits
    torch.testing.assert_close(simpo_loss(lc, lr, n, m, beta=2.0, gamma=0.5).loss, simpo.mean())
    desirable = torch.tensor([True, False, True, True, False, False])
    ratio, kl = lc - rc, (lr - rc).mean().clamp(min=0)  # KTOTrainer.kto_loss
    losses = torch.where(
        desirable, 1.5 * (1 - torch.sigmoid(0.1 * (ratio - kl))), 1 - torch.sigmoid(0.1 * (kl - ratio))
    )
    found = kto_loss(lc, rc, desirable, kl=lr - rc, desirable_weight=1.5)
    torch.testing.assert_close(found.loss, losses.mean())
    torch.testing.assert_close(found.stats["kl"], kl)


def test_kto_is_the_definition_with_the_batch_s_own_kl():
    (logps, _, ref, _), _ = pairs()
    ref = ref - 1  # so that KL is above 0
    desirable = torch.tensor([True, False, True, False, False, True])
    ratio = (logps - ref).tolist()
    kl = max(0.0, mean(ratio))
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    expected = [
        2.0 * (1 - sigmoid(0.3 * (r - kl))) if good else 0.5 * (1 - sigmoid(0.3 * (kl - r)))
        for r, good in zip(ratio, desirable.tolist())
    ]
    found = kto_loss(logps, ref, desirable, beta=0.3, desirable_weight=2.0, undesirable_weight=0.5)
    assert found.loss.item() == pytest.approx(mean(expected))
    assert found.stats["chosen_rewards"].item() == pytest.approx(mean([0.3 * ratio[i] for i in (0, 2, 5)]))
    assert found.stats["rejected_rewards"].item() == pytest.approx(mean([0.3 * ratio[i] for i in (1, 3, 4)]))
    right = [(r > kl) == good for r, good in zip(ratio, desirable.tolist())]
    assert found.stats["accuracy"].item() == pytest.approx(mean(right))


def test_an_empty_response_counts_for_nothing_in_kto():
    (logps, _, ref, _), (lengths, _) = pairs()
    ref, lengths = ref - 1, lengths.clone()
    desirable = torch.tensor([True, False, True, False, False, True])
    lengths[[1, 2]] = 0
    some = lengths > 0
    logps[1], ref[2] = float("nan"), float("inf")  # whatever they are
    logps.requires_grad_()
    found = kto_loss(logps, ref, desirable, lengths=lengths, undesirable_weight=0.5)
    wanted = kto_loss(logps[some], ref[some], desirable[some], undesirable_weight=0.5)
    torch.testing.assert_close(found, wanted)
    assert wanted.stats["kl"] > 0
    torch.testing.assert_close(*(torch.autograd.grad(loss, logps)[0] for loss in (found.loss, wanted.loss)))
    assert kto_loss(logps, ref, desirable, lengths=0 * lengths).loss == 0


def test_reward_loss_is_the_definition_and_trl_s():
    chosen, rejected, margin = torch.randn(3, 5, dtype=torch.float64)
    expected = mean(
        [
            -log_sigmoid(c - r - k) + 0.01 * (c + r) ** 2
            for c, r, k in zip(*(x.tolist() for x in (chosen, rejected, margin)))
        ]
    )
    found = reward_loss(chosen, rejected, margin=margin, center=0.01)
    assert found.loss.item() == pytest.approx(expected)
    trl = -F.logsigmoid(chosen - rejected - margin).mean() + 0.01 * torch.mean((chosen + rejected) ** 2)
    torch.testing.assert_close(found.loss, trl)
    assert found.stats["accuracy"].item() == pytest.approx((chosen > rejected).double().mean().item())
    torch.testing.assert_close(reward_loss(chosen, rejected, margin=0.5).loss, reward_loss(chosen, rejected + 0.5).loss)


DESIRABLE = torch.tensor([True, False, False, True, True, False, True, False])
# name -> (loss of a slice of a batch of 8, learnt tensors first) with every option set
LOSSES = {
    **{
        f"dpo {kind}": lambda x, n, i, items, kind=kind: dpo_loss(
            *(t[i] for t in x), kind=kind, label_smoothing=0.1 if kind in ("sigmoid", "robust") else 0.0, beta=0.5,
            chosen_lengths=n[0][i], rejected_lengths=n[1][i], num_items=items,
        )
        for kind in ("sigmoid", "robust", "hinge", "ipo")
    },
    "orpo": lambda x, n, i, items: orpo_loss(x[0][i], x[1][i], n[0][i], n[1][i], beta=0.4, num_items=items),
    "simpo": lambda x, n, i, items: simpo_loss(x[0][i], x[1][i], n[0][i], n[1][i], num_items=items),
    "kto": lambda x, n, i, items: kto_loss(
        x[0][i], x[1][i].detach(), DESIRABLE[i], kl=(x[0] - x[2]).detach(), undesirable_weight=0.7, num_items=items
    ),
    "reward": lambda x, n, i, items: reward_loss(x[0][i], x[1][i], margin=x[2][i].detach(), center=0.1, num_items=items),
}  # fmt: skip
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
ALL = torch.arange(8)


@each_loss
def test_gradients_are_those_of_the_value(loss):
    logps, lengths = pairs(8)
    learnt = [x.requires_grad_() for x in logps[:2]]
    f = lambda *learnt: loss([*learnt, *logps[2:]], lengths, ALL, None).loss  # noqa: E731
    if loss is LOSSES["kto"]:
        f = lambda *learnt: kto_loss(learnt[0], logps[2], DESIRABLE, kl=learnt[1].detach()).loss + 0 * learnt[1].sum()  # noqa: E731
    torch.autograd.gradcheck(f, learnt)
    torch.autograd.gradgradcheck(f, learnt)


@each_loss
def test_eight_micro_batches_of_one_add_up_to_the_batch_and_order_does_not_matter(loss):
    logps, lengths = pairs(8)
    logps[0].requires_grad_()
    whole = loss(logps, lengths, ALL, None).loss
    (expected,) = torch.autograd.grad(whole, logps[0])
    for items in (8, torch.tensor(8)):
        parts = sum(loss(logps, lengths, ALL[i : i + 1], items).loss for i in range(8))
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(torch.autograd.grad(parts, logps[0])[0], expected)
    shuffled = loss(logps, lengths, torch.randperm(8), None).loss
    torch.testing.assert_close(shuffled, whole)
    torch.testing.assert_close(torch.autograd.grad(shuffled, logps[0])[0], expected)


@each_loss
def test_no_pair_is_a_loss_of_zero_with_zero_gradients(loss):
    logps, lengths = pairs(8)
    logps[0].requires_grad_()
    for items in (None, 8):
        loss_value, stats = loss(logps, lengths, ALL[:0], items)
        assert loss_value.item() == 0
        assert not torch.autograd.grad(loss_value, logps[0])[0].any()
        assert all(x.item() == 0 for name, x in stats.items() if name != "kl")


@each_loss
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_log_probabilities_stay_finite(loss, size):
    logps, lengths = pairs(8, torch.float32)
    logps[0] = (logps[0] * 0 - abs(size) if size < 0 else logps[0] * 0).requires_grad_()
    logps[1] = logps[1] * 0 - (abs(size) if size > 0 else 0)
    value, stats = loss(logps, lengths, ALL, None)
    assert value.isfinite()
    assert torch.autograd.grad(value, logps[0])[0].isfinite().all()
    assert all(x.isfinite() and x.dim() == 0 and not x.requires_grad for x in stats.values())


@pytest.mark.parametrize("loss", [LOSSES["dpo ipo"], LOSSES["orpo"], LOSSES["simpo"]], ids=["ipo", "orpo", "simpo"])
def test_a_pair_with_an_empty_response_counts_for_nothing(loss):
    logps, lengths = pairs(8)
    with_empty = [n.clone() for n in lengths]
    with_empty[0][2] = with_empty[1][5] = 0
    logps[0][2], logps[1][5] = float("nan"), 0.0
    logps[0].requires_grad_()
    rest = torch.tensor([0, 1, 3, 4, 6, 7])
    found, stats = loss(logps, with_empty, ALL, None)
    expected, expected_stats = loss(logps, lengths, rest, None)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(stats, expected_stats)
    torch.testing.assert_close(torch.autograd.grad(found, logps[0]), torch.autograd.grad(expected, logps[0]))


def test_orpo_of_a_response_of_probability_one_has_finite_odds():
    one = torch.zeros(1, requires_grad=True)
    loss, stats = orpo_loss(one, torch.full((1,), -2.0), torch.ones(1), torch.ones(1))
    assert 0 < stats["log_odds"].item() < 30
    assert torch.autograd.grad(loss, one)[0].isfinite().all()


def test_reference_and_kl_are_constants_and_half_precision_gives_fp32():
    (lc, lr, rc, rr), _ = pairs(dtype=torch.bfloat16)
    tensors = [x.requires_grad_() for x in (lc, lr, rc, rr)]
    loss, stats = dpo_loss(*tensors)
    assert loss.dtype == stats["accuracy"].dtype == torch.float32
    loss.backward()
    assert lc.grad.any()
    assert lr.grad.any()
    assert rc.grad is None
    assert rr.grad is None
    lc.grad = None
    kto_loss(lc, rc, DESIRABLE[:6], kl=lr * 0 + 1).loss.backward()
    assert lc.grad.any()
    assert rc.grad is None


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"kind": "dpo"}, ValueError, "kind must be one of 'sigmoid', 'robust', 'hinge', 'ipo', got 'dpo'"),
        ({"beta": 0.0}, ValueError, "beta must be"),
        ({"rejected_logps": torch.zeros(3)}, ValueError, r"rejected_logps must have shape \(2,\) .*got \(3,\)"),
        ({"chosen_logps": torch.zeros(2, 1)}, ValueError, r"chosen_logps must have shape \(B,\), got \(2, 1\)"),
        ({"chosen_logps": torch.zeros(2, dtype=torch.long)}, TypeError, "chosen_logps must be a floating-point tensor"),
        ({"kind": "robust", "label_smoothing": 0.5}, ValueError, "label_smoothing must be below 0.5"),
        ({"kind": "hinge", "label_smoothing": 0.1}, ValueError, "label_smoothing must be 0 for kind='hinge', got 0.1"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be"),
        ({"chosen_lengths": torch.ones(2)}, ValueError, "chosen_lengths and rejected_lengths must be given together"),
        (
            {"chosen_lengths": torch.ones(2), "rejected_lengths": torch.ones(2, dtype=torch.bool)},
            TypeError, "rejected_lengths must count tokens",
        ),
        ({"num_items": 0}, ValueError, "num_items must be"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items must have one element"),
    ],
)  # fmt: skip
def test_bad_arguments_of_dpo_are_named(change, error, message):
    with pytest.raises(error, match=message):
        dpo_loss(**{**{name: torch.zeros(2) for name in NAMES}, **change})


def test_bad_arguments_of_the_others_are_named():
    zeros, ones = torch.zeros(2), torch.ones(2)
    with pytest.raises(TypeError, match="desirable must be a bool tensor"):
        kto_loss(zeros, zeros, ones)
    with pytest.raises(ValueError, match="undesirable_weight must be"):
        kto_loss(zeros, zeros, ones > 0, undesirable_weight=-1.0)
    with pytest.raises(ValueError, match=r"rejected_lengths must have shape \(2,\)"):
        orpo_loss(zeros, zeros, ones, torch.ones(3))
    with pytest.raises(ValueError, match="gamma must be"):
        simpo_loss(zeros, zeros, ones, ones, gamma=float("nan"))
    with pytest.raises(ValueError, match=r"margin must have shape \(2,\)"):
        reward_loss(zeros, zeros, margin=torch.ones(3))
    with pytest.raises(TypeError, match="margin must hold real numbers, got dtype"):
        reward_loss(zeros, zeros, margin=ones.to(torch.complex64))
    with pytest.raises(TypeError, match=r"margin must be a tensor \(2,\) or a number, got a list"):
        reward_loss(zeros, zeros, margin=[1.0, 1.0])
    with pytest.raises(ValueError, match="center must be"):
        reward_loss(zeros, zeros, center=-0.1)
