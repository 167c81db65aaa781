import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.ops import layer_norm
from tests.ops.harness import assert_close_as_eager, check_op, each_backend, each_dtype


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(1, 2), (2, 3, 64), (7, 513)], ids=str)
@pytest.mark.parametrize("weights", ["none", "weight", "both"])
def test_matches_pytorch_in_fp64_forward_and_backward(backend, device, dtype, shape, weights):
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    weight, bias = torch.randn(shape[-1], dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    inputs = {"none": [x], "weight": [x, weight], "both": [x, weight, bias]}[weights]
    check_op(
        layer_norm,
        inputs,
        dtype,
        backend,
        device,
        reference=lambda x, w=None, b=None: F.layer_norm(x, x.shape[-1:], w, b),
    )


@each_backend
def test_rows_longer_than_a_block_and_bias_alone(backend, device):
    x, bias = torch.randn(3, 9001), torch.randn(9001)
    check_op(layer_norm, [x, torch.randn(9001), bias], torch.float32, backend, device)
    check_op(lambda x, b: layer_norm(x, None, b), [x, bias], torch.float32, backend, device)


@each_backend
def test_weights_need_not_be_dense(backend, device):
    for channels in (40, 9001):
        inputs = [torch.randn(3, channels), torch.randn(channels, 2)]
        check_op(lambda x, w: layer_norm(x, w[:, 0], w[:, 1]), inputs, torch.float32, backend, device)


@each_backend
def test_a_large_mean_does_not_cancel(backend, device):
    check_op(layer_norm, [torch.randn(4, 300) + 1000.0], torch.float32, backend, device)
    x = torch.randn(4, 4096) + 1000.0
    with fastllm.use_backend(backend):
        found = layer_norm(x.to(device)).cpu()
    exact, eager = F.layer_norm(x.double(), (4096,)), F.layer_norm(x, (4096,))
    if backend != "torch":
        assert_close_as_eager(found, eager, exact, torch.float32)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), channels=st.integers(8, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape(rows, channels, dtype):
    check_op(layer_norm, [torch.randn(rows, channels), torch.randn(channels), torch.randn(channels)], dtype, "cpp")


# Fewer random channels can lie so close together that the gradient is rounding alone; these lie apart.
@each_backend
@pytest.mark.parametrize("channels", [1, 2, 3, 7])
def test_few_channels(channels, backend, device):
    x = torch.arange(channels).remainder(2) * 2.0 - 1 + 0.3 * torch.rand(5, channels)
    check_op(layer_norm, [x, torch.randn(channels), torch.randn(channels)], torch.float32, backend, device)


@each_backend
def test_nan_stays_in_its_row_and_zero_sizes_work(backend, device):
    x = torch.randn(3, 33, device=device)
    x[1, 3] = float("nan")
    with fastllm.use_backend(backend):
        assert layer_norm(x).isnan().all(-1).tolist() == [False, True, False]
        assert layer_norm(torch.randn(0, 8, device=device)).shape == (0, 8)


def test_derivatives_of_any_order():
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 6), (6,), (6,))]
    torch.autograd.gradcheck(layer_norm, inputs)
    torch.autograd.gradgradcheck(layer_norm, inputs)


def test_second_derivative_through_the_kernel():
    inputs = [torch.randn(s, requires_grad=True) for s in ((3, 6), (6,), (6,))]
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            (grad,) = torch.autograd.grad(layer_norm(*inputs).pow(3).sum(), inputs[0], create_graph=True)
        found[backend] = torch.autograd.grad(grad.square().sum(), inputs[:2])
    torch.testing.assert_close(found["cpp"], found["torch"], rtol=1e-4, atol=1e-4)


def test_opcheck_and_compile():
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((3, 6), (6,), (6,)))
    for w, b in ((weight, bias), (None, None), (None, bias)):
        torch.library.opcheck(torch.ops.fastllm.layer_norm.default, (x, w, b, 1e-5))
    plain = [t.detach() for t in (x, x, weight, bias, torch.rand(3), torch.rand(3))]
    torch.library.opcheck(torch.ops.fastllm.layer_norm_backward.default, (*plain, 1e-5))
    compiled = torch.compile(lambda *a: layer_norm(*a), fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), layer_norm(x, weight, bias))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(2, 4), torch.ones(3)), ValueError, r"weight must have shape \(4,\)"),
        ((torch.ones(2, 4), None, torch.ones(3)), ValueError, r"bias must have shape \(4,\)"),
        ((torch.ones(2, 4, dtype=torch.long),), TypeError, "x must be a floating-point tensor"),
        ((torch.ones(2, 4), None, None, float("nan")), ValueError, "eps must be a finite number"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        layer_norm(*arguments)
