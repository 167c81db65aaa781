import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.ops._ppo_loss import AGGREGATIONS, KL_ESTIMATORS, LEVELS, STATS, VARIANTS
from fastllm.rl import PPOLoss, ppo_loss
from tests.ops.harness import BACKENDS, DEVICE, assert_close_as_eager, each_backend, each_dtype

COEFS = {"value_coef": 0.7, "entropy_coef": 0.1, "kl_coef": 0.3}
LEARNT = ("logprobs", "values", "entropy")


def batch(rows=4, length=7, dtype=torch.float64, masked=0.3):
    """Every tensor of a call by its name; a mask with gaps, NaN wherever it hides something, one row without a valid token."""
    made = {"logprobs": -torch.rand(rows, length, dtype=torch.float64) * 3}
    made |= {name: torch.randn(rows, length, dtype=torch.float64) for name in ("advantages", "values", "returns")}
    made["entropy"] = torch.rand(rows, length, dtype=torch.float64)
    for name, near in (("old_logprobs", "logprobs"), ("ref_logprobs", "logprobs"), ("old_values", "values")):
        made[name] = made[near] + 0.4 * torch.randn(rows, length, dtype=torch.float64)
    made["importance_weights"] = 2 * torch.rand(rows, length, dtype=torch.float64)
    mask = torch.rand(rows, length) >= masked
    if rows > 2 and masked:
        mask[1] = False
    return {name: t.to(dtype).masked_fill(~mask, torch.nan) for name, t in made.items()} | {"mask": mask}


def given_without_nan(rows=5, length=12, dtype=torch.float32):
    given = {n: t if n == "mask" else t.nan_to_num() for n, t in batch(rows, length, dtype).items()}
    for name in LEARNT:
        given[name].requires_grad_()
    return given


def grads_of(loss, given):
    return dict(zip(LEARNT, torch.autograd.grad(loss, [given[name] for name in LEARNT if name in given])))


def run(given, backend="cpp", device="cpu", function=ppo_loss, **how):
    """The call with its gradients, by name; what is given stays as it is."""
    given = {name: t.detach().to(device) for name, t in given.items()}
    for name in LEARNT:
        if name in given:
            given[name].requires_grad_()
    with fastllm.use_backend(backend):
        found = function(**given, **how)
        return found, grads_of(found.loss, given)


