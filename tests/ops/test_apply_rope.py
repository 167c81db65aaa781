import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.ops import apply_rope
from tests.ops.harness import check_op, each_backend, each_dtype


def plain(q, k, cos, sin, interleaved=False):
    """Rotation by the textbook: y = x cos + rotate(x) sin on the first R dimensions."""
    rotated = cos.shape[-1]

    def turn(x):
        if interleaved:
            return torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return torch.cat((-x[..., rotated // 2 :], x[..., : rotated // 2]), -1)

    def one(x):
        r = x[..., :rotated]
        c, s = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
        return torch.cat((r * c + turn(r) * s, x[..., rotated:]), -1)

    return one(q), one(k)


def table(batch, length, rotated, interleaved, general=False):
    angles = torch.rand(batch, length, rotated // 2, dtype=torch.float64) * 6
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    if general:
        angles = angles + torch.randn_like(angles)
    return angles.cos(), angles.sin()


def heads(batch, q_heads, k_heads, length, dim, transposed=False):
    shape = (lambda h: (batch, length, h, dim)) if transposed else (lambda h: (batch, h, length, dim))
    pair = [torch.randn(shape(h), dtype=torch.float64) for h in (q_heads, k_heads)]
    return [x.transpose(1, 2) if transposed else x for x in pair]


@each_backend
@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1, 2, 2), (2, 4, 2, 5, 16, 16), (2, 3, 1, 7, 24, 10), (1, 2, 2, 33, 80, 64)], ids=str
)
def test_matches_the_formula_in_fp64_forward_and_backward(backend, device, dtype, shape, interleaved):
    batch, q_heads, k_heads, length, dim, rotated = shape
    for transposed in (False, True):
        q, k = heads(batch, q_heads, k_heads, length, dim, transposed)
        cos, sin = table(batch if transposed else 1, length, rotated, interleaved, general=True)
        check_op(
            lambda q, k, c, s: apply_rope(q, k, c, s, interleaved=interleaved), [q, k, cos, sin],
            dtype, backend, device,
            reference=lambda q, k, c, s: plain(q, k, c, s, interleaved), no_grad=[2, 3],
        )  # fmt: skip


@each_backend
def test_fp32_tables_with_bf16_heads_and_the_other_way_round(backend, device):
    q, k = heads(2, 3, 1, 5, 16)
    cos, sin = (t.float() for t in table(2, 5, 16, False))
    check_op(apply_rope, [q, k, cos, sin], torch.bfloat16, backend, device, no_grad=[2, 3], keep_dtype=[2, 3])
    cos, sin = cos.bfloat16(), sin.bfloat16()
    check_op(apply_rope, [q, k, cos, sin], torch.float32, backend, device, no_grad=[2, 3], keep_dtype=[2, 3])


@each_backend
def test_outputs_keep_the_memory_order_of_the_inputs(backend, device):
    cos, sin = (t.float().to(device) for t in table(1, 5, 16, False))
    for transposed in (False, True):
        q, k = (x.float().to(device) for x in heads(2, 4, 2, 5, 16, transposed))
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x.contiguous() for x in (q, k))
        with fastllm.use_backend(backend):
            rotated = apply_rope(q, k, cos, sin)
        assert [x.stride() for x in rotated] == [q.stride(), k.stride()]


def test_large_outputs_written_round_the_cache_are_right():
    q, k = torch.randn(1, 8, 3000, 128), torch.randn(1, 2, 3000, 128)
    cos, sin = (t.float() for t in table(1, 3000, 128, False))
    for x, y in zip(apply_rope(q, k, cos, sin), plain(q, k, cos, sin)):
        torch.testing.assert_close(x, y)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(0, 20), q_heads=st.integers(1, 5), half=st.integers(1, 40), rest=st.integers(0, 9),
    interleaved=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_any_shape(length, q_heads, half, rest, interleaved, dtype):
    q, k = heads(2, q_heads, 1, length, 2 * half + rest)
    cos, sin = table(2, length, 2 * half, interleaved)
    if length:
        check_op(lambda *a: apply_rope(*a, interleaved=interleaved), [q, k, cos, sin], dtype, "cpp", no_grad=[2, 3])
    else:
        assert apply_rope(*(t.to(dtype) for t in (q, k, cos, sin)))[0].shape == q.shape


def test_tables_that_require_a_gradient_get_the_definitions():
    q, k = heads(1, 2, 1, 3, 4)
    cos, sin = (t.requires_grad_() for t in table(1, 3, 4, False))
    q.requires_grad_()
    torch.autograd.gradcheck(lambda *a: apply_rope(*a), (q, k, cos, sin))
    cos32, sin32 = cos.detach().float().requires_grad_(), sin.detach().float()
    apply_rope(q.detach().float(), k.float(), cos32, sin32)[0].sum().backward()
    assert cos32.grad is not None


