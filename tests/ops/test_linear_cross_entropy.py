import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import fastllm
from fastllm.ops import _linear_rows, linear_cross_entropy
from tests.ops.harness import check_op, each_backend, each_dtype


def plain(
    hidden, weight, target, bias=None, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None,
    logit_scale=1.0, reduction="mean", num_items=None,
):  # fmt: skip
    z = F.linear(hidden, weight, bias) * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    losses = F.cross_entropy(z, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    kept = target != ignore_index
    losses = losses + (z_loss * z.logsumexp(-1).square() * kept if z_loss else 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (num_items if num_items is not None else kept.sum().clamp(min=1))


def operands(tokens=23, channels=16, classes=97, ignored=0.3):
    hidden = torch.randn(tokens, channels, dtype=torch.float64)
    weight = torch.randn(classes, channels, dtype=torch.float64) * 0.5
    target = torch.randint(0, classes, (tokens,)).masked_fill(torch.rand(tokens) < ignored, -100)
    return hidden, weight, target, torch.randn(classes, dtype=torch.float64)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of tokens and of classes, the last ones short."""
    monkeypatch.setattr(_linear_rows, "BUFFER_BYTES", {"cpu": 97 * 4 * 7, "cuda": 97 * 4 * 7})
    monkeypatch.setattr(_linear_rows, "CPU_CLASSES", 40)
    monkeypatch.setattr(_linear_rows, "SUM_ROWS", 3)


OPTIONS = [  # and whether there is a bias
    (False, {}),
    (True, {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 3.0, "logit_scale": 0.7}),
    (True, {"reduction": "sum"}),
    (False, {"reduction": "none"}),
    (True, {"reduction": "none", "softcap": 5.0, "label_smoothing": 0.2}),
    (False, {"num_items": 50}),
    (True, {"num_items": torch.tensor(31.0), "logit_scale": 2.0}),
]


@each_backend
@each_dtype
@pytest.mark.parametrize(
    ("with_bias", "options"), OPTIONS, ids=["-".join(["bias"] * b + [*o]) or "plain" for b, o in OPTIONS]
)
def test_matches_the_formula_in_fp64_forward_and_backward(small_chunks, backend, device, dtype, options, with_bias):
    hidden, weight, target, bias = operands()
    inputs = [hidden, weight, target, bias] if with_bias else [hidden, weight, target]

    def ours(hidden, weight, target, bias=None):
        return linear_cross_entropy(hidden, weight, target, bias=bias, **options)

    check_op(ours, inputs, dtype, backend, device, reference=lambda *a: plain(*a, **options))


@pytest.mark.parametrize("ignored", [0.0, 0.05, 0.9])
def test_rows_that_are_skipped_and_rows_that_are_not_agree(small_chunks, ignored):
    hidden, weight, target, bias = operands(ignored=ignored)
    check_op(
        lambda h, w, t, b: linear_cross_entropy(h, w, t, bias=b), [hidden, weight, target, bias], torch.float32, "cpp"
    )
    check_op(
        lambda h, w, t, b: linear_cross_entropy(h, w, t, bias=b, reduction="none"),
        [hidden, weight, target, bias], torch.float32, "cpp",
    )  # fmt: skip


@each_backend
def test_no_target_left_gives_zero_loss_and_zero_gradients(backend, device):
    hidden, weight, _, bias = (
        t.float().to(device).requires_grad_() if t.is_floating_point() else t for t in operands()
    )
    target = torch.full((23,), -100, device=device)
    with torch.no_grad():
        hidden[3] = float("nan")  # an ignored row does not reach anything
    with fastllm.use_backend(backend):
        loss = linear_cross_entropy(hidden, weight, target, bias=bias)
        loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    assert not bias.grad.any()


@pytest.mark.parametrize("shape", [(0, 8, 5), (3, 8, 1), (1, 1, 1), (3, 0, 1)])
def test_degenerate_sizes(shape):
    tokens, channels, classes = shape
    hidden, weight = (
        torch.randn(tokens, channels, requires_grad=True),
        torch.randn(classes, channels, requires_grad=True),
    )
    loss = linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.long))
    loss.backward()
    assert loss == 0
    assert hidden.grad.shape == hidden.shape
    assert not weight.grad.any()


def test_a_frozen_operand_gets_no_gradient_and_the_other_the_same():
    hidden, weight, target, _ = operands()
    hidden, weight = hidden.float(), weight.float()
    both = torch.autograd.grad(
        linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_(), target), (hidden, weight)
    )
    alone = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), target), hidden)
    torch.testing.assert_close(alone[0], both[0])
    alone = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, target), weight)
    torch.testing.assert_close(alone[0], both[1])


@each_backend
def test_what_an_ignored_row_holds_reaches_nothing(small_chunks, backend, device):
    hidden, weight, target, _ = operands()
    hidden, weight = hidden.float().to(device), weight.float().to(device)
    found = []
    for garbage in (0.0, float("nan"), float("inf")):
        h = hidden.masked_fill((target == -100).to(device).unsqueeze(-1), garbage).requires_grad_()
        w = weight.clone().requires_grad_()
        with fastllm.use_backend(backend):
            loss = linear_cross_entropy(h, w, target.to(device), z_loss=0.1)
            found.append((loss.detach(), *torch.autograd.grad(loss, (h, w))))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_only_the_gradients_that_are_wanted_are_computed(monkeypatch):
    hidden, weight, target, _ = operands()
    hidden, weight = hidden.float(), weight.float()
    seen = []
    sweep = _linear_rows._sweep

    def spy(*args):
        seen.append(tuple(args[-2]))
        return sweep(*args)

    monkeypatch.setattr(_linear_rows, "_sweep", spy)
    linear_cross_entropy(hidden, weight, target)
    linear_cross_entropy(hidden.requires_grad_(), weight, target)
    with torch.no_grad():
        linear_cross_entropy(hidden, weight, target)
    linear_cross_entropy(hidden, weight.requires_grad_(), target, reduction="none")
    assert seen == [(False,) * 3, (True, False, False), (False,) * 3, (False,) * 3]


def test_an_operand_that_was_frozen_when_the_flags_were_set_still_gets_its_gradient():
    hidden, weight, target, bias = operands()
    hidden, weight, bias = (t.float().requires_grad_() for t in (hidden, weight, bias))
    how = (target, bias, None, -1.0, -100, 0.0, 0.0, 0.0, 1.0, 1)
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, target, bias=bias), (hidden, weight, bias))
    for flags in ((False,) * 3, (True, False, True)):
        loss = torch.ops.fastllm.linear_cross_entropy(hidden, weight, *how, *flags)[0]
        torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight, bias)), expected)


def test_compiled_without_gradients_and_with_a_frozen_weight():
    hidden, weight, target, _ = operands()
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(hidden, weight, target), linear_cross_entropy(hidden, weight, target))
    (expected,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), hidden)
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden, weight, target), hidden)[0], expected)


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.integers(0, 100_000), channels=st.integers(1, 8192), classes=st.integers(1, 300_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), retain=st.booleans(),
)  # fmt: skip
def test_a_chunk_is_never_all_logits_unless_they_are_few(tokens, channels, classes, dtype, retain):
    weight = torch.empty(1, 1, dtype=dtype).expand(classes, channels)
    size, step = _linear_rows._chunk(tokens, weight, retain, True)
    held = size * (classes if retain else step)
    assert held < max(tokens, 1) * classes or held * dtype.itemsize <= _linear_rows.SPLIT_BYTES
    row = classes if retain else step
    most = _linear_rows.BUFFER_BYTES["cpu"]
    if dtype != torch.float32:
        most = max(most, weight.numel()) + 4 * weight.numel() * (2 * size >= tokens)
    assert held * dtype.itemsize <= max(most, row * dtype.itemsize)
    assert size >= 1
    assert step >= 1


def test_a_tied_weight_adds_both_of_its_gradients():
    weight = torch.randn(50, 8, requires_grad=True)
    ids = torch.randint(0, 50, (12,))
    loss = linear_cross_entropy(F.embedding(ids, weight), weight, ids.roll(-1))
    expected = F.cross_entropy(F.embedding(ids, weight) @ weight.T, ids.roll(-1))
    torch.testing.assert_close(torch.autograd.grad(loss, weight), torch.autograd.grad(expected, weight))


def test_accumulated_micro_batches_equal_the_batch():
    hidden, weight, target, _ = operands(tokens=24)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    items = (target != -100).sum()
    whole = torch.autograd.grad(linear_cross_entropy(hidden, weight, target), (hidden, weight))
    parts = sum(linear_cross_entropy(h, weight, t, num_items=items) for h, t in zip(hidden.split(5), target.split(5)))
    torch.testing.assert_close(torch.autograd.grad(parts, (hidden, weight)), whole)


def test_autocast_computes_in_its_dtype_and_gradients_keep_the_parameters():
    hidden, weight, target, _ = operands()
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, target)
        expected = F.cross_entropy(F.linear(hidden, weight).float(), target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=1e-2)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_fp16_gradients_survive_a_loss_scale():
    hidden, weight, target, _ = operands(tokens=64, classes=4000, ignored=0)
    h16, w16 = hidden.half().requires_grad_(), (weight * 0.02).half().requires_grad_()
    scale = 2.0**16
    got = torch.autograd.grad(linear_cross_entropy(h16, w16, target) * scale, (h16, w16))
    h, w = h16.detach().double().requires_grad_(), w16.detach().double().requires_grad_()
    want = torch.autograd.grad(plain(h, w, target) * scale, (h, w))
    for a, b in zip(got, want):
        assert (a.double() - b).norm() / b.norm() < 2e-3


def test_fp16_weight_gradients_add_up_past_the_range_of_fp16():
    hidden = torch.randn(8192, 8)
    hidden[:, 0] = 20.0
    weight = torch.randn(64, 8) * 0.02
    target = torch.zeros(8192, dtype=torch.long)
    h16, w16 = hidden.half(), weight.half().requires_grad_()
    (got,) = torch.autograd.grad(linear_cross_entropy(h16, w16, target), w16)
    w = w16.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(plain(h16.double(), w, target), w)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=1e-3)


def test_batched_gradients():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    grads = torch.tensor([1.0, -2.0, 0.5])
    loss = linear_cross_entropy(hidden, weight, torch.arange(6))
    (expected,) = torch.autograd.grad(loss, weight, retain_graph=True)
    for retain in (True, False):
        (found,) = torch.autograd.grad(loss, weight, grads, is_grads_batched=True, retain_graph=retain)
        torch.testing.assert_close(found, grads[:, None, None] * expected)


def test_derivatives_of_any_order():
    hidden, weight, target, bias = operands(tokens=4, channels=3, classes=5)
    arguments = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    for reduction in ("mean", "none"):
        f = lambda h, w, b: linear_cross_entropy(h, w, target, bias=b, softcap=3.0, reduction=reduction)  # noqa: B023, E731
        torch.autograd.gradcheck(f, arguments)
        torch.autograd.gradgradcheck(f, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_through_the_kernel(reduction):
    hidden, weight, target, _ = operands(tokens=6, channels=4, classes=9)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            loss = linear_cross_entropy(hidden, weight, target, reduction=reduction).square().sum()
            (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        found[backend] = torch.autograd.grad(grad.square().sum(), (hidden, weight))
    torch.testing.assert_close(found["cpp"], found["torch"])


def test_two_backward_passes_and_checkpointing_agree():
    hidden, weight, target, _ = operands()
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    loss = linear_cross_entropy(hidden, weight, target)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    for g in torch.autograd.grad(loss * 3, (hidden, weight), retain_graph=True):
        g.zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), first, rtol=0, atol=0)
    for reentrant in (False, True):
        loss = checkpoint(linear_cross_entropy, hidden, weight, target, use_reentrant=reentrant)
        hidden.grad = weight.grad = None
        loss.backward()
        torch.testing.assert_close((hidden.grad, weight.grad), first)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(reduction):
    hidden, weight, target, _ = operands()
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    f = lambda h, w: linear_cross_entropy(h, w, target, reduction=reduction).sum()  # noqa: E731
    compiled = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(compiled(hidden, weight), f(hidden, weight))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(f(hidden, weight), (hidden, weight)),
    )


@pytest.mark.parametrize("reduction", [0, 1])
def test_opcheck(reduction):
    hidden, weight, target, bias = operands(tokens=5)
    hidden, weight, bias = (t.float().requires_grad_() for t in (hidden, weight, bias))
    torch.library.opcheck(
        torch.ops.fastllm.linear_cross_entropy.default,
        (hidden, weight, target, bias, None, -1.0, -100, 0.0, 0.0, 0.0, 1.0, reduction, True, True, True),
    )
    hidden, weight, bias = (t.detach() for t in (hidden, weight, bias))
    stats = torch.stack([torch.zeros(5), torch.ones(5), *torch.zeros(3, 5)])
    torch.library.opcheck(
        torch.ops.fastllm.linear_rows_backward.default,
        (hidden, weight, target, bias, stats, torch.ones(5), None, -100, 0.0, 0.0, 0.0, 1.0, 1.0, True, True, True),
    )


MEMORY = """
import resource, torch
from fastllm.ops import linear_cross_entropy
hidden = torch.randn(4096, 128, requires_grad=True)
weight = torch.randn(32000, 128, requires_grad=True)
target = torch.randint(0, 32000, (4096,))
linear_cross_entropy(hidden[:64], weight, target[:64]).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_cross_entropy(hidden, weight, target).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_the_logits_are_never_stored_whole():
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    extra = float(done.stdout)  # MB; the logits alone are 500
    assert extra < 160, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(4, 3)}, ValueError, r"weight must have shape \(V, 3\)"),
        ({"hidden": torch.ones(4, 8, dtype=torch.long)}, TypeError, "hidden must be a floating-point tensor"),
        ({"weight": torch.ones(5, 8, dtype=torch.bfloat16)}, ValueError, "hidden and weight must have one dtype"),
        ({"target": torch.zeros(3, dtype=torch.long)}, ValueError, r"target must have shape \(4,\)"),
        ({"target": torch.zeros(4)}, TypeError, "target must hold class indices"),
        ({"target": torch.tensor([0, 1, 5, 2])}, IndexError, r"target must lie in \[0, 5\).*got 5"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(5,\)"),
        ({"softcap": 0.0}, ValueError, "softcap must be"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be"),
        ({"reduction": "avg"}, ValueError, "reduction must be one of"),
        ({"reduction": "sum", "num_items": 3}, ValueError, "num_items replaces the divisor"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale must be"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {"hidden": torch.ones(4, 8), "weight": torch.ones(5, 8), "target": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(error, match=message):
        linear_cross_entropy(**{**good, **change})
