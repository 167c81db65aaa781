import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.ops import token_logprobs
from tests.ops.harness import check_op, each_backend, each_dtype


def plain(logits, target, temperature=1.0, softcap=None, with_entropy=False):
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logp = (z / temperature).log_softmax(-1)
    chosen = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    p = logp.exp()
    return (chosen, -torch.where(p > 0, p * logp, 0.0).sum(-1)) if with_entropy else chosen


def some(rows, classes, scale=3.0):
    return torch.randn(rows, classes, dtype=torch.float64) * scale, torch.randint(0, classes, (rows,))


def check(logits, target, dtype, backend, device="cpu", **how):
    check_op(
        lambda x, t: token_logprobs(x, t, **how), [logits, target], dtype, backend, device,
        reference=lambda x, t: plain(x, t, **how),
    )  # fmt: skip


@each_backend
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (7, 513), (2, 5001)], ids=str)
@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprobs", "entropy"])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 1.3}], ids=str)
def test_matches_the_formula_in_fp64_forward_and_backward(backend, device, dtype, shape, with_entropy, how):
    check(*some(*shape), dtype, backend, device, with_entropy=with_entropy, **how)


@each_backend
def test_a_maximum_that_rises_from_block_to_block_and_large_logits(backend, device):
    logits, target = some(4, 9000)
    logits += torch.linspace(-400, 400, 9000)
    logits[1] += 10000
    logits[2] = 7.0
    logits[3] = -logits[3]
    check(logits, target, torch.float32, backend, device, with_entropy=True)


@each_backend
@each_dtype
def test_logprobs_are_never_positive(backend, device, dtype):
    logits = torch.randn(64, 50, dtype=torch.float64) * 40
    for how in ({}, {"temperature": 0.05}, {"softcap": 30.0, "temperature": 0.1}):
        with fastllm.use_backend(backend):
            logprobs, entropy = token_logprobs(
                logits.to(device, dtype), logits.argmax(-1).to(device), with_entropy=True, **how
            )
        assert logprobs.max() <= 0
        assert logprobs.dtype == entropy.dtype == torch.float32
        assert entropy.min() > -1e-5


@each_backend
def test_minus_infinity_counts_nothing_anywhere(backend, device):
    logits, target = some(4, 5000)
    logits[:, 10:4500] = float("-inf")
    target[:] = torch.tensor([0, 4700, 20, 4999])
    logits = logits.float().to(device).requires_grad_()
    with fastllm.use_backend(backend):
        logprobs, entropy = token_logprobs(logits, target.to(device), with_entropy=True)
    assert logprobs[2].item() == float("-inf")
    assert logprobs[[0, 1, 3]].isfinite().all()
    short = logits.detach().cpu()[:, [*range(10), *range(4500, 5000)]]
    torch.testing.assert_close(entropy.detach().cpu(), torch.distributions.Categorical(logits=short).entropy())
    (grad,) = torch.autograd.grad(entropy.sum() + logprobs[[0, 1, 3]].sum(), logits)
    assert torch.equal(grad[:, 10:4500], torch.zeros_like(grad[:, 10:4500]))
    assert grad.isfinite().all()


@each_backend
@pytest.mark.parametrize("with_entropy", [False, True])
def test_nan_and_inf_come_out_as_the_definition_has_them(backend, device, with_entropy):
    logits, target = some(5, 33)
    logits[0, 3], logits[1, 4], logits[2] = float("nan"), float("inf"), float("-inf")
    check(logits, target, torch.float32, backend, device, with_entropy=with_entropy)


@each_backend
def test_leading_dimensions(backend, device):
    for shape in [(3, 5, 17), (17,), (2, 2, 3, 17)]:
        logits, target = torch.randn(shape), torch.randint(0, 17, shape[:-1])
        check(logits, target, torch.float32, backend, device, with_entropy=True)
    logits, target = torch.randn(4, 17, 6).mT, torch.randint(0, 17, (4, 6))
    check(logits, target, torch.float32, backend, device, with_entropy=True)


@each_backend
def test_zero_size(backend, device):
    for shape in [(0, 8), (2, 0, 8)]:
        logits = torch.randn(shape, device=device, requires_grad=True)
        target = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
        with fastllm.use_backend(backend):
            logprobs, entropy = token_logprobs(logits, target, with_entropy=True)
        (logprobs.sum() + entropy.sum()).backward()
        assert logprobs.shape == entropy.shape == shape[:-1]
        assert logits.grad.shape == shape


