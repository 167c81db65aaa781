import os
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastllm
from fastllm.ops import attention
from tests.ops.harness import DEVICE, DTYPES, assert_close_as_eager, each_backend, each_dtype

INFINITY = float("inf")


def plain(
    q, k, v, *, causal=True, scale=None, window=None, sinks=0, sink_logits=None, alibi_slopes=None, softcap=None, mask=None,
    cu_seqlens_q=None, cu_seqlens_k=None,
):  # fmt: skip
    """The contract, in the inputs' own dtype: one row of the batch or document, and one head, at a time."""
    if cu_seqlens_q is not None:
        bounds_q, bounds_k = cu_seqlens_q.tolist(), (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()
        parts = []
        for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:]):
            piece = [t.transpose(0, 1).unsqueeze(0) for t in (q[a:b], k[c:d], v[c:d])]
            parts.append(
                plain(
                    *piece,
                    causal=causal,
                    scale=scale,
                    window=window,
                    sinks=sinks,
                    sink_logits=sink_logits,
                    alibi_slopes=alibi_slopes,
                    softcap=softcap,
                )
            )
        return torch.cat([o[0].transpose(0, 1) for o, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)
    heads, queries, keys = q.shape[1], q.shape[2], k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    i, j = torch.arange(queries, device=q.device).unsqueeze(1), torch.arange(keys, device=q.device)
    p = i + keys - queries
    seen = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        seen &= j <= p
    if window is not None:
        seen &= (p - j < window) | (j < sinks)
    seen = seen.expand(q.shape[0], heads, queries, keys)
    if mask is not None:
        seen = seen & mask
    outs, lses = [], []
    for h in range(heads):
        group = h // (heads // k.shape[1])
        scores = scale * (q[:, h] @ k[:, group].transpose(1, 2))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        wide = scores.double() if q.dtype == torch.float64 else scores.float()
        if alibi_slopes is not None:
            wide = wide + alibi_slopes[h] * (j - p)
        wide = wide.masked_fill(~seen[:, h], -INFINITY)
        if sink_logits is not None:
            wide = torch.cat((wide, sink_logits[h].to(wide).expand(*wide.shape[:-1], 1)), -1)
        blind = (wide == -INFINITY).all(-1, keepdim=True)
        weights = torch.softmax(wide.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)[..., :keys]
        outs.append(weights.to(v.dtype) @ v[:, group])
        lses.append(torch.logsumexp(wide.masked_fill(blind, 0.0), -1).masked_fill(blind[..., 0], -INFINITY))
    return torch.stack(outs, 1), torch.stack(lses, 1)


def check(
    q, k, v, dtype, backend, device="cpu", sink_logits=None, alibi_slopes=None, gradients=True, whole=False, **options
):
    """Output, lse and gradients (through both) of one call, by the tolerance rule; plain PyTorch in the dtype is eager.
    whole: products of q and k are exact, in whatever order they are summed."""
    triton_sums = backend == "triton" and not whole
    tensors = [t.to(dtype) for t in (q, k, v)]
    generator = torch.Generator().manual_seed(3)

    def run(function, cast, of_rounded=None, **more):
        leaves = [cast(t).detach().requires_grad_(gradients) for t in tensors]
        sinks = None if sink_logits is None else cast(sink_logits).detach().requires_grad_(gradients)
        slopes = None if alibi_slopes is None else cast(alibi_slopes)
        moved = {n: o.to(leaves[0].device) if isinstance(o, Tensor) else o for n, o in options.items()}
        out, lse = function(*leaves, sink_logits=sinks, alibi_slopes=slopes, **moved, **more)
        if not gradients:
            return [out, lse]
        generator.manual_seed(3)
        to_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(dtype).to(out)
        to_lse = torch.randn(lse.shape, generator=generator, dtype=torch.float64).to(lse) * lse.isfinite()
        if of_rounded is not None:
            lost = ((of_rounded - out.detach()) * to_out).sum(-1)
            lost = lost + torch.finfo(torch.float32).eps * (of_rounded * to_out).abs().sum(
                -1
            )  # of the sum itself, in fp32
            to_lse = to_lse - (lost.transpose(0, 1) if lost.dim() == 2 else lost)
            if triton_sums:  # the interpreter's products of other tiles are other sums of the same numbers
                row = 1 + 2 * torch.finfo(torch.float32).eps * lse.detach().abs().nan_to_num(0, 0, 0)
                to_lse, row = to_lse * row, row.transpose(0, 1) if lost.dim() == 2 else row
                to_out = to_out * row.unsqueeze(-1)
        inputs = [*leaves, *([] if sinks is None else [sinks])]
        found = torch.autograd.grad([out, lse], inputs, [to_out, to_lse], allow_unused=True)
        zeros = [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found)]
        return [out.detach(), lse.detach(), *zeros]

    exact = run(plain, lambda t: t.double())
    eager = run(plain, lambda t: t)
    with fastllm.use_backend(backend):
        ours = run(attention, lambda t: t.to(device), return_lse=True)
    # PyTorch's fused attention, as all of its kind, finds the gradient from the rounded output. What rounding does to a
    # few numbers is luck: the worst of a few draws counts.
    luck = [torch.zeros_like(exact[0]), *(torch.rand_like(exact[0]) - 0.5 for _ in range(3))]
    fused = [
        run(plain, lambda t: t.double(), of_rounded=(exact[0] * (1 + torch.finfo(dtype).eps * u)).to(dtype).double())
        for u in (luck if gradients else luck[:1])
    ]
    names = ["out", "lse", "gradient of q", "gradient of k", "gradient of v", "gradient of sink_logits"]
    for name, a, b, c, *ds in zip(names, ours, eager, exact, *fused):
        assert a.shape == c.shape
        if a.numel():
            # Few numbers may all be near to what they round to, by luck, in eager; and rounding the result is no fault.
            half = c.abs().clamp(max=1e30) * torch.finfo(dtype).eps / 2
            candidates = [b.double(), *(torch.where(c.isfinite(), d + half, b.double()) for d in ds)]
            eager_like = max(candidates, key=lambda e: float((e - c).abs().nan_to_num(0, 0, 0).max()))
            assert_close_as_eager(a, eager_like, c, dtype, name)