def plain(
    logprobs, old_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.2, dual_clip=None, values=None,
    old_values=None, returns=None, value_clip=0.2, value_coef=0.1, entropy=None, entropy_coef=0.0, ref_logprobs=None,
    kl_coef=0.0, kl_estimator="k3", importance_weights=None, level="token", aggregation="token-mean", num_items=None,
    variant="ppo",
):  # fmt: skip
    """The papers' formulas, one sequence after the other, over its valid tokens alone."""
    terms = {"policy_loss": [], "value_loss": [], "entropy": [], "kl": []}
    stats = {name: [] for name in STATS if name not in terms}
    for b in range(mask.shape[0]):
        kept = mask[b]
        if not kept.any():
            continue
        lp, old, a = (x[b][kept] for x in (logprobs, old_logprobs, advantages))
        tokens_r = r = (lp - old).clamp(-20, 20).exp()
        if level == "sequence":
            r = (lp - old).mean().clamp(-20, 20).exp().expand_as(lp)
        cut = r.clamp(1 - clip_low, 1 + clip_high)
        if variant == "ppo":
            loss, clipped = torch.maximum(-a * r, -a * cut), -a * cut > -a * r
            if dual_clip is not None:
                loss = torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)
        elif variant == "cispo":
            loss, clipped = -cut.detach() * a * lp, cut != r
        else:
            loss, clipped = -a * lp, torch.zeros_like(a)
        terms["policy_loss"].append(loss if importance_weights is None else loss * importance_weights[b][kept])
        stats["approx_kl"].append(old - lp)
        stats["approx_kl_k3"].append(tokens_r - 1 - (lp - old).clamp(-20, 20))
        stats["clip_fraction"].append(clipped.to(r))
        stats["ratio_mean"].append(r)
        stats["advantage_mean"].append(a)
        if values is not None:
            v, target = values[b][kept], returns[b][kept]
            squares = (v - target) ** 2
            if old_values is not None and value_clip is not None:
                near = torch.minimum(
                    torch.maximum(v, old_values[b][kept] - value_clip), old_values[b][kept] + value_clip
                )
                stats["value_clip_fraction"].append(((near - target) ** 2 > squares).to(v))
                squares = torch.maximum(squares, (near - target) ** 2)
            else:
                stats["value_clip_fraction"].append(torch.zeros_like(v))
            terms["value_loss"].append(squares / 2)
            stats["returns_mean"].append(target)
            stats["value_mean"].append(v)
        if entropy is not None:
            terms["entropy"].append(entropy[b][kept])
        if ref_logprobs is not None:
            d = lp - ref_logprobs[b][kept]
            terms["kl"].append({"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[kl_estimator])

    def aggregate(sequences):
        if not sequences:
            return logprobs.new_zeros(())
        sums = [x.mean() if aggregation == "seq-mean-token-mean" else x.sum() for x in sequences]
        counts = {"seq": len(sequences), "token-mean": mask.sum(), "token-sum-norm": mask.numel()}
        return sum(sums) / (counts["seq" if "seq" in aggregation else aggregation] if num_items is None else num_items)

    found = {name: aggregate(x) for name, x in terms.items()}
    joined = {name: torch.cat(x) if x else logprobs.new_zeros(1) for name, x in stats.items()}
    found |= {name: x.mean() for name, x in joined.items()}
    found["ratio_max"] = joined["ratio_mean"].max()
    if values is not None:
        apart = joined["returns_mean"].var(correction=0)
        left = (joined["returns_mean"] - joined["value_mean"]).var(correction=0)
        found["explained_variance"] = 1 - left / apart
    loss = found["policy_loss"] + value_coef * found["value_loss"] - entropy_coef * found["entropy"]
    return PPOLoss(loss + kl_coef * found["kl"], found)


def check(given, dtype, backend, device, **how):
    """Loss, statistics and gradients by the project's tolerance rule, against the formulas above in fp64."""
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in given.items()}
    # A gradient of the oracle's indexing, not of a token: what the mask hides is set to 0 for it.
    wide = {n: t.double().masked_fill(~given["mask"], 0.0) if t.is_floating_point() else t for n, t in given.items()}
    exact, eager, ours = (
        run(wide, "torch", function=plain, **how), run(given, "torch", **how), run(given, backend, device, **how),
    )  # fmt: skip
    assert ours[0].stats.keys() == eager[0].stats.keys()
    # The error of a sum over a sequence, in which tokens may cancel, is held against how many they are.
    longest = given["mask"].sum(-1).max() if how.get("aggregation") == "seq-mean-token-sum" else 1
    for name in ("loss", *ours[0].stats):
        of_three = [run.loss.detach() if name == "loss" else run.stats[name] for run, _ in (ours, eager, exact)]
        assert of_three[0].shape == ()
        assert not of_three[0].requires_grad
        terms = longest if name in ("loss", "policy_loss", "value_loss", "entropy", "kl") else 1
        assert_close_as_eager(*(value / terms for value in of_three), torch.float32, name)
    for name, grad in ours[1].items():
        assert grad.dtype == dtype
        assert_close_as_eager(grad, eager[1][name], exact[1][name], dtype, f"gradient of {name}")


CASES = {
    "default": {},
    "asymmetric": {"clip_low": 0.1, "clip_high": 0.4},
    "dual": {"dual_clip": 1.4, "kl_estimator": "k1"},
    "cispo": {"variant": "cispo", "kl_estimator": "k2"},
    "reinforce": {"variant": "reinforce"},
    "unclipped values": {"value_clip": None},
    "dapo items": {"num_items": 17},
    "grpo": {"aggregation": "seq-mean-token-mean"},
    "sums": {"aggregation": "seq-mean-token-sum", "num_items": 3.5},
    "dr_grpo": {"aggregation": "token-sum-norm"},
    "gspo": {"level": "sequence", "aggregation": "seq-mean-token-mean"},
    "gspo dual": {"level": "sequence", "dual_clip": 1.1, "clip_low": 0.01, "clip_high": 0.01},
    "gspo cispo": {"level": "sequence", "variant": "cispo", "clip_high": 0.02},
}
each_case = pytest.mark.parametrize("how", CASES.values(), ids=CASES)
# Where a claim takes many calls: in the interpreter, only what takes other ways through the kernels.
few_in_triton = pytest.mark.parametrize(
    ("backend", "device", "how"),
    [
        pytest.param(backend, device, how, id=f"{name}-{backend}")
        for backend, device in BACKENDS
        for name, how in CASES.items()
        if backend != "triton" or name in ("default", "sums", "grpo", "gspo", "gspo cispo")
    ],
)


@each_backend
@each_case
@pytest.mark.parametrize("shape", [(1, 1), (5, 11)], ids=str)
def test_matches_the_formulas_in_fp64(backend, device, how, shape):
    given = batch(*shape, masked=0.3 if shape[0] > 1 else 0.0)
    check(given, torch.float32, backend, device, **COEFS, **how)


@each_backend
@each_dtype
def test_blocks_segments_and_dtypes(backend, device, dtype):
    how = {"aggregation": "seq-mean-token-mean", "level": "sequence", "dual_clip": 2.0}
    check(batch(3, 1500), dtype, backend, device, **COEFS, **how)
    check(batch(2, 5000), dtype, backend, device, **COEFS)


@each_backend
def test_only_what_is_given_counts(backend, device):
    for absent in (("entropy",), ("ref_logprobs",), ("old_values",), ("values", "returns", "old_values"), LEARNT[1:]):
        given = {n: t for n, t in batch(3, 20).items() if n not in (*absent, "importance_weights")}
        if "values" not in given:
            given = {n: t for n, t in given.items() if "values" not in n and n != "returns"}
        coefs = {
            "entropy_coef": COEFS["entropy_coef"] * ("entropy" in given), "kl_coef": 0.3 * ("ref_logprobs" in given),
        }  # fmt: skip
        check(given, torch.float32, backend, device, **coefs)
        stats = ppo_loss(**given, **coefs).stats
        assert ("kl" in stats) == ("ref_logprobs" in given)
        assert ("explained_variance" in stats) == ("values" in given)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6), length=st.integers(1, 90), level=st.sampled_from(LEVELS), variant=st.sampled_from(VARIANTS),
    aggregation=st.sampled_from(AGGREGATIONS), estimator=st.sampled_from(KL_ESTIMATORS), dual=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_shape(rows, length, level, variant, aggregation, estimator, dual, dtype):
    given = batch(rows, length)
    given["mask"][0, 0] = True
    for name, t in given.items():
        if name != "mask":
            t[0, 0] = t[0, 0].nan_to_num()
    if given["mask"].sum() == 1:  # whose returns do not vary
        given = {n: t for n, t in given.items() if n not in ("values", "old_values", "returns")}
    check(
        given, dtype, "cpp", "cpu", level=level, variant=variant, aggregation=aggregation, kl_estimator=estimator,
        dual_clip=1.5 if dual and variant == "ppo" else None, **COEFS,
    )  # fmt: skip


