import pytest
import torch

import fastllm
from fastllm.ops import add_rms_norm, rms_norm
from tests.ops.harness import check_op, each_backend, each_dtype


def plain(x, residual, weight=None, eps=1e-6, offset=0.0):
    total = x + residual
    y = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (weight + offset), total


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 64), (7, 513), (2, 9001)], ids=str)
@pytest.mark.parametrize("offset", [None, 1.0])
def test_matches_the_formula_in_fp64_forward_and_backward(backend, device, dtype, shape, offset):
    x, residual = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(shape[-1], dtype=torch.float64)
    if offset is None:
        check_op(lambda x, r: add_rms_norm(x, r), [x, residual], dtype, backend, device, reference=plain)
    else:
        check_op(
            lambda x, r, w: add_rms_norm(x, r, w, 1e-5, weight_offset=offset), [x, residual, weight],
            dtype, backend, device,
            reference=lambda x, r, w: plain(x, r, w, 1e-5, offset),
        )  # fmt: skip


@each_backend
@each_dtype
def test_equals_an_addition_and_a_norm_rounded_between(backend, device, dtype):
    x, residual = (torch.randn(5, 96, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(96, device=device).to(dtype)
    with fastllm.use_backend(backend):
        normed, total = add_rms_norm(x, residual, weight)
        assert torch.equal(total, x + residual)
        assert torch.equal(normed, rms_norm(total, weight))


@each_backend
def test_either_output_may_go_without_a_gradient(backend, device):
    found = {}
    for name in (backend, "torch"):
        x, residual = (torch.arange(12.0, device=device).view(2, 6).sin().requires_grad_() for _ in range(2))
        weight = torch.linspace(1, 2, 6, device=device, requires_grad=True)
        with fastllm.use_backend(name):
            normed, total = add_rms_norm(x, residual, weight)
            first = torch.autograd.grad(normed.square().sum(), (x, residual, weight), retain_graph=True)
            second = torch.autograd.grad(total.square().sum(), (x, residual))
        found[name] = (*first, *second)
    torch.testing.assert_close(found[backend], found["torch"])


def test_derivatives_of_any_order():
    x, residual = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(add_rms_norm, (x, residual, weight))
    torch.autograd.gradgradcheck(add_rms_norm, (x, residual, weight))


def test_second_derivative_through_the_kernel():
    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((3, 6), (3, 6), (6,)))
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            normed, total = add_rms_norm(x, residual, weight)
            (grad,) = torch.autograd.grad(normed.square().sum() + total.pow(3).sum(), x, create_graph=True)
        found[backend] = torch.autograd.grad(grad.square().sum(), (x, residual, weight))
    torch.testing.assert_close(found["cpp"], found["torch"])


def test_opcheck_and_compile():
    x, residual, weight = (torch.randn(s, requires_grad=True) for s in ((3, 6), (3, 6), (6,)))
    for w in (weight, None):
        torch.library.opcheck(torch.ops.fastllm.add_rms_norm.default, (x, residual, w, 1e-6, 0.0))
    detached = [t.detach() for t in (x, residual, x, weight, torch.rand(3))]
    torch.library.opcheck(torch.ops.fastllm.add_rms_norm_backward.default, (*detached, 1e-6, 0.0))
    compiled = torch.compile(lambda *a: add_rms_norm(*a), fullgraph=True)
    torch.testing.assert_close(compiled(x, residual, weight), add_rms_norm(x, residual, weight))


def test_zero_rows_and_promotion():
    assert [t.shape for t in add_rms_norm(torch.randn(0, 4), torch.randn(0, 4))] == [(0, 4), (0, 4)]
    outputs = add_rms_norm(torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(2, 4))
    assert [t.dtype for t in outputs] == [torch.float32, torch.float32]


@pytest.mark.parametrize(
    ("residual", "weight", "error", "message"),
    [
        (torch.ones(2, 5), None, ValueError, r"residual must have shape \(2, 4\) \(the shape of x\), got \(2, 5\)"),
        (torch.ones(2, 4, dtype=torch.long), None, TypeError, "residual must be a floating-point tensor"),
        (torch.ones(2, 4), torch.ones(3), ValueError, r"weight must have shape \(4,\)"),
        (torch.ones(2, 4, device="meta"), None, ValueError, "residual and x must be on one device"),
    ],
)
def test_bad_arguments_are_named(residual, weight, error, message):
    with pytest.raises(error, match=message):
        add_rms_norm(torch.ones(2, 4), residual, weight)
