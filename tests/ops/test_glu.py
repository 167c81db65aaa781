import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllm
from fastllm import backends
from fastllm.ops import geglu, swiglu
from tests.ops.harness import BACKENDS, DTYPES, check_op, each_backend, each_dtype


def geglu_tanh(gate, up):
    return geglu(gate, up)


def geglu_none(gate, up):
    return geglu(gate, up, approximate="none")


# The formulas as the papers write them, apart from the definition's calls into torch.nn.functional.
FORMULAS = {
    swiglu: lambda z, u: z / (1 + torch.exp(-z)) * u,
    geglu_tanh: lambda z, u: z / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) * u,
    geglu_none: lambda z, u: z / 2 * (1 + torch.erf(z / 2**0.5)) * u,
}
each_op = pytest.mark.parametrize("op", FORMULAS, ids=lambda f: f.__name__)


@each_backend
@each_dtype
@each_op
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 64), (3, 1100)], ids=str)
def test_matches_the_formula_in_fp64_forward_and_backward(backend, device, dtype, op, shape):
    gate, up = torch.randn(shape, dtype=torch.float64) * 3, torch.randn(shape, dtype=torch.float64)
    check_op(op, [gate, up], dtype, backend, device, reference=FORMULAS[op])


@each_backend
@each_op
@pytest.mark.parametrize("channels", [5, 48, 1200])
def test_halves_of_one_projection(backend, device, op, channels):
    gate, up = torch.randn(2, 3, 2 * channels).chunk(2, -1)
    check_op(op, [gate, up], torch.float32, backend, device, reference=FORMULAS[op])


@each_backend
@pytest.mark.parametrize(
    "cut",
    [
        lambda t: t.transpose(1, 2)[:, :5],
        lambda t: t[:, ::2],
        lambda t: t[..., ::2],
        lambda t: t[:, 1:3, :7],
        lambda t: t[:, :1].expand(-1, 6, -1),
        lambda t: t[0, 0, :1].expand(9),
    ],
    ids=["transposed", "every other row", "every other channel", "corner", "repeated row", "repeated element"],
)
def test_any_layout(backend, device, cut):
    check_op(swiglu, [cut(torch.randn(4, 8, 16)), cut(torch.randn(4, 8, 16))], torch.float32, backend, device)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9), channels=st.integers(0, 70), gap=st.integers(0, 3), dtype=st.sampled_from(DTYPES),
    op=st.sampled_from(list(FORMULAS)),
)  # fmt: skip
def test_any_shape(backend, rows, channels, gap, dtype, op):
    both = torch.randn(rows, 2 * channels + gap)
    check_op(op, [both[:, :channels], both[:, channels + gap :]], dtype, backend, reference=FORMULAS[op])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("halves", [False, True], ids=["dense", "halves"])
def test_outputs_larger_than_the_cache(dtype, halves):
    """The form that writes round the cache, with row starts that no vector is aligned to."""
    rows, channels = 1300 * 2 // dtype.itemsize, 3301
    both = torch.randn(rows, 2 * channels).to(dtype)
    gate, up = both.chunk(2, -1) if halves else both.view(2, rows, channels)
    grad = torch.randn(rows, channels).to(dtype)
    for activation in range(3):
        ops = torch.ops.fastllm
        y, pair = ops.glu(gate, up, activation), ops.glu_backward(grad, gate, up, activation)
        for r in range(0, rows, 97):
            torch.testing.assert_close(y[r], ops.glu(gate[r], up[r], activation), rtol=1e-6, atol=0)
            expected = ops.glu_backward(grad[r], gate[r], up[r], activation)
            torch.testing.assert_close([g[r] for g in pair], list(expected), rtol=1e-6, atol=0)
        assert y.isfinite().all()
        assert all(g.isfinite().all() for g in pair)


@each_backend
@each_op
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_zero_size_gives_zero_size(backend, device, op, shape):
    gate = torch.randn(shape, device=device, requires_grad=True)
    with fastllm.use_backend(backend):
        y = op(gate, torch.ones(shape, device=device))
        y.sum().backward()
    assert y.shape == gate.grad.shape == gate.shape