def assert_same(a, b, **tolerance):
    for name in a[0].stats:
        torch.testing.assert_close(a[0].stats[name], b[0].stats[name], msg=lambda m: f"{name}: {m}", **tolerance)  # noqa: B023
    torch.testing.assert_close(a[0].loss, b[0].loss, **tolerance)
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], msg=lambda m: f"gradient of {name}: {m}", **tolerance)  # noqa: B023


@few_in_triton
def test_micro_batches_and_ranks_add_up_to_the_batch(backend, device, how):
    given = batch(8, 12, torch.float32)
    sequences = how.get("aggregation", "").startswith("seq")
    items = int(given["mask"].any(1).sum() if sequences else given["mask"].sum())
    how = {**COEFS, **how, "num_items": torch.tensor(items, device=device)}
    whole, grads = run(given, backend, device, **how)
    for rows in (1, 4) if backend != "triton" else (3,):
        parts = [run({n: t[b : b + rows] for n, t in given.items()}, backend, device, **how) for b in range(0, 8, rows)]
        torch.testing.assert_close(sum(found.loss for found, _ in parts), whole.loss)
        for name, grad in grads.items():
            torch.testing.assert_close(torch.cat([part[name] for _, part in parts]), grad)


@few_in_triton
def test_packed_is_padded(backend, device, how):
    longest = 30 if backend == "triton" else 600
    lengths = torch.tensor([3, 0, 9, 1, longest])
    given = batch(5, longest, torch.float32, masked=0.2)
    inside = torch.arange(longest) < lengths.unsqueeze(1)
    given["mask"] &= inside
    packed = {name: t[inside] for name, t in given.items()}
    bounds = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int().to(device)
    how = {**COEFS, **how}
    if how.get("aggregation") == "token-sum-norm":
        how["num_items"] = 50
    padded = run(given, backend, device, **how)
    flat = run(packed, backend, device, cu_seqlens=bounds, **how)
    for name, grad in padded[1].items():
        padded[1][name] = grad[inside.to(device)]
    assert_same(flat, padded)
    if "seq" not in how.get("aggregation", "") and "level" not in how:  # nothing depends on where sequences begin
        assert_same(run(packed, backend, device, **how), padded)