@each_backend
def test_either_result_alone_can_be_differentiated(backend, device):
    logits, target = some(3, 20)
    logits = logits.float().to(device).requires_grad_()
    target = target.to(device)
    for which in (0, 1):
        with fastllm.use_backend(backend):
            found = torch.autograd.grad(token_logprobs(logits, target, with_entropy=True)[which].sum(), logits)
        expected = torch.autograd.grad(plain(logits, target, with_entropy=True)[which].sum(), logits)
        torch.testing.assert_close(found, expected)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), classes=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_shape(rows, classes, dtype):
    check(*some(rows, classes), dtype, "cpp", with_entropy=True)


@each_backend
@pytest.mark.parametrize("value", [5, -100])
def test_a_target_out_of_range_is_an_index_error_on_the_cpu(backend, device, value):
    if device != "cpu":
        pytest.skip("a device assert in debug mode")
    with fastllm.use_backend(backend), pytest.raises(IndexError, match=rf"target must lie in \[0, 5\).*got {value}$"):
        token_logprobs(torch.randn(2, 5), torch.tensor([1, value]))


def test_derivatives_of_any_order_in_fp64():
    logits, target = some(3, 6, scale=1.0)
    logits.requires_grad_()
    for how in ({"with_entropy": True}, {"softcap": 2.0, "temperature": 0.5, "with_entropy": True}):
        torch.autograd.gradcheck(lambda x: token_logprobs(x, target, **how), logits)  # noqa: B023
        torch.autograd.gradgradcheck(lambda x: token_logprobs(x, target, **how), logits)  # noqa: B023


def test_second_derivative_through_the_kernel():
    logits, target = some(3, 6)
    logits = logits.float().requires_grad_()
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            logprobs, entropy = token_logprobs(logits, target, with_entropy=True, softcap=4.0)
            (grad,) = torch.autograd.grad((logprobs * entropy).sum(), logits, create_graph=True)
        found[backend] = torch.autograd.grad(grad.square().sum(), logits)
    torch.testing.assert_close(found["cpp"], found["torch"])


def test_opcheck():
    logits, target = some(3, 6)
    logits = logits.float().requires_grad_()
    for with_entropy in (False, True):
        torch.library.opcheck(torch.ops.fastllm.token_logprobs.default, (logits, target, 0.7, 2.0, with_entropy))
    _, entropy, stats = torch.ops.fastllm.token_logprobs(logits.detach(), target, 0.7, 2.0, True)
    for grad_entropy in (None, torch.ones_like(entropy)):
        torch.library.opcheck(
            torch.ops.fastllm.token_logprobs_backward.default,
            (logits.detach(), target, torch.ones(3), grad_entropy, stats, 0.7, 2.0),
        )


def test_compiles_without_a_graph_break():
    logits, target = torch.randn(2, 4, 32, requires_grad=True), torch.randint(0, 32, (2, 4))

    def score(x, t):
        logprobs, entropy = token_logprobs(x, t, with_entropy=True, temperature=0.7)
        return (logprobs + 0.1 * entropy).sum()

    scores = [f(logits, target) for f in (torch.compile(score, fullgraph=True), score)]
    torch.testing.assert_close(*scores)
    torch.testing.assert_close(*(torch.autograd.grad(s, logits)[0] for s in scores))


@pytest.mark.parametrize(
    ("arguments", "how", "error", "message"),
    [
        ((torch.ones(2, 4, dtype=torch.int64), torch.zeros(2).long()), {}, TypeError, "logits must be a floating"),
        ((torch.ones(2, 4), torch.zeros(2, dtype=torch.bool)), {}, TypeError, "target must hold class indices"),
        ((torch.ones(2, 4), torch.zeros(2, 1).long()), {}, ValueError, r"target must have shape \(2,\).*got \(2, 1\)"),
        ((torch.ones(2, 4), torch.zeros(2).long()), {"temperature": 0.0}, ValueError, "temperature .* > 0.0, got 0.0"),
        ((torch.ones(2, 4), torch.zeros(2).long()), {"softcap": -3.0}, ValueError, "softcap .* got -3.0"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, how, error, message):
    with pytest.raises(error, match=message):
        token_logprobs(*arguments, **how)