@each_backend
@each_dtype
@each_op
def test_a_large_gate_saturates(backend, device, dtype, op):
    gate = torch.tensor([1e4, -1e4, 100.0, -100.0], device=device, dtype=dtype, requires_grad=True)
    with fastllm.use_backend(backend):
        y = op(gate, torch.ones_like(gate))
        (slope,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(y.detach().cpu(), torch.tensor([1e4, -0.0, 100.0, -0.0]).to(dtype), rtol=0, atol=1e-30)
    assert y[1].signbit()
    assert slope.tolist() == pytest.approx([1, 0, 1, 0], abs=1e-30)


@pytest.mark.parametrize(("backend", "device"), BACKENDS[1:], ids=["cpp", "triton"])
@each_op
def test_the_largest_finite_gate_has_a_finite_slope(backend, device, op):
    gate = torch.tensor([3e38, -3e38, 1e20, -1e20], device=device, requires_grad=True)
    with fastllm.use_backend(backend):
        (slope,) = torch.autograd.grad(op(gate, torch.ones_like(gate)).sum(), gate)
    assert slope.tolist() == [1, 0, 1, 0]


@each_backend
@each_dtype
@each_op
def test_nan_and_inf_come_out_as_the_definition_has_them(backend, device, dtype, op):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, 1.0, -2.0], dtype=dtype)
    gate, up = (t.reshape(-1).clone() for t in torch.meshgrid(special, special, indexing="ij"))
    found = {}
    for name, where in ((backend, device), ("torch", "cpu")):
        z, u = gate.to(where).requires_grad_(), up.to(where).requires_grad_()
        with fastllm.use_backend(name):
            y = op(z, u)
            found[name, where] = [t.detach().cpu() for t in (y, *torch.autograd.grad(y, (z, u), torch.ones_like(y)))]
    ours, definition = found[backend, device], found["torch", "cpu"]
    torch.testing.assert_close(ours, definition, equal_nan=True)
    torch.testing.assert_close([t.float() for t in ours], [t.float() for t in definition], equal_nan=True)


def test_gelu_by_erf_is_as_exact_as_erf_over_its_whole_range():
    gate = torch.linspace(0, 6, 400_001)
    with fastllm.use_backend("cpp"):
        y = geglu_none(gate, torch.ones_like(gate)).double()
    exact = F.gelu(gate.double())
    assert ((y - exact).abs() <= 1.8e-7 * exact).all()  # three units in the last place of fp32


