import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastllm
from bench.device import Cpu
from fastllm.ops import _linear_rows
from fastllm.ops._ppo_loss import AGGREGATIONS, LEVELS, VARIANTS
from fastllm.rl import linear_ppo_loss, ppo_loss
from tests.ops.harness import check_op, each_backend, each_dtype

NAN = float("nan")
HOW = {"temperature": 0.8, "softcap": 6.0, "logit_scale": 1.5}
COEFS = {"value_coef": 0.5, "entropy_coef": 0.05, "kl_coef": 0.2}
NAMES = ("old_logprobs", "advantages", "ref_logprobs", "old_values", "returns")
STEPS = torch.tensor([-0.6, -0.05, 0.04, 0.5], dtype=torch.float64)  # log-ratios that no rounding takes across a clip


def logprobs(hidden, weight, tokens, bias=None, temperature=1.0, softcap=None, logit_scale=1.0):
    """The unfused head: (log-probabilities, entropies)."""
    z = F.linear(hidden, weight, bias) * logit_scale
    logp = ((softcap * torch.tanh(z / softcap) if softcap else z) / temperature).log_softmax(-1)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def batch(rows=4, length=6, channels=16, classes=97, dtype=torch.float64):
    """(learnt tensors, tokens, mask with gaps and an empty row, the rest by name)."""
    learnt = {
        "hidden": torch.randn(rows, length, channels, dtype=torch.float64),
        "weight": torch.randn(classes, channels, dtype=torch.float64) * 0.5,
        "bias": torch.randn(classes, dtype=torch.float64),
        "values": torch.randn(rows, length, dtype=torch.float64),
    }
    learnt = {name: t.to(dtype) for name, t in learnt.items()}
    tokens = torch.randint(classes, (rows, length))
    h, w, b, v = (t.double() for t in learnt.values())
    exact, _ = logprobs(h, w, tokens, b, **HOW)
    given = {
        "old_logprobs": exact + STEPS[torch.randint(4, exact.shape)],
        "advantages": torch.randn(rows, length, dtype=torch.float64),
        "ref_logprobs": exact + 0.3 * torch.randn(rows, length, dtype=torch.float64),
        "old_values": v + torch.where(torch.rand(rows, length) < 0.5, -1.0, 1.0),
        "returns": v + torch.where(torch.rand(rows, length) < 0.5, -3.0, 3.0),
    }
    mask = torch.rand(rows, length) < 0.7
    mask[0] = True
    if rows > 2:
        mask[1] = False
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return learnt, tokens, mask, {name: t.to(wide) for name, t in given.items()}


def unfused(learnt, tokens, mask, given, **options):
    """ppo_loss of log-probabilities from whole logits."""
    how = {name: options.pop(name) for name in HOW if name in options}
    found, entropy = logprobs(learnt["hidden"], learnt["weight"], tokens, learnt["bias"], **how)
    return ppo_loss(found, mask=mask, entropy=entropy, values=learnt["values"], **given, **options)


def fused(learnt, tokens, mask, given, **options):
    return linear_ppo_loss(tokens=tokens, mask=mask, **learnt, **given, **options)


def with_gradients(learnt):
    return {name: t.detach().clone().requires_grad_() for name, t in learnt.items()}


def gradients(result, learnt):
    return dict(zip(learnt, torch.autograd.grad(result.loss, tuple(learnt.values()))))


def assert_same(ours, learnt_ours, theirs, learnt_theirs, **tolerance):
    torch.testing.assert_close(ours.loss, theirs.loss, check_dtype=False, **tolerance)
    torch.testing.assert_close(dict(ours.stats), dict(theirs.stats), check_dtype=False, **tolerance)
    found, expected = gradients(ours, learnt_ours), gradients(theirs, learnt_theirs)
    torch.testing.assert_close(found, expected, check_dtype=False, **tolerance)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(_linear_rows, "BUFFER_BYTES", {"cpu": 97 * 4 * 5, "cuda": 97 * 4 * 5})
    monkeypatch.setattr(_linear_rows, "CPU_CLASSES", 40)