def tensors(batch, heads, kv_heads, queries, keys, width, value_width, scale=1.0):
    return (
        torch.randn(batch, heads, queries, width) * scale,
        torch.randn(batch, kv_heads, keys, width) * scale,
        torch.randn(batch, kv_heads, keys, value_width),
    )


def lengths_of(draw, total, documents):
    cuts = sorted(draw(st.integers(0, total)) for _ in range(documents - 1))
    return torch.tensor([0, *cuts, total], dtype=torch.int32)


@st.composite
def calls(draw, longest):
    """A random combination of features and shapes."""
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    queries = draw(st.sampled_from([n for n in (1, 2, 7, 48, 63, 65, 129, 300) if n <= longest]))
    keys = draw(st.sampled_from([queries, queries, *(n for n in (0, 1, 5, 64, 130, 300) if n <= longest)]))
    width = draw(st.sampled_from([8, 16, 20, 64, 72, 128, 256]))
    shape = (
        draw(st.sampled_from([1, 2])),
        kv_heads * group,
        kv_heads,
        queries,
        keys,
        width,
        draw(st.sampled_from([width, 8, 40])),
    )
    options = {
        "causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, None, 0.3])),
        "window": draw(st.sampled_from([None, None, 1, 9, 70])),
        "sinks": draw(st.sampled_from([0, 0, 3, 40])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
    }
    vectors = {n: draw(st.booleans()) for n in ("sink_logits", "alibi_slopes")}
    if draw(st.sampled_from([True, False, False])):
        documents = draw(st.sampled_from([1, 2, 5]))
        options["cu_seqlens_q"] = lengths_of(draw, queries, documents)
        options["cu_seqlens_k"] = lengths_of(draw, keys, documents)
    else:
        options["mask"] = draw(st.sampled_from([None, None, (1, 1, 1, 0), (1, 1, 0, 0), (0, 0, 0, 0), (1, 0, 1, 0)]))
    return shape, options, vectors, draw(st.integers(0, 2**20)), draw(st.booleans())


def run_call(call, dtype, backend, device="cpu"):
    shape, options, vectors, seed, strided = call
    torch.manual_seed(seed)
    options = dict(options)
    q, k, v = tensors(*shape)
    if "cu_seqlens_q" in options:
        q, k, v = (t[0].transpose(0, 1) if strided else t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    elif strided:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if options.get("mask") is not None:
        full = (shape[0], shape[1], shape[3], shape[4])
        options["mask"] = torch.rand([1 if one else n for n, one in zip(full, options["mask"])]) > 0.4
    more = {n: torch.rand(shape[1]) if there else None for n, there in vectors.items()}
    check(q, k, v, dtype, backend, device, **options, **more)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@each_dtype
@settings(max_examples=25, deadline=None)
@given(call=calls(300))
def test_any_combination_on_the_cpu(call, dtype, backend):
    run_call(call, dtype, backend)


@each_dtype
@settings(
    max_examples=5, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # to shrink takes minutes
@given(call=calls(129 if DEVICE == "cpu" else 300))
def test_any_combination_in_triton(call, dtype):
    run_call(call, dtype, "triton", DEVICE)


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(capability):
    code = """
import torch
from tests.ops.test_attention import DTYPES, check, tensors
for dtype in DTYPES:
    q, k, v = tensors(1, 4, 2, 150, 170, 72, 40)
    check(q, k, v, dtype, "cpp", window=60, sinks=5, softcap=3.0, sink_logits=torch.rand(4), alibi_slopes=torch.rand(4))
    check(q, k, v, dtype, "cpp")
    check(q[:, :, :3], k, v, dtype, "cpp", gradients=False)
print(__import__("fastllm").kernels.cpp.capability())
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FASTLLM_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    order = ["baseline", "avx2", "avx512", "avx512_bf16"]
    assert order.index(done.stdout.strip()) <= order.index(capability)


@each_backend
def test_a_tree_mask_and_rows_that_see_nothing(backend, device):
    parents = [-1, 0, 0, 1, 1, 2, 5]
    tree = torch.eye(7, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            tree[node] |= tree[parent]
    q, k, v = tensors(2, 2, 1, 7, 12, 16, 16)
    mask = torch.cat((torch.ones(7, 5, dtype=torch.bool), tree), 1)
    check(q, k, v, torch.float32, backend, device, causal=False, mask=mask)
    mask[3] = False
    check(q, k, v, torch.float32, backend, device, causal=False, mask=mask)
    with fastllm.use_backend(backend):
        out, lse = attention(*(t.to(device) for t in (q, k, v)), causal=False, mask=mask.to(device), return_lse=True)
    assert (out[:, :, 3] == 0).all()
    assert (lse[:, :, 3] == -INFINITY).all()


def test_one_query_and_one_key_take_the_whole_weight():
    # The forward kernel for a few queries adds up q k in another order than the backward pass.
    torch.manual_seed(1)
    q, k, v = (10 * t.requires_grad_() for t in tensors(1, 8, 2, 1, 1, 256, 16))
    with fastllm.use_backend("cpp"):
        (grad,) = torch.autograd.grad(attention(q, k, v).sum(), [v])
    assert (grad == 4).all()


@each_backend
@each_dtype
@pytest.mark.parametrize("case", ["large logits", "all equal", "one huge key", "one huge key of whole numbers", "tiny"])
def test_adversarial_inputs(case, dtype, backend, device):
    q, k, v = tensors(1, 2, 2, 70, 70, 16, 16)
    if case == "large logits":
        q, k = q * 30, k * 30
    elif case == "all equal":
        k = torch.ones_like(k)
    elif "huge" in case:
        if "whole" in case:
            q, k = (3 * q).round(), (3 * k).round()
        k[:, :, 33] *= 100
    else:
        q, v = q * 1e-5, v * 1e-3
    check(q, k, v, dtype, backend, device, whole="whole" in case)


@pytest.mark.parametrize("length", [5, 300])  # few queries, and blocks of them
@pytest.mark.parametrize("scale", [1e5, 1e12])
def test_scores_beyond_what_fp32_resolves_pick_the_largest(length, scale):
    q, k, v = tensors(1, 2, 2, length, length, 16, 16)
    exact = attention(scale * q.double(), scale * k.double(), v.double())
    torch.testing.assert_close(attention(scale * q, scale * k, v), exact.float())


@each_backend
def test_a_window_of_the_largest_integer_is_none(backend, device):
    q, k, v = tensors(1, 2, 2, 70, 70, 16, 16)
    check(q, k, v, torch.float32, backend, device, window=2**63 - 1, sinks=3)


@each_backend
def test_a_mask_is_true_wherever_it_is_not_zero(backend, device):
    q, k, v = (t.to(device) for t in tensors(1, 2, 2, 300, 300, 16, 16))
    mask = torch.rand(1, 1, 300, 300, device=device) < 0.01
    strange = (2 * mask.to(torch.uint8)).view(torch.bool)  # what a C extension may leave in a bool
    with fastllm.use_backend(backend):
        assert torch.equal(attention(q, k, v, mask=strange, causal=False), attention(q, k, v, mask=mask, causal=False))


@each_backend
def test_outputs_may_be_changed_in_place(backend, device):
    q, k, v = (t.to(device).requires_grad_() for t in tensors(1, 2, 2, 6, 6, 8, 8))
    with fastllm.use_backend(backend):
        out = attention(q, k, v)
        expected = 2 * out.detach()
        assert torch.equal(out.mul_(2), expected)
        if backend != "torch":  # whose backward pass does not need the output
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()


def test_vmap_over_documents_and_lengths():
    q, k, v = tensors(3, 2, 2, 6, 6, 8, 8)
    bounds = torch.tensor([[0, 2, 6], [0, 6, 6], [0, 1, 6]], dtype=torch.int32)
    packed = [t.transpose(1, 2) for t in (q, k, v)]
    found = torch.vmap(lambda q, k, v, b: attention(q, k, v, cu_seqlens_q=b))(*packed, bounds)
    for n in range(3):
        torch.testing.assert_close(found[n], attention(*(t[n] for t in packed), cu_seqlens_q=bounds[n]))


@each_backend
def test_nan_in_a_key_reaches_only_the_blocks_that_see_it(backend, device):
    q, k, v = tensors(1, 1, 1, 300, 300, 16, 16)
    k[0, 0, 290] = float("nan")
    with fastllm.use_backend(backend):
        out = attention(*(t.to(device) for t in (q, k, v)))
    assert out[0, 0, 290:].isnan().all()
    assert not out[0, 0, :290].isnan().any()


@each_backend
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_that_is_not_positive(scale, backend, device):
    check(*tensors(1, 2, 1, 40, 50, 16, 16), torch.float32, backend, device, scale=scale, window=9)


@each_backend
def test_a_sink_of_no_weight_and_no_key_in_sight(backend, device):
    q, k, v = tensors(1, 2, 2, 4, 2, 8, 8)  # causal: the first two queries stand before the first key
    sinks = torch.tensor([-INFINITY, 0.5])
    with fastllm.use_backend(backend):
        leaves = [t.to(device).requires_grad_() for t in (q, k, v, sinks)]
        found = torch.autograd.grad(attention(*leaves[:3], sink_logits=leaves[3]).sum(), leaves)
    assert all(g.isfinite().all() for g in found)
    assert found[3][0] == 0


def test_shapes_alone():
    q, k, v = (t.to("meta") for t in tensors(2, 4, 2, 5, 7, 16, 8))
    assert attention(q, k, v).shape == (2, 4, 5, 8)
    assert attention(*(t[:, :n] for t, n in zip(tensors(1, 2, 2, 3, 3, 8, 8), (0, 2, 2)))).shape == (1, 0, 3, 8)


@each_backend
@pytest.mark.parametrize("shape", [(0, 2, 2, 3, 3), (1, 2, 2, 0, 3), (2, 2, 1, 3, 0), (1, 2, 2, 0, 0)])
def test_zero_sizes(shape, backend, device):
    check(*tensors(*shape, 16, 8), torch.float32, backend, device)
    if shape[0]:
        q, k, v = (t[0].transpose(0, 1) for t in tensors(1, *shape[1:], 16, 8))
        bounds = [torch.tensor([0, 0, t.shape[0]], dtype=torch.int32) for t in (q, k)]
        check(q, k, v, torch.float32, backend, device, cu_seqlens_q=bounds[0], cu_seqlens_k=bounds[1])


def test_repeats_to_the_last_bit_and_leaves_the_random_state():
    q, k, v = (t.bfloat16().requires_grad_() for t in tensors(2, 4, 2, 200, 200, 64, 64))
    state = torch.get_rng_state()
    runs = []
    for _ in range(2):
        out = attention(q, k, v, window=50, sinks=4)
        runs.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert torch.equal(torch.get_rng_state(), state)


def test_compiles_whole_with_changing_lengths():
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, window=9, sinks=2), fullgraph=True, dynamic=True)
    for length in (33, 70):
        q, k, v = (t.requires_grad_() for t in tensors(1, 4, 2, length, length, 16, 16))
        found, expected = compiled(q, k, v), attention(q, k, v, window=9, sinks=2)
        torch.testing.assert_close(found, expected)
        for a, b in zip(*(torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (found, expected))):
            torch.testing.assert_close(a, b)


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in tensors(1, 4, 2, 9, 11, 16, 8))
    rest = (
        torch.rand(4),
        torch.rand(4),
        torch.rand(1, 1, 9, 11).gt(0.3).expand(1, 4, 9, 11),
        None,
        None,
        0.3,
        True,
        5,
        2,
        3.0,
    )
    torch.library.opcheck(torch.ops.fastllm.attention.default, (q, k, v, *rest))
    out, lse, lost = torch.ops.fastllm.attention(q, k, v, *rest)
    inputs = [t.detach() for t in (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse, lost)]
    torch.library.opcheck(torch.ops.fastllm.attention_backward.default, (*inputs, *rest))
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    packed = (torch.randn(9, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 8))
    torch.library.opcheck(
        torch.ops.fastllm.attention.default, (*packed, None, None, None, bounds, bounds, 0.3, True, 0, 0, 0.0)
    )


def test_first_and_second_derivatives():
    q, k, v = (t.double().requires_grad_() for t in tensors(1, 2, 1, 4, 5, 8, 8))
    sinks = torch.rand(2, dtype=torch.double, requires_grad=True)

    def function(q, k, v, sinks):
        return attention(q, k, v, sink_logits=sinks, window=3, softcap=2.0, return_lse=True)

    torch.autograd.gradcheck(function, (q, k, v, sinks))
    torch.autograd.gradgradcheck(function, (q, k, v, sinks))
    narrow = [t.detach().float().requires_grad_() for t in (q, k, v, sinks)]
    (grad,) = torch.autograd.grad(function(*narrow)[0].sum(), narrow[0], create_graph=True)
    second = torch.autograd.grad(grad.square().sum(), narrow[1])[0]
    (grad,) = torch.autograd.grad(function(q, k, v, sinks)[0].sum(), q, create_graph=True)
    torch.testing.assert_close(second.double(), torch.autograd.grad(grad.square().sum(), k)[0], rtol=1e-3, atol=1e-5)


def test_autocast_checkpointing_and_double_use():
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 2, 20, 20, 16, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v).dtype == torch.bfloat16
    expected = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v))
    again = torch.utils.checkpoint.checkpoint(attention, q, k, v, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(again.square().sum(), (q, k, v)), expected):
        assert torch.equal(a, b)
    x = torch.randn(1, 2, 9, 16, dtype=torch.double, requires_grad=True)
    one = x.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(attention(one, one, one).square().sum(), one)
    (exact,) = torch.autograd.grad(plain(x, x, x)[0].square().sum(), x)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


def test_a_window_costs_as_many_tokens_as_there_are():
    def seconds(length):
        q, k, v = (t.bfloat16() for t in tensors(1, 2, 2, length, length, 64, 64))
        found = []
        for _ in range(3):
            start = time.perf_counter()
            attention(q, k, v, window=256, sinks=4)
            found.append(time.perf_counter() - start)
        return min(found)

    assert seconds(16384) < 10 * seconds(4096)  # 4 times the tokens; quadratic would be 16


GOOD = tensors(1, 4, 2, 5, 5, 16, 16)
PACKED = (torch.randn(5, 4, 16), torch.randn(5, 2, 16), torch.randn(5, 2, 16))
BAD = {
    "heads": (
        (GOOD[0][:, :3], *GOOD[1:]),
        {},
        ValueError,
        "heads of q must be a multiple of those of k and v, got 3 and 2",
    ),
    "rank": (PACKED, {}, ValueError, r"q must have shape \(B, heads, L, D\), got \(5, 4, 16\)"),
    "packed rank": (GOOD, {"cu_seqlens_q": torch.tensor([0, 5], dtype=torch.int32)}, ValueError, "packed"),
    "batch": ((GOOD[0].repeat(2, 1, 1, 1), *GOOD[1:]), {}, ValueError, "one batch size, got 2 and 1"),
    "head dim": ((GOOD[0][..., :8], *GOOD[1:]), {}, ValueError, "one head dimension"),
    "value length": ((*GOOD[:2], GOOD[2][:, :, :4]), {}, ValueError, "k and v must agree"),
    "dtypes": ((GOOD[0].half(), *GOOD[1:]), {}, ValueError, "one dtype"),
    "integer": ((GOOD[0].long(), *GOOD[1:]), {}, TypeError, "q must be a floating-point tensor"),
    "device": ((GOOD[0], GOOD[1].to("meta"), GOOD[2]), {}, ValueError, "k and q must be on one device"),
    "window of halves": (GOOD, {"window": 2.5}, TypeError, "window must be an integer, got 2.5"),
    "window": (GOOD, {"window": 0}, ValueError, "window must be at least 1.*got 0"),
    "sinks": (GOOD, {"sinks": -1}, ValueError, "sinks must be at least 0, got -1"),
    "softcap": (GOOD, {"softcap": 0.0}, ValueError, "softcap must be a finite number > 0"),
    "scale": (GOOD, {"scale": float("nan")}, ValueError, "scale"),
    "sink logits": (GOOD, {"sink_logits": torch.rand(2)}, ValueError, r"sink_logits must have shape \(4,\)"),
    "mask dtype": (GOOD, {"mask": torch.zeros(5, 5)}, TypeError, "mask must be a bool tensor"),
    "mask shape": (GOOD, {"mask": torch.ones(5, 4, dtype=torch.bool)}, ValueError, r"broadcastable to .*got \(5, 4\)"),
    "bounds dtype": (PACKED, {"cu_seqlens_q": torch.tensor([0, 5])}, TypeError, "int32"),
    "bounds end": (
        PACKED,
        {"cu_seqlens_q": torch.tensor([0, 4], dtype=torch.int32)},
        ValueError,
        "ascend from 0 to T = 5",
    ),
    "bounds order": (PACKED, {"cu_seqlens_q": torch.tensor([0, 4, 3, 5], dtype=torch.int32)}, ValueError, "ascend"),
    "dropout": (GOOD, {"dropout_p": 0.1}, ValueError, "dropout_p must be 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case):
    inputs, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        attention(*inputs, **options)


def test_the_definition_is_the_contract():
    for dtype in DTYPES:
        q, k, v = tensors(2, 4, 2, 30, 40, 24, 16)
        check(
            q,
            k,
            v,
            dtype,
            "torch",
            window=9,
            sinks=3,
            sink_logits=torch.rand(4),
            alibi_slopes=torch.rand(4),
            softcap=2.0,
        )