@few_in_triton
def test_the_order_of_rows_and_rows_without_tokens_do_not_matter(backend, device, how):
    given = batch(6, 9, torch.float32)
    how = {**COEFS, **how, "num_items": 7} if how.get("aggregation") == "token-sum-norm" else {**COEFS, **how}
    order = torch.randperm(6)
    found = run(given, backend, device, **how)
    more = {
        n: torch.cat([t[order], (t[:1] * 0).bool() if n == "mask" else t[:1] * torch.nan]) for n, t in given.items()
    }
    other = run(more, backend, device, **how)
    assert_same(found, (other[0], {n: grad[:6][order.argsort()] for n, grad in other[1].items()}))


@few_in_triton
def test_no_valid_token_gives_zero_and_zero_gradients(backend, device, how):
    for shape in [(2, 3), (0, 3), (2, 0)]:
        given = batch(*shape, torch.float32, masked=1.0)
        for items in (how.get("num_items"), 0, 5):
            found, grads = run(given, backend, device, **COEFS, **{**how, "num_items": items})
            assert found.loss.item() == 0
            assert all(value.item() == 0 for value in found.stats.values())
            assert all(torch.equal(grad, torch.zeros(shape, device=device)) for grad in grads.values())


@few_in_triton
def test_masked_tokens_have_gradient_zero_under_any_scale(backend, device, how):
    given = batch(3, 6, torch.float32)
    _, grads = run(given, backend, device, **COEFS, **how)
    _, endless = run(given, backend, device, **COEFS, **{**how, "num_items": torch.tensor(0.0)})
    for name in LEARNT:
        for grad in (grads[name], endless[name]):
            assert torch.equal(grad.cpu()[~given["mask"]], torch.zeros(int((~given["mask"]).sum())))


@each_backend
def test_masked_tokens_have_gradient_zero_where_a_coefficient_over_the_normaliser_overflows(backend, device):
    given = batch(3, 6, torch.float32)
    _, grads = run(given, backend, device, value_coef=100.0, entropy_coef=100.0, kl_coef=100.0, num_items=1e-38)
    for name, grad in grads.items():
        assert torch.equal(grad.cpu()[~given["mask"]], torch.zeros(int((~given["mask"]).sum()))), name


@each_backend
def test_extreme_ratios_stay_finite(backend, device):
    given = batch(2, 8, torch.float32, masked=0.0)
    given = {n: t for n, t in given.items() if n != "ref_logprobs"}
    apart = torch.tensor([1000.0, -1000.0, 25.0, -25.0, 19.9, -19.9, torch.inf, 1e-9]).repeat(2, 1)
    given["old_logprobs"] = given["logprobs"] - apart
    given["advantages"] = torch.tensor([[1.0], [-1.0]]).repeat(1, 8)
    for how in ({}, {"dual_clip": 3.0}, {"variant": "cispo"}):
        found, grads = run(given, backend, device, **how)
        with fastllm.use_backend("torch"):
            expected, expected_grads = run(given, "torch", **how)
        assert found.loss.isfinite()
        torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(grads["logprobs"].cpu(), expected_grads["logprobs"], rtol=1e-5, atol=1e-6)
        assert found.stats["ratio_max"].item() == pytest.approx(torch.tensor(20.0).exp().item(), rel=1e-5)
    given["old_logprobs"] = given["logprobs"] - 30.0  # the whole sequence beyond the bound
    found, grads = run(given, backend, device, level="sequence")
    assert found.loss.isfinite()
    assert torch.equal(grads["logprobs"], torch.zeros(2, 8, device=device))


