import pytest
import torch
import torch.nn.functional as F

import fastllm
from fastllm.ops import _linear_rows, linear_token_logprobs, token_logprobs
from tests.ops.harness import check_op, each_backend, each_dtype


def operands(tokens=(3, 7), channels=16, classes=97):
    hidden = torch.randn(*tokens, channels, dtype=torch.float64)
    weight = torch.randn(classes, channels, dtype=torch.float64) * 0.5
    return hidden, weight, torch.randint(0, classes, tokens), torch.randn(classes, dtype=torch.float64)


def plain(hidden, weight, target, bias, temperature, softcap, logit_scale, with_entropy):
    z = F.linear(hidden, weight, bias) * logit_scale
    z = (softcap * torch.tanh(z / softcap) if softcap else z) / temperature
    logp = z.log_softmax(-1)
    chosen = logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return (chosen, -(logp.exp() * logp).sum(-1)) if with_entropy else chosen


@each_backend
@each_dtype
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize(("temperature", "softcap", "logit_scale"), [(1.0, None, 1.0), (0.7, 4.0, 1.5)])
def test_matches_the_formula_in_fp64(
    monkeypatch, backend, device, dtype, with_entropy, temperature, softcap, logit_scale
):
    monkeypatch.setattr(_linear_rows, "BUFFER_BYTES", {"cpu": 97 * 4 * 7, "cuda": 97 * 4 * 7})
    monkeypatch.setattr(_linear_rows, "CPU_CLASSES", 40)
    monkeypatch.setattr(_linear_rows, "SUM_ROWS", 3)
    options = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale, "with_entropy": with_entropy}
    check_op(
        lambda h, w, t, b: linear_token_logprobs(h, w, t, bias=b, **options), list(operands()), dtype, backend, device,
        reference=lambda *a: plain(*a, **options),
    )  # fmt: skip


def test_equals_token_logprobs_of_the_logits():
    hidden, weight, target, _ = (t.float() if t.is_floating_point() else t for t in operands())
    torch.testing.assert_close(linear_token_logprobs(hidden, weight, target), token_logprobs(hidden @ weight.T, target))


def test_derivatives_of_any_order():
    hidden, weight, target, bias = operands((2, 2), 3, 5)
    arguments = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    f = lambda h, w, b: linear_token_logprobs(h, w, target, bias=b, with_entropy=True)  # noqa: E731
    torch.autograd.gradcheck(f, arguments)
    torch.autograd.gradgradcheck(f, arguments)


def test_second_derivative_and_frozen_weight():
    hidden, weight, target, _ = operands()
    hidden, weight = hidden.float().requires_grad_(), weight.float()
    found = {}
    for backend in ("cpp", "torch"):
        with fastllm.use_backend(backend):
            (grad,) = torch.autograd.grad(
                linear_token_logprobs(hidden, weight, target).exp().sum(), hidden, create_graph=True
            )
        found[backend] = torch.autograd.grad(grad.square().sum(), hidden)
    torch.testing.assert_close(found["cpp"], found["torch"])


def test_opcheck_and_compile():
    hidden, weight, target, _ = operands((5,))
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_()
    torch.library.opcheck(
        torch.ops.fastllm.linear_token_logprobs.default, (hidden, weight, target, None, 0.0, 1.0, 1.0, True)
    )
    f = lambda h, w: sum(t.sum() for t in linear_token_logprobs(h, w, target, with_entropy=True))  # noqa: E731
    compiled = torch.compile(f, fullgraph=True)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(hidden, weight), (hidden, weight)),
        torch.autograd.grad(f(hidden, weight), (hidden, weight)),
    )


def test_no_tokens():
    hidden, weight = torch.randn(2, 0, 4), torch.randn(5, 4)
    assert linear_token_logprobs(hidden, weight, torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"softcap": -1.0}, ValueError, "softcap must be"),
        ({"target": torch.full((4,), -100)}, IndexError, r"target must lie in \[0, 5\).*got -100"),
        ({"weight": torch.ones(5)}, ValueError, r"weight must have shape \(V, 8\)"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = {"hidden": torch.ones(4, 8), "weight": torch.ones(5, 8), "target": torch.zeros(4, dtype=torch.long)}
    with pytest.raises(error, match=message):
        linear_token_logprobs(**{**good, **change})
