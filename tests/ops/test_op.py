"""Claims about every op: overhead, torch.compile, FakeTensor, autocast, checkpointing, forced backends."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import fastllm
from fastllm import backends, ops
from fastllm.ops import _op, rms_norm
from tests.ops.harness import each_backend


def test_available_names_the_definition_first():
    assert backends.available()[0] == "torch"
    assert "cpp" in backends.available()


def test_explain_names_the_backend_and_the_reason():
    text = backends.explain("rms_norm", torch.ones(2, 4))
    assert text.startswith("rms_norm: cpp (cpu tensor, torch.float32")
    assert "not cuda" in text
    assert backends.explain("rms_norm", torch.ones(2, 4, dtype=torch.float64)).startswith("rms_norm: torch")
    with pytest.raises(ValueError, match="op must be one of"):
        backends.explain("nothing", torch.ones(2))
    with pytest.raises(TypeError, match="needs the tensors"):
        backends.explain("rms_norm")


def test_a_forced_backend_that_cannot_serve_raises_naming_op_and_reason():
    with fastllm.use_backend("cuda"), pytest.raises(fastllm.BackendError, match=r"rms_norm.*'cuda'.*no CUDA"):
        rms_norm(torch.ones(2, 4))
    with fastllm.use_backend("cpp"), pytest.raises(fastllm.BackendError, match=r"not torch\.float64"):
        rms_norm(torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="backend must be one of"), fastllm.use_backend("fast"):
        pass
    assert backends.forced is None


def test_the_environment_forces_a_backend():
    code = "import torch, fastllm; print(fastllm.backends.explain('rms_norm', torch.ones(2, 2)).splitlines()[0])"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "FASTLLM_BACKEND": "torch"}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "rms_norm: torch (forced)", done.stderr


def test_compiles_without_a_graph_break():
    x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    compiled = torch.compile(lambda x, w: rms_norm(x, w) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), rms_norm(x, weight) * 2)
    grads = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
    torch.testing.assert_close(grads, torch.autograd.grad((rms_norm(x, weight) * 2).sum(), (x, weight)))


def test_fake_tensors_pass_through():
    with FakeTensorMode():
        x = torch.empty(4, 32, requires_grad=True)
        y = rms_norm(x, torch.empty(32))
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad.shape == x.shape


def test_checkpointing_and_double_use_of_an_input():
    x, weight = torch.randn(4, 32, requires_grad=True), torch.randn(32, requires_grad=True)

    def twice(x, weight):
        return rms_norm(x, weight) + rms_norm(x * 2, weight)

    expected = torch.autograd.grad(twice(x, weight).square().sum(), (x, weight))
    found = torch.autograd.grad(checkpoint(twice, x, weight, use_reentrant=False).square().sum(), (x, weight))
    torch.testing.assert_close(found, expected)


def test_two_backward_passes_over_one_graph_agree():
    x = torch.randn(4, 32, requires_grad=True)
    y = rms_norm(x).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, x), first, rtol=0, atol=0)


def test_functorch_grad():
    x = torch.randn(4, 32)
    found = torch.func.grad(lambda x: rms_norm(x).square().sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(rms_norm(x).square().sum(), x)[0])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.rms_norm(x),
        lambda x: ops.add_rms_norm(x, x)[0],
        lambda x: ops.layer_norm(x),
        lambda x: ops.swiglu(x, x),
        lambda x: ops.apply_rope(x.view(1, 1, 4, 8), x.view(1, 1, 4, 8), *torch.ones(2, 1, 4, 8))[0],
        lambda x: ops.cross_entropy(x, torch.arange(4)),
        lambda x: ops.token_logprobs(x, torch.arange(4)),
        lambda x: ops.linear_cross_entropy(x, torch.ones(5, 8).tril().to(x), torch.arange(4)),
        lambda x: ops.linear_token_logprobs(x, torch.ones(5, 8).tril().to(x), torch.arange(4)),
    ],
)
def test_forward_mode_derivatives_are_not_dropped(function):
    x, direction = torch.randn(4, 8), torch.randn(4, 8)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, direction))).tangent
    step = 1e-4
    with fastllm.use_backend("torch"):
        exact = (function(x.double() + step * direction) - function(x.double() - step * direction)) / (2 * step)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_forced_backends_of_two_threads_may_end_in_any_order():
    inside, go = threading.Event(), threading.Event()

    def first():
        with fastllm.use_backend("torch"):
            inside.set()
            go.wait(60)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(60)
    with fastllm.use_backend("cpp"):
        go.set()
        thread.join()
        assert backends.forced == "cpp"
    assert backends.forced is None


def test_autocast_leaves_the_op_alone():
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert rms_norm(x).dtype == torch.float32
        assert rms_norm(x.bfloat16()).dtype == torch.bfloat16


def test_global_random_state_is_untouched():
    before = torch.get_rng_state()
    rms_norm(torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_op_without_kernels_has_the_gradient_of_its_definition():
    """Also where the dispatcher runs the definition as the kernel, below autograd."""

    def backward_definition(grad, x):
        return _op.vjp(torch.sin, [x], (grad,))[0]

    backward = _op.Op(
        "only_defined_backward(Tensor grad, Tensor x) -> Tensor", backward_definition, fake=lambda g, x: x.clone()
    )
    op = _op.Op(
        "only_defined(Tensor x) -> Tensor", torch.sin, fake=torch.empty_like,
        save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        backward=lambda ctx, grad: backward(grad, *ctx.saved_tensors),
    )  # fmt: skip
    x = torch.randn(5, requires_grad=True)
    for call in (op, op.torch_op, torch.compile(op, fullgraph=True)):
        torch.testing.assert_close(torch.autograd.grad(call(x).sum(), x)[0], x.detach().cos())
    for call in (backward, backward.torch_op):
        with torch.no_grad():
            found = call(torch.ones(5), x.detach())
        torch.testing.assert_close(found, x.detach().cos())


def test_a_kernel_runs_on_the_gpu_of_its_tensors(monkeypatch):
    current = [0]

    class On:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *_):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", On)
    monkeypatch.setattr(rms_norm_op(), "_launcher", lambda x: (x.device.index, current[0]))
    for index in (0, 1, 0):
        assert rms_norm_op().launch(SimpleNamespace(device=torch.device("cuda", index))) == (index, index)
    assert current == [0]


def rms_norm_op():
    return _op.PUBLIC["rms_norm"]


def test_torch_compile_leaves_an_expanded_mask_expanded():
    def attend(q, k, padding):
        return ops.attention(q, k, k, mask=padding.bool()[:, None, None])

    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    padding = torch.tensor([[1] * 7, [0] * 3 + [1] * 4])
    found, code = run_and_get_code(torch.compile(attend, fullgraph=True), q, k, padding)
    torch.testing.assert_close(found, attend(q, k, padding))
    (call,) = [line for line in code[0].splitlines() if "= torch.ops.fastllm.attention" in line]
    assert "(2, 3, 5, 7), (7, 0, 0, 1)" in call


@each_backend
def test_a_tensor_that_torch_func_left_behind_serves(backend, device):
    x, left = torch.randn(3, 8, device=device), []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(x)
    weight = torch.ones(8, device=device, requires_grad=True)
    with fastllm.use_backend(backend):
        for given in (x, left[0]):
            rms_norm(given, weight).sum().backward()
        torch.testing.assert_close(weight.grad, 2 * torch.autograd.grad(rms_norm(x, weight).sum(), weight)[0])