@each_backend
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_of_a_valid_token_comes_out_as_the_definition_has_it(backend, device, variant, level):
    for name in (
        "logprobs",
        "old_logprobs",
        "advantages",
        "values",
        "old_values",
        "returns",
        "entropy",
        "ref_logprobs",
    ):
        given = {n: t for n, t in batch(3, 6, torch.float32).items() if n != "importance_weights"}
        given["mask"][2, 3] = True
        for n, t in given.items():
            if n != "mask":
                t[2, 3] = torch.nan if n == name else 0.5
        how = COEFS | {"variant": variant, "level": level}
        found, expected = (run(given, b, d, **how) for b, d in ((backend, device), ("torch", "cpu")))
        assert found[0].loss.isnan().item() == expected[0].loss.isnan().item(), name
        for n, value in found[0].stats.items():
            assert value.isnan().item() == expected[0].stats[n].isnan().item(), (name, n)
        for n, grad in found[1].items():
            assert torch.equal(grad.isnan().cpu(), expected[1][n].isnan()), (name, n)


@each_backend
@pytest.mark.parametrize("endless", [torch.inf, -torch.inf])
def test_an_infinite_old_value_comes_out_as_the_definition_has_it(backend, device, endless):
    given = batch(3, 6, torch.float32, masked=0.0)
    given["old_values"][2, 3] = endless
    check(given, torch.float32, backend, device, **COEFS)


@each_backend
def test_k3_near_the_reference_keeps_its_digits(backend, device):
    """d²/2 of a difference d, of which e^-d - 1 + d would have none left in fp32: its mean and its gradient, d."""
    given = {
        n: t for n, t in batch(2, 40, torch.float32, masked=0.0).items() if n in ("logprobs", "advantages", "mask")
    }
    for size in (1e-4, 1e-2, 0.3, 0.49, 0.51):
        given["logprobs"] = (
            torch.rand(2, 40) * size
        )  # as if near a certain token, where fp32 still tells differences apart
        zero = torch.zeros(2, 40)
        found, grads = run(
            {**given, "advantages": zero, "old_logprobs": zero, "ref_logprobs": zero}, backend, device, kl_coef=1.0
        )
        d = given["logprobs"].double()
        for value, exact in (
            (found.stats["kl"], (torch.expm1(-d) + d).mean()),
            (found.stats["approx_kl_k3"], (torch.expm1(d) - d).mean()),
            (grads["logprobs"], -torch.expm1(-d) / 80),
        ):
            rounding = {"rtol": 2e-3, "atol": 2e-9} if backend == "torch" else {"rtol": 2e-6, "atol": 0.0}
            torch.testing.assert_close(value.cpu().double(), exact, **rounding)


