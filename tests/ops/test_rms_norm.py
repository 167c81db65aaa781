import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.ops import add_rms_norm, rms_norm
from tests.ops.harness import check_op, each_backend, each_dtype


def plain(x, weight=None, eps=1e-6, offset=0.0):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * (weight + offset)


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 64), (7, 513), (4, 1000)], ids=str)
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_matches_the_formula_in_fp64_forward_and_backward(backend, device, dtype, shape, offset):
    x, weight = torch.randn(shape, dtype=torch.float64) * 3, torch.randn(shape[-1], dtype=torch.float64)
    if offset is None:
        check_op(lambda x: rms_norm(x), [x], dtype, backend, device, reference=plain)
    else:
        check_op(
            lambda x, w: rms_norm(x, w, 1e-5, weight_offset=offset), [x, weight], dtype, backend, device,
            reference=lambda x, w: plain(x, w, 1e-5, offset),
        )  # fmt: skip


@each_backend
def test_rows_longer_than_a_block(backend, device):
    check_op(rms_norm, [torch.randn(3, 9001), torch.randn(9001)], torch.float32, backend, device)


@each_backend
def test_non_contiguous_input(backend, device):
    check_op(rms_norm, [torch.randn(6, 40, 5).transpose(1, 2), torch.randn(40)], torch.float32, backend, device)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@settings(max_examples=40, deadline=None)
# With one channel all of the gradient cancels but what eps leaves of it, and the error is as large as a channel is near 0.
@given(rows=st.integers(0, 9), channels=st.integers(2, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape(backend, rows, channels, dtype):
    x = torch.randn(rows, channels)
    if rows:
        check_op(rms_norm, [x, torch.randn(channels)], dtype, backend)
    else:
        assert rms_norm(x).shape == x.shape


@each_backend
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (3, 0)], ids=str)
def test_zero_size_gives_zero_size(backend, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    with fastllm.use_backend(backend):
        y = rms_norm(x, torch.ones(shape[-1], device=device))
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape


@each_backend
def test_nan_and_inf_come_out_as_the_definition_has_them(backend, device):
    x = torch.randn(4, 33)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    with fastllm.use_backend(backend):
        y = rms_norm(x.to(device)).cpu()
    expected = F.rms_norm(x, (33,), eps=1e-6)
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_weight_of_another_dtype_promotes():
    x, weight = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(8)
    y = rms_norm(x, weight)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, plain(x.float(), weight))


def test_derivatives_of_any_order_in_fp64():
    x, weight = (
        torch.randn(3, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(6, dtype=torch.float64, requires_grad=True),
    )
    torch.autograd.gradcheck(rms_norm, (x, weight))
    torch.autograd.gradgradcheck(rms_norm, (x, weight))


def test_second_derivative_through_the_kernel():
    x, weight = torch.randn(3, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            (grad,) = torch.autograd.grad(rms_norm(x, weight).square().sum(), x, create_graph=True)
        found[backend] = torch.autograd.grad(grad.square().sum(), (x, weight))
    torch.testing.assert_close(found["cpp"], found["torch"])


def test_opcheck():
    x, weight = torch.randn(3, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    for w in (weight, None):
        torch.library.opcheck(torch.ops.fastllm.rms_norm.default, (x, w, 1e-6, 0.0))
    torch.library.opcheck(
        torch.ops.fastllm.rms_norm_backward.default,
        (torch.randn(3, 6), x.detach(), weight.detach(), torch.rand(3), 1e-6, 0.0),
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 4, dtype=torch.int64),), TypeError, "x must be a floating-point tensor, got dtype torch.int64"),
        (([1.0],), TypeError, "x must be a tensor, got list"),
        ((torch.ones(()),), ValueError, "x must have at least 1 dimension"),
        ((torch.ones(2, 4), torch.ones(3)), ValueError, r"weight must have shape \(4,\) .*got \(3,\)"),
        ((torch.ones(2, 4), torch.ones(4, device="meta")), ValueError, "weight and x must be on one device"),
        ((torch.ones(2, 4), None, -1.0), ValueError, "eps must be a finite number >= 0.0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        rms_norm(*arguments)


@each_backend
def test_weights_need_not_be_dense(backend, device):
    x, weights = torch.randn(6, 40), torch.randn(80)
    for long in (x, torch.randn(3, 9001)):
        weight = torch.randn(2 * long.shape[-1])
        check_op(lambda x, w: rms_norm(x, w[::2]), [long, weight], torch.float32, backend, device)
        check_op(lambda x, w: rms_norm(x, w[:1].expand(x.shape[-1])), [long, weight], torch.float32, backend, device)
    check_op(lambda x, w: add_rms_norm(x, x, w[::2])[0], [x, weights], torch.float32, backend, device)


@pytest.mark.parametrize("frozen", [0, 1])
def test_third_derivative_where_an_operand_is_frozen(frozen):
    operands = [torch.randn(3, 5), torch.randn(5)]
    free = operands[1 - frozen].requires_grad_()
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            value = rms_norm(*operands).pow(3).sum()
            for _ in range(3):
                (grad,) = torch.autograd.grad(value, free, create_graph=True)
                value = grad.square().sum()
        found[backend] = grad
    torch.testing.assert_close(found["cpp"], found["torch"], rtol=1e-4, atol=1e-4)


def test_out_may_be_x_but_not_a_part_of_it():
    x, weight = torch.randn(6, 8), torch.randn(8)
    expected = rms_norm(x, weight)
    torch.testing.assert_close(rms_norm(x, weight, out=x), expected, rtol=0, atol=0)
    rms_norm(x[:3], out=x[3:])
    with pytest.raises(ValueError, match="out must not overlap x"):
        rms_norm(x[:5], out=x[1:])
    with pytest.raises(ValueError, match="out must not overlap weight"):
        rms_norm(torch.randn(8), weight, out=weight)


def test_out_counts_as_a_change_for_autograd():
    x, factor, out = torch.randn(5, 8), torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    loss = (factor * out).sum()
    rms_norm(x, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="out does not support gradients"):
        rms_norm(x, out=torch.empty(5, 8, requires_grad=True))
    with torch.inference_mode():
        rms_norm(x, out=torch.empty(5, 8))


@each_backend
def test_out_is_written_and_returned(backend, device):
    x, weight = torch.randn(5, 70, device=device), torch.randn(70, device=device)
    out = torch.empty_like(x)
    with fastllm.use_backend(backend):
        assert rms_norm(x, weight, out=out) is out
        torch.testing.assert_close(out, rms_norm(x, weight), rtol=0, atol=0)


def test_out_that_does_not_fit_is_refused():
    x = torch.randn(5, 8)
    for out, message in (
        (torch.empty(5, 7), "out must be a contiguous torch.float32 tensor"),
        (torch.empty(5, 8, dtype=torch.bfloat16), "out must be a contiguous torch.float32 tensor"),
        (torch.empty(8, 5).T, "out must be a contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm(x, out=out)
    with pytest.raises(ValueError, match="out does not support gradients"):
        rms_norm(x.requires_grad_(), out=torch.empty(5, 8))


def test_opcheck_of_the_out_form():
    x, weight = torch.randn(3, 6), torch.randn(6)
    torch.library.opcheck(torch.ops.fastllm.rms_norm_out.default, (x, weight, 1e-6, 0.0, torch.empty(3, 6)))
