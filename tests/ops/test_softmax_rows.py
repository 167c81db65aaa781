"""The kernels under the cross entropies and log-probabilities, as the fused linear losses use them: chunk by chunk."""

import pytest
import torch

import fastllm
from fastllm.ops import _softmax_rows as rows
from tests.ops.harness import assert_close_as_eager, each_backend, each_dtype

CHUNKS = [(0, 100), (100, 101), (101, 700)]
CHAINS = {"plain": (False, 1.0, 0.0, 1.0), "all": (True, 0.5, 5.0, 0.8)}  # bias, logit_scale, softcap, temperature


def some(dtype=torch.float32, device="cpu"):
    logits, bias = (torch.randn(9, 700) * 3).to(device, dtype), torch.randn(700).to(device, dtype)
    target = torch.randint(0, 700, (9,))
    target[0], target[1], target[2], target[3] = 0, 100, -100, 699
    return logits, bias, target.to(device)


def in_chunks(logits, target, bias, chain):
    stats = None
    for begin, end in CHUNKS:
        b = None if bias is None else bias[begin:end]
        stats = rows.statistics(logits[:, begin:end], target, b, stats, begin, -100, *chain, True, True)
    return stats


def reference(logits, target, bias, chain, grad, grad_entropy):
    """The losses, log-probabilities and entropies, and the gradient of their weighted sum, in fp64."""
    u = logits.double().cpu().requires_grad_()
    s = rows.transform(u, None if bias is None else bias.double().cpu(), *chain)
    logp, target = s.log_softmax(-1), target.cpu()
    kept = (target != -100).double()
    chosen = rows.pick(logp, target.clamp(min=0)) * kept
    entropy = -(logp.exp() * logp).sum(-1) * kept
    losses = (-0.9 * chosen - 0.1 * logp.mean(-1) + 0.01 * s.logsumexp(-1).square()) * kept
    total = (losses * grad.double().cpu()).sum() + (entropy * grad_entropy.double().cpu()).sum()
    return [x.detach() for x in (losses, chosen, entropy, *torch.autograd.grad(total, u))]


@each_backend
@each_dtype
@pytest.mark.parametrize("chain", CHAINS)
def test_chunks_of_the_vocabulary_give_what_whole_rows_give(backend, device, dtype, chain):
    has_bias, *chain = CHAINS[chain]
    logits, bias, target = some(dtype, device)
    bias = bias if has_bias else None
    grad, grad_entropy = torch.randn(9, device=device), torch.randn(9, device=device)
    losses, logprobs, entropy, gradient = reference(logits, target, bias, chain, grad, grad_entropy)
    found = {}
    for name in ("torch", backend):
        with fastllm.use_backend(name):
            whole = rows.statistics(logits, target, bias, None, 0, -100, *chain, True, True)
            merged = in_chunks(logits, target, bias, chain)
            buffer = torch.full((9, 704), 7.0, dtype=dtype, device=device)  # rows further apart than they are long
            buffer[:, :700] = logits
            for begin, end in CHUNKS:
                rows.gradient_(
                    buffer[:, begin:end], target, None if bias is None else bias[begin:end], merged, grad, grad_entropy,
                    begin, 700, -100, *chain, 0.1, 0.01,
                )  # fmt: skip
        torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)
        assert (buffer[:, 700:] == 7.0).all()
        found[name] = [
            rows.losses(merged, target, 700, -100, 0.1, 0.01),
            rows.logprobs(merged).where(target != -100, 0.0),
            rows.entropy(merged),
            buffer[:, :700],
        ]
    what = ("losses", "log-probabilities", "entropy", "gradient")
    for ours, eager, exact, name in zip(found[backend], found["torch"], (losses, logprobs, entropy, gradient), what):
        assert_close_as_eager(ours, eager, exact, dtype, name)


@each_backend
def test_a_chunk_of_minus_infinities_changes_nothing(backend, device):
    logits, _, target = some(device=device)
    logits[:, 100:] = float("-inf")
    logits[4] = float("-inf")
    target[:] = 5
    with fastllm.use_backend(backend):
        forward = in_chunks(logits, target, None, CHAINS["plain"][1:])
        first = rows.statistics(logits[:, 101:], target, None, None, 101, -100, 1.0, 0.0, 1.0, False, True)
        backward = rows.statistics(logits[:, :101], target, None, first, 0, -100, 1.0, 0.0, 1.0, False, True)
    alone = logits[:, :100].cpu().double().log_softmax(-1)
    for stats in (forward, backward):
        torch.testing.assert_close(rows.logprobs(stats).cpu().double(), alone[:, 5], equal_nan=True)
        expected = -(alone.exp() * alone).sum(-1)
        torch.testing.assert_close(rows.entropy(stats).cpu().double(), expected, equal_nan=True)


@each_backend
def test_ignored_rows_are_not_read_and_get_zero(backend, device):
    logits, _, target = some(device=device)
    logits[2] = float("nan")
    with fastllm.use_backend(backend):
        stats = rows.statistics(logits, target, None, None, 0, -100, 1.0, 0.0, 1.0, True, True)
        rows.gradient_(
            logits,
            target,
            None,
            stats,
            torch.ones((), device=device).expand(9),
            None,
            0,
            700,
            -100,
            1.0,
            0.0,
            1.0,
            0.1,
            0.0,
        )
    assert stats[:, 2].tolist() == [0, 1, 0, 0, 0]
    assert torch.equal(logits[2], torch.zeros_like(logits[2]))
    assert logits.isfinite().all()


def test_divisor_counts_or_takes_num_items():
    target = torch.tensor([1, -100, 2, 3])
    assert rows.divisor(target, -100, None).item() == 3
    assert rows.divisor(target, -100, 7).item() == 7
    assert rows.divisor(target, -100, torch.tensor([7])).item() == 7
    assert rows.divisor(target.fill_(-100), -100, 7).item() == float("inf")


def test_opcheck():
    logits, bias, target = some()
    arguments = (logits, target, bias, None, 0, -100, 0.5, 2.0, 0.8, True, True)
    torch.library.opcheck(torch.ops.fastllm.softmax_statistics.default, arguments)
    stats = rows.statistics(*arguments)
    torch.library.opcheck(torch.ops.fastllm.softmax_statistics.default, (*arguments[:3], stats, 700, *arguments[5:]))
    torch.library.opcheck(
        torch.ops.fastllm.softmax_gradient_.default,
        (logits, target, bias, stats, torch.ones(9), torch.ones(9), 0, 700, -100, 0.5, 2.0, 0.8, 0.1, 0.1),
    )