@each_backend
def test_padding_and_gaps_of_any_length_are_stepped_over(backend, device):
    """Every length of what is masked before, between and after tokens, whatever blocks the kernels work in."""
    length = 600 if backend == "triton" else 1100
    given = batch(4, length, torch.float32, masked=0.0)
    begin, end = torch.randint(length // 2, (4, 1)), length - torch.randint(length // 2 - 40, (4, 1))
    at = torch.arange(length)
    given["mask"] = (at >= begin) & (at < end) & ~((at >= begin + 7) & (at < begin + 20))
    given = {n: t if n == "mask" else t.masked_fill(~given["mask"], torch.nan) for n, t in given.items()}
    for how in ({}, {"aggregation": "seq-mean-token-mean", "level": "sequence"}):
        check(given, torch.float32, backend, device, **COEFS, **how)


def test_returns_that_do_not_vary_explain_nothing():
    given = batch(2, 5, torch.float32, masked=0.0) | {"returns": torch.full((2, 5), 3.0)}
    assert run(given)[0].stats["explained_variance"].item() == 0
    assert run(given, "torch")[0].stats["explained_variance"].item() == 0


def test_variance_of_returns_far_from_zero():
    given = batch(4, 3000, torch.float32)
    given["returns"], given["values"] = given["returns"] + 1000, given["values"] + 1000
    exact = run({n: t.double() if n != "mask" else t for n, t in given.items()}, "torch")[0].stats["explained_variance"]
    for backend in ("cpp", "triton"):
        device = DEVICE if backend == "triton" else "cpu"
        assert run(given, backend, device)[0].stats["explained_variance"].item() == pytest.approx(
            exact.item(), rel=1e-4
        )


@each_backend
def test_one_advantage_a_sequence(backend, device):
    given = batch(4, 700, torch.float32)
    for name in ("advantages", "importance_weights"):
        given[name] = torch.randn(4, 1)
    for how in ({}, CASES["gspo"], CASES["cispo"]):
        full = run(
            given | {n: given[n].expand(4, 700) for n in ("advantages", "importance_weights")}, backend, device, **how
        )
        assert_same(run(given, backend, device, **how), full)
        assert_same(run(given | {"advantages": given["advantages"][:, 0]}, backend, device, **how), full)


@each_backend
def test_strides_and_dtypes_of_their_own(backend, device):
    given = batch(4, 30, torch.float32)
    half = {"values": torch.bfloat16, "old_logprobs": torch.float16, "returns": torch.float64}
    given = {n: t.to(half.get(n, t.dtype)) for n, t in given.items()}
    expected = run({n: t.to(torch.float32) if n != "mask" else t for n, t in given.items()}, "torch", **COEFS)
    found = run({n: t.mT.contiguous().mT for n, t in given.items()}, backend, device, **COEFS)
    torch.testing.assert_close(found[0].loss.cpu(), expected[0].loss)
    for name, grad in found[1].items():
        assert grad.dtype == given[name].dtype
        torch.testing.assert_close(grad.cpu().float(), expected[1][name], rtol=1e-2, atol=1e-4)


def test_two_runs_give_the_same_bits_whatever_the_threads():
    given = batch(70, 900, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(given, **COEFS, **CASES["gspo"]))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert_same(other, found[0], rtol=0, atol=0, equal_nan=True)


def leave_behind(byte, size):
    """Fills heap memory that the next allocations of `size` bytes will get with `byte`, as earlier work of any kind does."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    places = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size))) for _ in range(20)]
    for place in places:
        ctypes.memset(place, byte, size)
    for place in places:
        libc.free(place)


def test_a_last_segment_with_most_of_the_work_is_one_thread_s():
    given = {n: torch.randn(4, 4096) for n in ("logprobs", "old_logprobs", "advantages")}
    given["mask"] = torch.tensor([False, False, False, True]).unsqueeze(1).expand(4, 4096).contiguous()
    expected, threads = run(given), torch.get_num_threads()
    try:
        for count in (3, 4, 7):
            torch.set_num_threads(count)
            leave_behind(0xFE, 40)  # as a float64, which is what lies beyond the segments' counts, -5e303
            assert_same(run(given), expected, rtol=0, atol=0)
    finally:
        torch.set_num_threads(threads)


@each_backend
def test_a_coefficient_of_0_leaves_no_gradient_whatever_its_term_is(backend, device):
    given = batch(3, 40, torch.float32, masked=0.0)
    for name in LEARNT[1:]:
        given[name][0, 3] = torch.nan
    given["ref_logprobs"][1, 2] = torch.nan
    found, grads = run(given, backend, device, value_coef=0.0, entropy_coef=0.0, kl_coef=0.0)
    assert found.loss.isfinite()
    assert all(found.stats[name].isnan() for name in ("value_loss", "entropy", "kl"))
    assert grads["logprobs"].isfinite().all()
    for name in LEARNT[1:]:
        assert torch.equal(grads[name].cpu(), torch.zeros(3, 40))