def formula(hidden, weight, tokens, mask, bias, values, old, advantages, ref, old_values, returns):
    """The loss of a token-level PPO with every term, restated: token-mean, k3, clip 0.2, value clip 0.2, dual clip 2."""
    logp, entropy = logprobs(hidden, weight, tokens, bias, **HOW)
    ratio = (logp - old).exp()
    policy = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    policy = torch.where(advantages < 0, torch.minimum(policy, -advantages * 2.0), policy)
    d = logp - ref
    near = old_values + (values - old_values).clamp(-0.2, 0.2)
    value = 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
    token = policy + 0.5 * value - 0.05 * entropy + 0.2 * ((-d).exp() - 1 + d)
    return token[mask].sum() / mask.sum()


@each_backend
@each_dtype
def test_matches_the_formula_in_fp64(small_chunks, backend, device, dtype):
    learnt, tokens, mask, given = batch()
    inputs = [learnt["hidden"], learnt["weight"], tokens, mask, learnt["bias"], learnt["values"], *given.values()]

    def ours(hidden, weight, tokens, mask, bias, values, old, advantages, ref, old_values, returns):
        return linear_ppo_loss(
            hidden, weight, tokens, old, advantages, mask, bias=bias, values=values, ref_logprobs=ref,
            old_values=old_values, returns=returns, dual_clip=2.0, **HOW, **COEFS,
        ).loss  # fmt: skip

    hidden, weight, bias = (inputs[i].to(dtype).double() for i in (0, 1, 4))
    exact, _ = logprobs(hidden, weight, tokens, bias, **HOW)
    inputs[6] = exact + STEPS[torch.randint(4, exact.shape)]
    constants = tuple(range(6, 11))
    inputs[6:] = [t.float().double() for t in inputs[6:]]
    check_op(ours, inputs, dtype, backend, device, reference=formula, no_grad=constants, keep_dtype=constants)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_is_the_unfused_loss_statistics_and_gradients(small_chunks, level, aggregation):
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    for variant, estimator, items, entropy_coef in zip(
        VARIANTS, ("k1", "k2", "k3"), (None, 7.0, torch.tensor(13.0)), (0.0, 0.05, 0.05), strict=True
    ):
        options = {
            **HOW, **COEFS, "level": level, "aggregation": aggregation, "variant": variant, "kl_estimator": estimator,
            "num_items": items, "entropy_coef": entropy_coef, "importance_weights": torch.rand(4, 6) + 0.5,
            "clip_high": 0.3, "dual_clip": 3.0 if variant == "ppo" else None,
        }  # fmt: skip
        a, b = with_gradients(learnt), with_gradients(learnt)
        ours = fused(a, tokens, mask, given, **options, with_entropy=True)
        assert_same(ours, a, unfused(b, tokens, mask, given, **options), b, atol=1e-5, rtol=2e-5)