@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_agrees_with_the_definition(capability):
    code = """
import torch
from tests.ops.test_glu import FORMULAS, DTYPES, check_op
for dtype in DTYPES:
    for op, formula in FORMULAS.items():
        gate, up = torch.randn(7, 2 * 333).mul(4).chunk(2, -1)
        check_op(op, [gate, up], dtype, "cpp", reference=formula)
print(__import__("fastllm").kernels.cpp.capability())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTLLM_CPU_CAPABILITY": capability},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    order = ["baseline", "avx2", "avx512", "avx512_bf16"]
    assert order.index(done.stdout.strip()) <= order.index(capability)


def test_dtypes_promote():
    gate, up = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8)
    torch.testing.assert_close(swiglu(gate, up), F.silu(gate.float()) * up)
    assert swiglu(up, gate).dtype == torch.float32
    assert geglu(gate, up.half()).dtype == torch.float32
    assert swiglu(gate.double(), up).dtype == torch.float64


@each_op
def test_derivatives_of_any_order_in_fp64(op):
    gate, up = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(op, (gate, up))
    torch.autograd.gradgradcheck(op, (gate, up))


@each_op
def test_second_derivative_through_the_kernel(op):
    gate, up = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6, requires_grad=True)
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            (grad,) = torch.autograd.grad(op(gate, up).square().sum(), gate, create_graph=True)
        found[backend] = torch.autograd.grad(grad.square().sum(), (gate, up))
    torch.testing.assert_close(found["cpp"], found["torch"], rtol=1e-5, atol=1e-5)


def test_a_gradient_that_one_input_alone_needs():
    gate, up = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    (found,) = torch.autograd.grad(swiglu(gate, up).sum(), gate)
    (expected,) = torch.autograd.grad((F.silu(gate) * up).sum(), gate)
    torch.testing.assert_close(found, expected)


def test_one_tensor_as_gate_and_up():
    x = torch.randn(3, 6, requires_grad=True)
    torch.testing.assert_close(
        torch.autograd.grad(swiglu(x, x).sum(), x), torch.autograd.grad((F.silu(x) * x).sum(), x)
    )


@pytest.mark.parametrize("activation", [0, 1, 2])
def test_opcheck(activation):
    gate, up = torch.randn(3, 12).requires_grad_().chunk(2, -1)
    torch.library.opcheck(torch.ops.fastllm.glu.default, (gate, up, activation))
    gate, up = gate.detach(), up.detach()
    torch.library.opcheck(torch.ops.fastllm.glu_backward.default, (torch.randn(3, 6), gate, up, activation))


@each_op
def test_compiles_without_a_graph_break(op):
    both = torch.randn(4, 64, requires_grad=True)
    compiled = torch.compile(lambda x: op(*x.chunk(2, -1)) * 2, fullgraph=True)
    expected = op(*both.chunk(2, -1)) * 2
    torch.testing.assert_close(compiled(both), expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(both).sum(), both), torch.autograd.grad(expected.sum(), both)
    )


def test_explain_knows_both_names():
    for name in ("swiglu", "geglu"):
        assert backends.explain(name, torch.ones(2, 4), torch.ones(2, 4)).startswith(f"{name}: cpp")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: swiglu([1.0], torch.ones(1)), TypeError, "gate must be a tensor, got list"),
        (
            lambda: swiglu(torch.ones(2), torch.ones(2, dtype=torch.int64)), TypeError,
            "up must be a floating-point tensor, got dtype torch.int64",
        ),
        (
            lambda: swiglu(torch.ones(2, 4), torch.ones(2, 1)), ValueError,
            r"up must have shape \(2, 4\) \(that of gate\), got \(2, 1\)",
        ),
        (
            lambda: geglu(torch.ones(2, 4), torch.ones(2, 4, device="meta")), ValueError,
            "up and gate must be on one device, got meta and cpu",
        ),
        (
            lambda: geglu(torch.ones(2), torch.ones(2), approximate="erf"), ValueError,
            "approximate must be one of 'tanh', 'none', got 'erf'",
        ),
    ],
    ids=["not a tensor", "integers", "shape", "device", "approximate"],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_third_derivative_where_one_half_is_frozen():
    gate, up = torch.randn(3, 5, requires_grad=True), torch.randn(3, 5)
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            value = swiglu(gate, up).pow(3).sum()
            for _ in range(3):
                (grad,) = torch.autograd.grad(value, gate, create_graph=True)
                value = grad.square().sum()
        found[backend] = grad
    torch.testing.assert_close(found["cpp"], found["torch"], rtol=1e-4, atol=1e-4)


@each_backend
def test_the_slope_where_the_gate_saturates(backend, device):
    gate = torch.linspace(2.5, 20.0, 2000)
    for op, formula in FORMULAS.items():
        check_op(op, [gate, torch.ones(2000)], torch.float32, backend, device, reference=formula)
    bound = 8e-7  # of a slope of 1
    wide = gate.double().requires_grad_()
    (exact,) = torch.autograd.grad(F.gelu(wide, approximate="tanh").sum(), wide)
    ours = gate.to(device).requires_grad_()
    with fastllm.use_backend(backend):
        (found,) = torch.autograd.grad(geglu(ours, torch.ones(2000, device=device)).sum(), ours)
    if backend != "torch":
        assert (found.double().cpu() - exact).abs().max() < bound
