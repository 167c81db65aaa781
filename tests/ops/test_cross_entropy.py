import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fastllm
from fastllm.ops import cross_entropy
from tests.ops.harness import check_op, each_backend, each_dtype

OPTIONS = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "capped": {"softcap": 5.0},
    "all": {"label_smoothing": 0.2, "z_loss": 0.1, "softcap": 3.0},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def plain(logits, target, label_smoothing=0.0, z_loss=0.0, softcap=None, ignore_index=-100, **how):
    """torch's own cross entropy, and z-loss as PaLM has it."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    kept = target != ignore_index
    reduction, num_items = how.get("reduction", "mean"), how.get("num_items")
    losses = F.cross_entropy(z, target, label_smoothing=label_smoothing, ignore_index=ignore_index, reduction="none")
    losses = losses + torch.where(kept, z_loss * z.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (kept.sum() if num_items is None else num_items)


def some(rows, classes, scale=3.0, ignored=()):
    logits, target = torch.randn(rows, classes, dtype=torch.float64) * scale, torch.randint(0, classes, (rows,))
    target[list(ignored)] = -100
    return logits, target


def check(logits, target, dtype, backend, device, **how):
    check_op(
        lambda x, t: cross_entropy(x, t, **how), [logits, target], dtype, backend, device,
        reference=lambda x, t: plain(x, t, **how),
    )  # fmt: skip


@each_backend
@each_dtype
@each_option
@pytest.mark.parametrize("shape", [(1, 1), (7, 513), (3, 4500)], ids=str)
def test_matches_torch_in_fp64_forward_and_backward(backend, device, dtype, options, shape):
    check(*some(*shape, ignored=(1,) if shape[0] > 1 else ()), dtype, backend, device, **options)


@each_backend
@pytest.mark.parametrize(
    "how", [{"reduction": "none"}, {"reduction": "sum"}, {"num_items": 17}, {"num_items": 2.5}], ids=str
)
def test_reductions_and_num_items(backend, device, how):
    check(*some(9, 33, ignored=(0, 4)), torch.float32, backend, device, **how, label_smoothing=0.1, z_loss=0.01)


@each_backend
def test_a_maximum_that_rises_from_block_to_block_and_large_logits(backend, device):
    logits, target = some(4, 9000)
    logits += torch.linspace(-400, 400, 9000)
    logits[1] += 10000
    logits[2] = 7.0
    logits[3] = -logits[3]
    check(logits, target, torch.float32, backend, device)


@each_backend
def test_a_soft_cap_far_above_the_logits(backend, device):
    for softcap in (50.0, 1e3, 1e6):
        check(*some(7, 513), torch.float32, backend, device, softcap=softcap, reduction="none")


@each_backend
@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_num_items_as_a_tensor_is_the_number(backend, device, tokens):
    logits, target = some(6, 11, ignored=range(tokens, 6))
    logits, target = logits.float().to(device).requires_grad_(), target.to(device)
    for items in (torch.tensor(12, device=device), torch.tensor([12.0], device=device), torch.tensor(12)):
        with fastllm.use_backend(backend):
            losses = [cross_entropy(logits, target, num_items=n) for n in (items, 12)]
        assert losses[0].item() == losses[1].item()
        grads = [torch.autograd.grad(loss, logits)[0] for loss in losses]
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@each_backend
@pytest.mark.parametrize(
    "how", [{}, {"num_items": 0}, {"num_items": 5}, {"reduction": "sum"}, {"z_loss": 1.0}], ids=str
)
def test_no_target_left_gives_zero_and_zero_gradients_whatever_the_rows_hold(backend, device, how):
    logits = torch.full((3, 7), float("nan"), device=device, requires_grad=True)
    target = torch.full((3,), -100, device=device)
    with fastllm.use_backend(backend):
        loss = cross_entropy(logits, target, **how)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@each_backend
def test_ignored_rows_contribute_nothing(backend, device):
    logits, target = some(8, 40)
    logits, target = logits.float().to(device), target.to(device)
    poisoned, masked = torch.cat([logits, logits]), torch.cat([target, torch.full_like(target, 3)])
    poisoned[8::2], poisoned[9::2] = float("nan"), float("inf")
    found = {}
    for name, x, t in (("kept", logits, target), ("all", poisoned, masked)):
        t = t.where(t != 3, 7) if name == "kept" else torch.cat([target.where(target != 3, 7), masked[8:]])
        x.requires_grad_()
        with fastllm.use_backend(backend):
            loss = cross_entropy(x, t, ignore_index=3, z_loss=0.1, label_smoothing=0.1)
        found[name] = loss, *torch.autograd.grad(loss, x)
    torch.testing.assert_close(found["all"][0], found["kept"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found["all"][1][:8], found["kept"][1])
    assert torch.equal(found["all"][1][8:], torch.zeros_like(logits))


@each_backend
@pytest.mark.parametrize("how", [{}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 4.0}], ids=str)
def test_nan_and_inf_come_out_as_torch_has_them(backend, device, how):
    logits, target = some(6, 33)
    logits[0, 3], logits[1, 4], logits[2, 5], logits[3] = float("nan"), float("inf"), float("-inf"), float("-inf")
    target[5] = 0
    logits[5, 0] = float("-inf")
    check(logits, target, torch.float32, backend, device, reduction="none", **how)


@each_backend
def test_minus_infinity_has_probability_and_gradient_zero(backend, device):
    logits, target = some(3, 5000)
    logits[:, :4500] = float("-inf")
    target[:] = 4999
    logits = logits.float().to(device).requires_grad_()
    with fastllm.use_backend(backend):
        cross_entropy(logits, target.to(device)).backward()
    assert torch.equal(logits.grad[:, :4500], torch.zeros_like(logits[:, :4500]))
    assert logits.grad[:, 4500:].abs().min() > 0


@each_backend
def test_leading_dimensions_and_other_strides(backend, device):
    logits, target = torch.randn(3, 5, 17), torch.randint(0, 17, (3, 5))
    flat = plain(logits.reshape(15, 17), target.reshape(15), reduction="none").view(3, 5)
    padded = torch.full((3, 5, 20), float("nan"))
    padded[..., :17] = logits
    forms = [logits, logits.transpose(0, 1).contiguous().transpose(0, 1), logits.mT.contiguous().mT, padded[..., :17]]
    for x in [*forms, padded.view(15, 20)[:, :17]]:
        t = target if x.dim() == 3 else target.reshape(15)
        x, expected = x.to(device).requires_grad_(), flat.view(t.shape)
        with fastllm.use_backend(backend):
            losses = cross_entropy(x, t.to(device), reduction="none")
        torch.testing.assert_close(losses.cpu(), expected, rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad(losses.sum(), x)
        reference = torch.autograd.grad(plain(x.reshape(15, 17), t.to(device).reshape(15), reduction="sum"), x)[0]
        torch.testing.assert_close(grad, reference)


@each_backend
def test_zero_size(backend, device):
    for shape in [(0, 8), (2, 0, 8), (0, 0)]:
        logits = torch.randn(shape, device=device, requires_grad=True)
        target = torch.zeros(shape[:-1], dtype=torch.int64, device=device)
        with fastllm.use_backend(backend):
            assert cross_entropy(logits, target, reduction="none").shape == shape[:-1]
            loss = cross_entropy(logits, target)
        loss.backward()
        assert loss.item() == 0
        assert logits.grad.shape == shape


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), classes=st.integers(1, 300), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
)  # fmt: skip
def test_any_shape(rows, classes, dtype, smoothing):
    check(*some(rows, classes), dtype, "cpp", "cpu", label_smoothing=smoothing)


@each_backend
@pytest.mark.parametrize("value", [5, -1, 2**40])
def test_a_target_out_of_range_is_an_index_error_on_the_cpu(backend, device, value):
    if device != "cpu":
        pytest.skip("a device assert in debug mode")
    target = torch.tensor([1, value, -100, 0])
    with (
        fastllm.use_backend(backend),
        pytest.raises(IndexError, match=rf"\[0, 5\).*ignore_index \(-100\), got {value}$"),
    ):
        cross_entropy(torch.randn(4, 5), target)


def test_integer_targets_of_any_width_and_a_loss_in_fp32():
    logits, target = some(4, 9)
    logits = logits.bfloat16()
    loss = cross_entropy(logits, target)
    assert loss.dtype == torch.float32
    for dtype in (torch.int32, torch.uint8):
        assert cross_entropy(logits, target.to(dtype)).item() == loss.item()
    assert cross_entropy(logits.double(), target).dtype == torch.float64


def test_two_runs_give_the_same_bits():
    logits, target = some(300, 500)
    logits = logits.float().requires_grad_()
    runs = []
    for _ in range(2):
        loss = cross_entropy(logits, target, label_smoothing=0.1)
        runs.append((loss.detach(), torch.autograd.grad(loss, logits)[0]))
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_derivatives_of_any_order_in_fp64():
    logits, target = some(3, 6, ignored=(1,))
    logits.requires_grad_()
    for how in (OPTIONS["all"], {"reduction": "none"}, {"num_items": 4.0}):
        torch.autograd.gradcheck(lambda x: cross_entropy(x, target, **how), logits)  # noqa: B023
        torch.autograd.gradgradcheck(lambda x: cross_entropy(x, target, **how), logits)  # noqa: B023


def test_second_derivative_through_the_kernel():
    logits, target = some(3, 6)
    logits = logits.float().requires_grad_()
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            loss = cross_entropy(logits, target, **OPTIONS["all"], num_items=torch.tensor(2))
            (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
        found[backend] = torch.autograd.grad(grad.square().sum(), logits)
    torch.testing.assert_close(found["cpp"], found["torch"])


def test_opcheck():
    logits, target = some(3, 6)
    logits = logits.float().requires_grad_()
    for items, reduction in ((None, 1), (torch.tensor(4), 1), (None, 0), (None, 2)):
        torch.library.opcheck(
            torch.ops.fastllm.cross_entropy.default, (logits, target, items, -1.0, -100, 0.1, 0.1, 2.0, reduction)
        )
    loss, stats, scale = torch.ops.fastllm.cross_entropy(logits.detach(), target, None, -1.0, -100, 0.1, 0.1, 2.0, 1)
    torch.library.opcheck(
        torch.ops.fastllm.cross_entropy_backward.default,
        (logits.detach(), target, torch.ones_like(loss), stats, scale, -100, 0.1, 0.1, 2.0, 1),
    )


def test_compiles_without_a_graph_break():
    logits, target = some(4, 32, ignored=(2,))
    logits = logits.float().requires_grad_()

    def scaled(x, t, n):
        return cross_entropy(x, t, label_smoothing=0.1, num_items=n) * 2

    compiled = torch.compile(scaled, fullgraph=True)
    for items in (None, torch.tensor(7)):
        losses = [f(logits, target, items) for f in (compiled, scaled)]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


@pytest.mark.parametrize(
    ("arguments", "how", "error", "message"),
    [
        ((torch.ones(2, 4, dtype=torch.int64), torch.zeros(2).long()), {}, TypeError, "logits must be a floating"),
        ((torch.ones(()), torch.zeros(()).long()), {}, ValueError, "logits must have at least 1 dimension"),
        ((torch.ones(2, 4), torch.zeros(2)), {}, TypeError, r"target must hold class indices.*torch.float32"),
        ((torch.ones(2, 4), [0, 1]), {}, TypeError, "target must be a tensor, got list"),
        ((torch.ones(2, 4), torch.zeros(3).long()), {}, ValueError, r"target must have shape \(2,\).*got \(3,\)"),
        ((torch.ones(2, 4), torch.zeros(2, device="meta").long()), {}, ValueError, "target and logits must be on one"),
        ((torch.ones(2, 4), torch.zeros(2).long()), {"label_smoothing": 1.5}, ValueError, "label_smoothing .* got 1.5"),
        ((torch.ones(2, 4), torch.zeros(2).long()), {"z_loss": -1.0}, ValueError, "z_loss .* got -1.0"),
        ((torch.ones(2, 4), torch.zeros(2).long()), {"softcap": 0.0}, ValueError, "softcap .* > 0.0, got 0.0"),
        ((torch.ones(2, 4), torch.zeros(2).long()), {"reduction": "avg"}, ValueError, "reduction .* got 'avg'"),
        ((torch.ones(2, 4), torch.zeros(2).long()), {"num_items": -1}, ValueError, "num_items .* got -1"),
        ((torch.ones(2, 4), torch.zeros(2).long()), {"num_items": torch.ones(2)}, ValueError, "num_items .*one"),
        (
            (torch.ones(2, 4), torch.zeros(2).long()), {"num_items": 3, "reduction": "sum"}, ValueError,
            "num_items replaces the divisor",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, how, error, message):
    with pytest.raises(error, match=message):
        cross_entropy(*arguments, **how)
