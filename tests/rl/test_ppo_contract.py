"""ppo_loss as a registered op, beside the formulas of the RLHF libraries, and its refusals."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastllm
from fastllm.rl import ppo_loss
from tests.rl.test_ppo import CASES, COEFS, LEARNT, batch, given_without_nan, grads_of


def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def assert_agrees(loss, theirs, given, names):
    torch.testing.assert_close(loss, theirs)
    tensors = [given[name] for name in names]
    for name, *grads in zip(names, *(torch.autograd.grad(x, tensors, retain_graph=True) for x in (loss, theirs))):
        torch.testing.assert_close(*grads, msg=lambda m: f"{name}: {m}")  # noqa: B023


def test_agrees_with_trls_ppo():
    """Policy and clipped value loss, both averaged over the valid tokens; vf_coef 0.1, cliprange 0.2."""
    g = given_without_nan()
    mask = g["mask"]
    ratio = torch.exp(g["logprobs"] - g["old_logprobs"])
    free, cut = -g["advantages"] * ratio, -g["advantages"] * ratio.clamp(0.8, 1.2)
    near = torch.clamp(g["values"], g["old_values"] - 0.2, g["old_values"] + 0.2)
    first, second = (g["values"] - g["returns"]) ** 2, (near - g["returns"]) ** 2
    policy, value = masked_mean(torch.max(free, cut), mask), 0.5 * masked_mean(torch.max(first, second), mask)
    kept = {n: g[n] for n in ("logprobs", "old_logprobs", "advantages", "mask", "values", "old_values", "returns")}
    loss, stats = ppo_loss(**kept)
    assert_agrees(loss, policy + 0.1 * value, g, ("logprobs", "values"))
    torch.testing.assert_close(stats["clip_fraction"], masked_mean((cut > free).float(), mask))
    torch.testing.assert_close(stats["value_clip_fraction"], masked_mean((second > first).float(), mask))
    torch.testing.assert_close(stats["policy_loss"], policy.detach())


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "gspo"])
def test_agrees_with_trls_grpo(loss_type):
    g = given_without_nan()
    g["mask"][1] = torch.rand(12) < 0.7  # TRL averages over all rows: every one has tokens here
    g["mask"][:, 0] = True
    mask, a = g["mask"], torch.randn(5)
    log_ratio = g["logprobs"] - g["old_logprobs"]
    if loss_type == "gspo":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    ratio = log_ratio.exp()
    tokens = -torch.min(ratio * a.unsqueeze(1), ratio.clamp(0.8, 1.28) * a.unsqueeze(1))
    apart = g["ref_logprobs"] - g["logprobs"]
    tokens = tokens + 0.04 * (torch.exp(apart) - apart - 1)
    by_row = ((tokens * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    theirs = {
        "grpo": by_row, "gspo": by_row, "bnpo": masked_mean(tokens, mask), "dr_grpo": (tokens * mask).sum() / (5 * 12),
        "dapo": (tokens * mask).sum() / 300,
    }[loss_type]  # fmt: skip
    how = {
        "grpo": {"aggregation": "seq-mean-token-mean"},
        "gspo": {"aggregation": "seq-mean-token-mean", "level": "sequence"},
        "bnpo": {}, "dr_grpo": {"aggregation": "token-sum-norm"}, "dapo": {"num_items": 300},
    }[loss_type]  # fmt: skip
    loss = ppo_loss(
        g["logprobs"], g["old_logprobs"], a, mask, ref_logprobs=g["ref_logprobs"], kl_coef=0.04, clip_high=0.28, **how
    ).loss
    assert_agrees(loss, theirs, g, ("logprobs",))


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_agrees_with_verls_dual_clip(aggregation):
    g = given_without_nan()
    g["mask"][1, 0] = True
    mask, a = g["mask"], g["advantages"]
    log_ratio = torch.clamp(g["logprobs"] - g["old_logprobs"], -20.0, 20.0)
    free, cut = -a * log_ratio.exp(), -a * log_ratio.exp().clamp(1 - 0.2, 1 + 0.28)
    upper = torch.maximum(free, cut)
    tokens = torch.where(a < 0, torch.min(-a * 3.0, upper), upper)

    def agg(x):
        sums = (x * mask).sum(-1)
        return {
            "token-mean": masked_mean(x, mask), "seq-mean-token-sum": sums.mean(),
            "seq-mean-token-mean": (sums / mask.sum(-1)).mean(),
        }[aggregation]  # fmt: skip

    kl = g["ref_logprobs"] - g["logprobs"]
    theirs = agg(tokens) - 0.001 * agg(g["entropy"]) + 0.01 * agg(torch.exp(kl) - kl - 1)
    loss, stats = ppo_loss(
        g["logprobs"], g["old_logprobs"], a, mask, dual_clip=3.0, clip_high=0.28, entropy=g["entropy"], entropy_coef=0.001,
        ref_logprobs=g["ref_logprobs"], kl_coef=0.01, kl_estimator="k3", aggregation=aggregation,
    )  # fmt: skip
    assert_agrees(loss, theirs, g, ("logprobs", "entropy"))
    torch.testing.assert_close(stats["approx_kl"], masked_mean(-log_ratio, mask).detach())
    torch.testing.assert_close(stats["clip_fraction"], masked_mean((cut > free).float(), mask))


def test_agrees_with_openrlhfs_policy_and_value_loss():
    g = given_without_nan()
    g["mask"][1, 0] = True
    mask, a = g["mask"], g["advantages"]
    ratio = (g["logprobs"] - g["old_logprobs"]).exp()
    least = torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a)
    tokens = -torch.where(a < 0, torch.max(least, 2.0 * a), least)
    policy = ((tokens * mask).sum(-1) / mask.sum(-1)).mean()
    near = g["old_values"] + (g["values"] - g["old_values"]).clamp(-0.2, 0.2)
    squares = torch.max((near - g["returns"]) ** 2, (g["values"] - g["returns"]) ** 2)
    value = 0.5 * ((squares * mask).sum(-1) / mask.sum(-1)).mean()
    names = ("logprobs", "old_logprobs", "advantages", "mask", "values", "old_values", "returns")
    loss = ppo_loss(
        **{n: g[n] for n in names}, dual_clip=2.0, aggregation="seq-mean-token-mean", value_coef=1.0, value_clip=0.2
    ).loss
    assert_agrees(loss, policy + value, g, ("logprobs", "values"))


OPTIONS = (None, -1.0, 0.2, 0.2, 2.0, 0.2, 0.5, 0.1, 0.3, 2)  # num_items to kl_estimator


def positional(given, cu_seqlens=None):
    names = (
        "logprobs", "old_logprobs", "advantages", "mask", "values", "old_values", "returns", "entropy", "ref_logprobs",
        "importance_weights",
    )  # fmt: skip
    return (*(given.get(n) for n in names), cu_seqlens)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_without_old_logprobs_the_policy_has_not_moved(level):
    g = given_without_nan()
    how = {"advantages": g["advantages"], "mask": g["mask"], "level": level}
    loss, stats = ppo_loss(g["logprobs"], None, **how)
    assert stats["ratio_max"] == 1
    assert_agrees(loss, ppo_loss(g["logprobs"], g["logprobs"].detach().clone(), **how).loss, g, ("logprobs",))
    # the policy gradient: that of -A * logprobs
    theirs = ppo_loss(g["logprobs"], None, **how | {"level": "token"}, variant="reinforce").loss
    torch.testing.assert_close(*(torch.autograd.grad(x, g["logprobs"])[0].sum() for x in (loss, theirs)))


def test_opcheck():
    given = given_without_nan(3, 6)
    few = {n: t for n, t in given.items() if n in ("logprobs", "old_logprobs", "advantages", "mask")}
    rows = few | {"advantages": torch.randn(3)}
    packed = {n: t[0].detach().requires_grad_(t.requires_grad) for n, t in few.items()}
    for tensors, how in (
        (positional(given), (0, 0, 0)), (positional(few), (1, 2, 0)), (positional(rows), (0, 1, 1)),
        (positional(packed, torch.tensor([0, 2, 6], dtype=torch.int32)), (1, 2, 0)),
    ):  # fmt: skip
        torch.library.opcheck(torch.ops.fastllm.ppo_loss.default, (*tensors, *OPTIONS, *how))
    tensors = tuple(None if t is None else t.detach() for t in positional(given))
    loss, _, *stored = torch.ops.fastllm.ppo_loss(*tensors, *OPTIONS, 0, 0, 0)
    torch.library.opcheck(
        torch.ops.fastllm.ppo_loss_backward.default, (torch.ones_like(loss), *stored, *tensors, *OPTIONS, 0, 0, 0)
    )


def test_opcheck_in_place():
    given = batch(3, 40, torch.float32, masked=0.0)
    grads = (torch.randn(3, 40), torch.randn(3, 40), torch.empty(0))
    arguments = (torch.tensor(2.0), torch.tensor(0.5), given["mask"], *grads)
    torch.library.opcheck(torch.ops.fastllm.ppo_loss_backward_.default, arguments)


def test_compiles_without_a_graph_break():
    given = given_without_nan(3, 8)

    def scaled(given):
        found = ppo_loss(**given, **COEFS, **CASES["gspo"], num_items=torch.tensor(5))
        return found.loss * 2, found.stats

    compiled = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    (loss, stats), (expected, told) = compiled(given), scaled(given)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(stats, told)
    torch.testing.assert_close(grads_of(loss, given), grads_of(expected, given))


def test_forward_and_backward_pass_are_traced_together():
    given = given_without_nan(3, 8)
    learnt = [given[name] for name in LEARNT]

    def grads(scale, *learnt):
        loss = ppo_loss(**given | dict(zip(LEARNT, learnt)), **COEFS).loss
        return torch.autograd.grad(loss, learnt, scale)

    traced = make_fx(grads)(torch.tensor(1.0), *learnt)
    for scale in (torch.tensor(1.0), torch.tensor(0.3)):
        torch.testing.assert_close(traced(scale, *learnt), grads(scale, *learnt))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for grad, x in zip(grads(torch.tensor(1.0), *learnt), learnt):
            assert grad.shape == x.shape


def test_explain_says_which_kernel_serves():
    given = batch(2, 3, torch.float32)
    assert fastllm.backends.explain("ppo_loss", **given).startswith("ppo_loss: cpp")
    given["logprobs"] = given["logprobs"].double()
    assert fastllm.backends.explain("ppo_loss", **given).startswith("ppo_loss: torch")


X, M = torch.ones(2, 4), torch.ones(2, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logprobs": X.long()}, TypeError, "logprobs must be a floating-point tensor"),
        ({"logprobs": X.view(2, 2, 2)}, ValueError, r"logprobs must have shape \(B, T\) or \(T,\)"),
        ({"old_logprobs": X[:, :3]}, ValueError, r"old_logprobs must have shape \(2, 4\) .*got \(2, 3\)"),
        ({"advantages": X[0]}, ValueError, r"advantages must have shape \(2, 4\) .*or \(2,\) or \(2, 1\).*got \(4,\)"),
        ({"mask": X}, TypeError, r"mask must be a bool tensor, got torch.float32 \(mask.bool\(\) makes one"),
        ({"mask": M[:1]}, ValueError, r"mask must have shape \(2, 4\)"),
        ({"mask": M.to("meta")}, ValueError, "mask and logprobs must be on one device"),
        ({"values": X}, ValueError, "values was given without returns"),
        ({"returns": X}, ValueError, "returns was given without values"),
        ({"old_values": X}, ValueError, "old_values was given without values"),
        ({"values": X, "returns": X, "old_values": X, "value_clip": -0.1}, ValueError, "value_clip .* got -0.1"),
        ({"entropy_coef": 0.1}, ValueError, "entropy_coef is 0.1, but no entropy was given"),
        ({"kl_coef": 0.1}, ValueError, "kl_coef is 0.1, but no ref_logprobs were given"),
        ({"entropy": X[0], "entropy_coef": 0.1}, ValueError, r"entropy must have shape \(2, 4\)"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
        ({"level": "word"}, ValueError, "level must be one of 'token', 'sequence', got 'word'"),
        ({"variant": "gspo"}, ValueError, "variant must be one of 'ppo', 'cispo', 'reinforce', got 'gspo'"),
        (
            {"aggregation": "mean"}, ValueError,
            "aggregation must be one of 'token-mean', 'seq-mean-token-sum', 'seq-mean-token-mean', 'token-sum-norm', got",
        ),
        ({"clip_low": -0.1}, ValueError, "clip_low .* got -0.1"),
        ({"dual_clip": 1.0}, ValueError, "dual_clip .* > 1.0, got 1.0"),
        ({"dual_clip": 3.0, "variant": "cispo"}, ValueError, "dual_clip is a bound of variant='ppo', got .*'cispo'"),
        ({"num_items": -1}, ValueError, "num_items .* got -1"),
        ({"num_items": torch.ones(2)}, ValueError, "num_items must have one element"),
        ({"cu_seqlens": torch.tensor([0, 8]).int()}, ValueError, r"cu_seqlens is for packed tokens .*\(2, 4\)"),
        ({"value_coef": float("nan")}, ValueError, "value_coef must be a finite number"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changed, error, message):
    with pytest.raises(error, match=message):
        ppo_loss(**{"logprobs": X, "old_logprobs": X, "advantages": X, "mask": M, **changed})