def test_advantages_may_be_one_a_sequence():
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    per_row = torch.randn(4)
    found = {}
    for name, advantages in (
        ("rows", per_row),
        ("column", per_row.unsqueeze(-1)),
        ("all", per_row.unsqueeze(-1).expand(4, 6)),
    ):
        a = with_gradients(learnt)
        result = fused(a, tokens, mask, {**given, "advantages": advantages}, importance_weights=advantages.abs())
        found[name] = (result.loss, gradients(result, a))
    torch.testing.assert_close(found["rows"], found["all"])
    torch.testing.assert_close(found["column"], found["all"])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_old_log_probabilities_the_policy_s_own_are_taken(level, dtype):
    learnt, tokens, mask, given = batch(dtype=dtype)
    a, b = with_gradients(learnt), with_gradients(learnt)
    ours = fused(a, tokens, mask, {**given, "old_logprobs": None}, level=level, **COEFS)
    own, _ = logprobs(b["hidden"], b["weight"], tokens, b["bias"])
    theirs = unfused(b, tokens, mask, {**given, "old_logprobs": own.detach()}, level=level, **COEFS)
    assert_same(ours, a, theirs, b, atol=1e-5, rtol=1e-5)
    assert ours.stats["ratio_max"].item() == pytest.approx(1.0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_at_masked_positions_is_seen(level, dtype):
    learnt, tokens, mask, given = batch(dtype=dtype)
    clean = with_gradients(learnt)
    dirty = dict(learnt)
    dirty["hidden"] = learnt["hidden"].masked_fill(~mask.unsqueeze(-1), NAN)
    dirty["values"] = learnt["values"].masked_fill(~mask, NAN)
    dirty = with_gradients(dirty)
    with_nan = {name: t.masked_fill(~mask, NAN) for name, t in given.items()}
    a = fused(clean, tokens, mask, given, level=level, **HOW, **COEFS)
    b = fused(dirty, tokens.masked_fill(~mask, -100), mask, with_nan, level=level, **HOW, **COEFS)
    assert_same(b, dirty, a, clean)


@pytest.mark.parametrize("level", LEVELS)
def test_no_valid_token_is_a_loss_of_zero_with_zero_gradients(level):
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    a = with_gradients(learnt)
    result = fused(a, tokens, torch.zeros_like(mask), given, level=level, **COEFS)
    assert result.loss.item() == 0
    assert not any(g.any() for g in gradients(result, a).values())
    assert not any(s.any() for s in result.stats.values())
    nobody = {n: t[:0] if n in ("hidden", "values") else t for n, t in learnt.items()}
    assert fused(nobody, tokens[:0], mask[:0], {n: t[:0] for n, t in given.items()}, level=level).loss.item() == 0


def test_extreme_ratios_stay_finite():
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    for shift in (-300.0, 300.0):
        a = with_gradients(learnt)
        result = fused(a, tokens, mask, {**given, "old_logprobs": given["old_logprobs"] + shift}, dual_clip=3.0)
        assert result.loss.isfinite()
        assert all(g.isfinite().all() for g in gradients(result, a).values())


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
def test_micro_batches_add_up_to_the_batch(level, aggregation):
    learnt, tokens, mask, given = batch(8, 5, dtype=torch.float32)
    counts = {"token-mean": mask.sum(), "seq-mean-token-sum": mask.any(-1).sum(), "token-sum-norm": torch.tensor(40)}
    items = counts.get(aggregation, counts["seq-mean-token-sum"])
    options = {**HOW, **COEFS, "level": level, "aggregation": aggregation}
    a = with_gradients(learnt)
    whole = fused(a, tokens, mask, given, **options)
    b = with_gradients(learnt)
    total = torch.zeros(())
    for i in range(8):
        rows = slice(i, i + 1)
        part = {n: t[rows] if n in ("hidden", "values") else t for n, t in b.items()}
        result = fused(
            part, tokens[rows], mask[rows], {n: t[rows] for n, t in given.items()}, num_items=items, **options
        )
        result.loss.backward()
        total += result.loss.detach()
    torch.testing.assert_close(total, whole.loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close({n: t.grad for n, t in b.items()}, gradients(whole, a), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("aggregation", AGGREGATIONS[:3])
@pytest.mark.parametrize("level", LEVELS)
def test_packed_is_padded_and_order_does_not_matter(level, aggregation):
    learnt, tokens, mask, given = batch(4, 6, dtype=torch.float32)
    lengths = torch.tensor([6, 2, 4, 5])
    mask = torch.arange(6) < lengths.unsqueeze(-1)
    options = {**HOW, **COEFS, "level": level, "aggregation": aggregation}
    a, b, c = with_gradients(learnt), with_gradients(learnt), with_gradients(learnt)
    padded = fused(a, tokens, mask, given, **options)
    pack = lambda t: t[mask]  # noqa: E731
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
    packed = fused(
        {**b, "hidden": pack(b["hidden"]), "values": pack(b["values"])}, pack(tokens), pack(mask),
        {n: pack(t) for n, t in given.items()}, cu_seqlens=bounds, **options,
    )  # fmt: skip
    assert_same(packed, b, padded, a, atol=1e-5, rtol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = fused(
        {**c, "hidden": c["hidden"][order], "values": c["values"][order]}, tokens[order], mask[order],
        {n: t[order] for n, t in given.items()}, **options,
    )  # fmt: skip
    assert_same(shuffled, c, fused(a, tokens, mask, given, **options), a, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_derivatives_in_fp64(level):
    learnt, tokens, mask, given = batch(2, 3, 3, 5)
    arguments = tuple(with_gradients(learnt).values())

    def loss(*arguments):
        return fused(dict(zip(learnt, arguments)), tokens, mask, given, level=level, **HOW, **COEFS).loss

    torch.autograd.gradcheck(loss, arguments)
    torch.autograd.gradgradcheck(loss, arguments)


@pytest.mark.parametrize("level", LEVELS)
def test_second_derivatives_and_second_backward_passes_in_fp32(level):
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    found = {}
    for name, function in (("fused", fused), ("unfused", unfused)):
        a = with_gradients(learnt)
        result = function(a, tokens, mask, given, level=level, **HOW, **COEFS)
        (grad,) = torch.autograd.grad(2 * result.loss, a["hidden"], create_graph=True)
        again = torch.autograd.grad(grad.square().sum(), (a["hidden"], a["weight"]), retain_graph=True)
        once, twice = (torch.autograd.grad(result.loss * k, a["weight"], retain_graph=True)[0] for k in (1, 2))
        torch.testing.assert_close(2 * once, twice)
        found[name] = (grad, *again, torch.autograd.grad(result.loss, a["weight"])[0])
    torch.testing.assert_close(found["fused"], found["unfused"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_a_normaliser_may_have_any_sign(masked):
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    a, b, mask = with_gradients(learnt), with_gradients(learnt), mask if masked else torch.ones_like(mask)
    ours, theirs = (
        f(x, tokens, mask, given, num_items=torch.tensor(-4.0), **COEFS) for f, x in ((fused, a), (unfused, b))
    )
    assert_same(ours, a, theirs, b, atol=1e-5, rtol=2e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_checkpointing_agrees(level):
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    a, b = with_gradients(learnt), with_gradients(learnt)

    def loss(*learnt):
        return fused(dict(zip(a, learnt)), tokens, mask, given, level=level, **HOW, **COEFS).loss

    expected = torch.autograd.grad(loss(*b.values()), tuple(b.values()))
    for kept in (True, False):
        found = checkpoint(loss, *a.values(), use_reentrant=False)
        assert torch.equal(found, loss(*b.values()))
        torch.testing.assert_close(torch.autograd.grad(found, tuple(a.values()), retain_graph=kept), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_frozen_operands_get_no_gradient_and_no_product(small_chunks, level):
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    for names in (["hidden"], ["weight"], ["bias"], ["values"], ["hidden", "bias"]):
        a = {n: t.requires_grad_() if n in names else t for n, t in ((n, t.clone()) for n, t in learnt.items())}
        b = {n: t.requires_grad_() if n in names else t for n, t in ((n, t.clone()) for n, t in learnt.items())}
        ours, theirs = (f(x, tokens, mask, given, level=level, **HOW, **COEFS) for f, x in ((fused, a), (unfused, b)))
        found, expected = (torch.autograd.grad(r.loss, [x[n] for n in names]) for r, x in ((ours, a), (theirs, b)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not fused(with_gradients(learnt), tokens, mask, given, level=level, **COEFS).loss.requires_grad


def test_a_weight_that_is_an_expression_hands_its_gradient_on():
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    down, up = torch.randn(2, 16, requires_grad=True), torch.randn(97, 2, requires_grad=True)
    found = []
    for function in (fused, unfused):
        result = function({**learnt, "weight": learnt["weight"] + 0.5 * up @ down}, tokens, mask, given, **HOW, **COEFS)
        found.append(torch.autograd.grad(result.loss, (down, up)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_entropy_is_computed_only_where_it_is_used(monkeypatch):
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    asked = []
    sweep = _linear_rows.sweep
    monkeypatch.setattr(_linear_rows, "sweep", lambda *a, **k: (asked.append(a[4].with_entropy), sweep(*a, **k))[1])
    for options, expected in (({}, False), ({"entropy_coef": 0.1}, True), ({"with_entropy": True}, True)):
        asked.clear()
        result = fused(with_gradients(learnt), tokens, mask, given, **options)
        assert asked == [expected]
        assert ("entropy" in result.stats) == expected


def test_compiles_without_a_break():
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    for level in LEVELS:

        def loss(arguments, level=level):
            return fused(arguments, tokens, mask, given, level=level, **HOW, **COEFS)

        a, b = with_gradients(learnt), with_gradients(learnt)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert_same(compiled(a), a, loss(b), b, atol=1e-5, rtol=1e-5)


def test_autocast_computes_the_head_in_bf16():
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    a, b = with_gradients(learnt), with_gradients(learnt)
    with torch.autocast("cpu", torch.bfloat16):
        ours = fused(a, tokens, mask, given)
    narrow = {n: t.bfloat16() if n != "values" else t for n, t in b.items()}
    theirs = fused(narrow, tokens, mask, given)
    torch.testing.assert_close(ours.loss, theirs.loss)
    found, expected = gradients(ours, a), gradients(theirs, b)
    assert all(g.dtype == torch.float32 for g in found.values())
    torch.testing.assert_close(found, expected)


def test_fp16_gradients_survive_a_small_share_of_a_large_batch():
    learnt, tokens, mask, given = batch(dtype=torch.float16)
    a, b = with_gradients(learnt), with_gradients({n: t.double() for n, t in learnt.items()})
    options = {"num_items": 1e7, **HOW}
    scaled = fused(a, tokens, mask, given, **options)._replace(
        loss=fused(a, tokens, mask, given, **options).loss * 2.0**24
    )
    exact = unfused(b, tokens, mask, {n: t.double() for n, t in given.items()}, **options)
    found = gradients(scaled, a)["weight"].double() / 2.0**24
    expected = gradients(exact, b)["weight"]
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator makes or writes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("level", LEVELS)
def test_logits_are_never_whole(small_chunks, level):
    learnt, tokens, mask, given = batch(8, 40, 16, 97, torch.float32)
    a = with_gradients(learnt)
    with Largest() as seen:
        gradients(fused(a, tokens, torch.ones_like(mask), given, level=level, **COEFS), a)
    assert 97 * 16 <= seen.elements < 320 * 97 / 3
    with Largest() as seen:
        gradients(unfused(a, tokens, torch.ones_like(mask), given, level=level, **COEFS), a)
    assert seen.elements >= 320 * 97  # the instrument sees them where they are


@pytest.mark.skipif(Cpu().reset_peak() is None, reason="this system does not tell a process its peak memory")
def test_peak_memory_is_a_fraction_of_the_unfused_form_s(monkeypatch):
    torch.utils.deterministic.fill_uninitialized_memory = False  # touches buffers of which less is used
    monkeypatch.setattr(_linear_rows, "BUFFER_BYTES", {"cpu": 2 << 20, "cuda": 2 << 20})
    learnt, tokens, mask, given = batch(4, 256, 32, 8192, torch.float32)  # 32 MiB of logits
    a = with_gradients(learnt)
    peak = [
        Cpu().peak_extra(lambda f=f: gradients(f(a, tokens, torch.ones_like(mask), given), a)) for f in (fused, unfused)
    ]
    assert peak[1] > 64 << 20
    assert peak[0] < 0.25 * peak[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"aggregation": "mean"}, ValueError, "aggregation must be one of 'token-mean', .*got 'mean'"),
        ({"variant": "trpo"}, ValueError, "variant must be one of .*got 'trpo'"),
        ({"kl_estimator": "k4"}, ValueError, "kl_estimator must be one of 'k1', 'k2', 'k3', got 'k4'"),
        ({"level": "word"}, ValueError, "level must be one of .*got 'word'"),
        ({"clip_low": -0.1}, ValueError, "clip_low must be"),
        ({"kl_coef": 0.1}, ValueError, "kl_coef is 0.1, but no ref_logprobs were given"),
        ({"old_logprobs": torch.zeros(2, 4)}, ValueError, r"old_logprobs must have shape \(2, 3\).*got \(2, 4\)"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, r"mask must have shape \(2, 3\)"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be a bool tensor"),
        ({"tokens": torch.zeros(2, 3)}, TypeError, "tokens must hold token indices"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"softcap": -1.0}, ValueError, "softcap must be"),
        ({"weight": torch.zeros(5, 7)}, ValueError, r"weight must have shape \(V, 8\)"),
        ({"weight": torch.zeros(5, 8).double()}, ValueError, "hidden and weight must have one dtype"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"values": torch.zeros(2, 3)}, ValueError, "values was given without returns"),
        ({"hidden": torch.zeros(2, 3, 8, dtype=torch.long)}, TypeError, "hidden must be a floating-point tensor"),
        (
            {"hidden": torch.zeros(1, 2, 3, 8)},
            ValueError,
            r"hidden must have shape \(B, T, C\) or \(T, C\), got \(1, 2, 3, 8\)",
        ),
        ({"weight": None}, TypeError, r"weight must be a tensor \(V, C\) or a linear layer, got NoneType"),
    ],
)
def test_bad_arguments_are_named_before_any_product(monkeypatch, change, error, message):
    monkeypatch.setattr(_linear_rows, "_sweep", lambda *a: pytest.fail("work was done"))
    good = {
        "hidden": torch.zeros(2, 3, 8), "weight": torch.zeros(5, 8, requires_grad=True),
        "tokens": torch.zeros(2, 3, dtype=torch.long), "old_logprobs": torch.zeros(2, 3), "advantages": torch.zeros(2),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        linear_ppo_loss(**{**good, **change})


@pytest.mark.parametrize("level", LEVELS)
def test_a_valid_token_outside_the_vocabulary_is_an_index_error(level):
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    tokens[0, 0] = 97
    with pytest.raises(IndexError, match=r"tokens must lie in \[0, 97\) where mask is True, got 97"):
        fused(with_gradients(learnt), tokens, mask, given, level=level)


def test_forced_backends_agree_with_each_other():
    learnt, tokens, mask, given = batch(dtype=torch.float32)
    found = []
    for backend in ("torch", "cpp"):
        a = with_gradients(learnt)
        with fastllm.use_backend(backend):
            result = fused(a, tokens, mask, given, **HOW, **COEFS)
        found.append((result.loss, gradients(result, a)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
def test_a_rollout_may_have_been_made_in_inference_mode(level):
    hidden, weight = torch.randn(2, 8, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    tokens, old, advantages = torch.randint(50, (2, 8)), -torch.rand(2, 8), torch.randn(2)
    mask = torch.ones(2, 8, dtype=torch.bool)
    with torch.inference_mode():
        made = [t.clone() for t in (tokens, old, advantages, mask)]
    for given in ((tokens, old, advantages, mask), made):
        linear_ppo_loss(hidden, weight, *given, level=level).loss.backward()
        hidden.grad, twice = None, hidden.grad
    alone = torch.autograd.grad(
        linear_ppo_loss(hidden, weight, tokens, old, advantages, mask, level=level).loss, hidden
    )
    torch.testing.assert_close((twice,), alone)