@pytest.mark.parametrize("interleaved", [False, True])
def test_derivatives_of_any_order(interleaved):
    q, k = (x.requires_grad_() for x in heads(1, 2, 1, 3, 6))
    cos, sin = table(1, 3, 4, interleaved)
    f = lambda q, k: apply_rope(q, k, cos, sin, interleaved=interleaved)  # noqa: E731
    torch.autograd.gradcheck(f, (q, k))
    torch.autograd.gradgradcheck(f, (q, k))


def test_second_derivative_through_the_kernel():
    q, k = (x.float().requires_grad_() for x in heads(1, 2, 1, 3, 6))
    cos, sin = (t.float() for t in table(1, 3, 4, False))
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            (grad,) = torch.autograd.grad(apply_rope(q, k, cos, sin)[0].pow(3).sum(), q, create_graph=True)
        found[backend] = torch.autograd.grad(grad.square().sum(), q)
    torch.testing.assert_close(found["cpp"], found["torch"])


def test_opcheck():
    for transposed in (False, True):
        q, k = (x.float().requires_grad_() for x in heads(2, 2, 1, 3, 6, transposed))
        cos, sin = (t.float() for t in table(1, 3, 4, False))
        torch.library.opcheck(torch.ops.fastllm.apply_rope.default, (q, k, cos, sin, False, False))
        torch.library.opcheck(torch.ops.fastllm.apply_rope.default, (q, k, cos, sin, True, True))


def test_compiles_without_a_graph_break():
    q, k = (x.float().requires_grad_() for x in heads(2, 2, 1, 3, 6, transposed=True))
    cos, sin = (t.float() for t in table(1, 3, 4, False))
    compiled = torch.compile(lambda q, k: apply_rope(q, k, cos, sin), fullgraph=True)
    torch.testing.assert_close(compiled(q, k), apply_rope(q, k, cos, sin))
    sum(y.sum() for y in compiled(q, k)).backward()


def test_nan_stays_in_its_pair():
    q, k = (x.float() for x in heads(1, 1, 1, 2, 8))
    q[0, 0, 0, 1] = float("nan")
    y = apply_rope(q, k, *(t.float() for t in table(1, 2, 8, False)))[0]
    assert y.isnan().nonzero().tolist() == [[0, 0, 0, 1], [0, 0, 0, 5]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.ones(1, 2, 3, 8, dtype=torch.int32)}, TypeError, "q must be a floating-point tensor"),
        ({"q": torch.ones(2, 3, 8)}, ValueError, r"q must have shape \(B, heads, L, D\)"),
        ({"k": torch.ones(1, 2, 4, 8)}, ValueError, "q and k must agree in B, L and D"),
        ({"k": torch.ones(1, 2, 3, 8, dtype=torch.bfloat16)}, ValueError, "q and k must have one dtype"),
        ({"cos": torch.ones(1, 4, 8)}, ValueError, r"cos must have shape \(1, 3, R\)"),
        ({"sin": torch.ones(3, 8)}, ValueError, "sin must have shape"),
        ({"cos": torch.ones(1, 3, 4)}, ValueError, "cos and sin must have one R"),
        (
            {"cos": torch.ones(1, 3, 5), "sin": torch.ones(1, 3, 5)},
            ValueError,
            "even number of dimensions, at most D = 8, got 5",
        ),
        ({"cos": torch.ones(1, 3, 10), "sin": torch.ones(1, 3, 10)}, ValueError, "at most D = 8, got 10"),
        ({"cos": torch.ones(1, 3, 8, device="meta")}, ValueError, "cos and q must be on one device"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {
        "q": torch.ones(1, 2, 3, 8),
        "k": torch.ones(1, 2, 3, 8),
        "cos": torch.ones(1, 3, 8),
        "sin": torch.ones(1, 3, 8),
    }
    with pytest.raises(error, match=message):
        apply_rope(**{**good, **change})


def test_a_forced_backend_refuses_tables_that_learn():
    q, k, cos, sin = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    cos.requires_grad_()
    assert "torch (kernels have no gradient for cos)" in fastllm.backends.explain("apply_rope", q, k, cos, sin)
    with fastllm.use_backend("cpp"), pytest.raises(fastllm.BackendError, match="no gradient for cos and sin"):
        fastllm.ops.apply_rope(q, k, cos, sin)
