import math

import pytest
import torch

import fastllm
from fastllm.ops import apply_rope, rope
from tests.ops.harness import check_op, each_backend, each_dtype


def frequencies(rotated):
    return 10000.0 ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)


@each_backend
@each_dtype
@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_apply_rope_with_exact_tables(backend, device, dtype, interleaved):
    q, k = torch.randn(2, 4, 9, 24, dtype=torch.float64), torch.randn(2, 2, 9, 24, dtype=torch.float64)
    inv_freq = frequencies(20).float()
    for positions in (torch.arange(9)[None] + 1000, torch.randint(0, 100_000, (2, 9))):
        angles = positions.double().unsqueeze(-1) * inv_freq.double()
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)

        def reference(q, k, positions, inv_freq, angles=angles):
            return apply_rope(q, k, angles.cos() * 1.25, angles.sin() * 1.25, interleaved=interleaved)

        check_op(
            lambda *a: rope(*a, attention_factor=1.25, interleaved=interleaved), [q, k, positions, inv_freq],
            dtype, backend, device,
            reference=reference, no_grad=[3], keep_dtype=[3],
        )  # fmt: skip


@each_backend
def test_the_phase_is_exact_at_position_four_million(backend, device):
    positions = torch.tensor([[4_000_000, 3_999_999, 4_194_303, 1]], device=device)
    inv_freq = frequencies(64).float()
    q = torch.zeros(1, 1, 4, 64, device=device)
    q[..., :32] = 1.0  # pairs (1, 0) turn into (cos, sin)
    with fastllm.use_backend(backend):
        y = rope(q, q, positions, inv_freq.to(device))[0].double().cpu()
    exact = positions.cpu().double().unsqueeze(-1) * inv_freq.double()
    phase = torch.atan2(y[0, 0, :, 32:], y[0, 0, :, :32])
    error = torch.remainder(phase - exact[0] + math.pi, 2 * math.pi) - math.pi
    assert error.abs().max() < 1e-6


@each_backend
def test_inv_freq_in_double_precision_is_not_rounded(backend, device):
    positions, inv_freq = torch.tensor([[4_000_000, 1_234_567]], device=device), frequencies(64).double().to(device)
    q = torch.randn(1, 2, 2, 64, device=device)
    with fastllm.use_backend(backend):
        found = rope(q, q, positions, inv_freq)[0]
    torch.testing.assert_close(found.double(), rope(q.double(), q.double(), positions, inv_freq)[0], rtol=0, atol=2e-6)


def test_inv_freq_that_requires_a_gradient_gets_the_definitions():
    q = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    inv_freq = frequencies(4).requires_grad_()
    torch.autograd.gradcheck(lambda f: rope(q, q, torch.arange(3)[None], f), (inv_freq,))


def test_opcheck_and_compile():
    q, k = torch.randn(2, 2, 3, 6, requires_grad=True), torch.randn(2, 1, 3, 6, requires_grad=True)
    positions, inv_freq = torch.arange(3)[None], frequencies(4).float()
    torch.library.opcheck(torch.ops.fastllm.rope.default, (q, k, positions, inv_freq, 1.0, False, False))
    compiled = torch.compile(lambda q, k: rope(q, k, positions, inv_freq), fullgraph=True)
    torch.testing.assert_close(compiled(q, k), rope(q, k, positions, inv_freq))


def test_zero_tokens():
    q = torch.randn(2, 3, 0, 8)
    assert rope(q, q, torch.zeros(1, 0, dtype=torch.long), frequencies(8).float())[0].shape == q.shape


@pytest.mark.parametrize(
    ("positions", "inv_freq", "error", "message"),
    [
        (torch.ones(1, 3), torch.ones(4), TypeError, "position_ids must be an integer tensor, got dtype torch.float32"),
        (
            torch.ones(3, dtype=torch.long),
            torch.ones(4),
            ValueError,
            r"position_ids must have shape \(1 or 1, 3\), got \(3,\)",
        ),
        (torch.ones(1, 3, dtype=torch.long), torch.ones(4, 1), ValueError, r"inv_freq must have shape \(R / 2,\)"),
        (
            torch.ones(1, 3, dtype=torch.long),
            torch.ones(5),
            ValueError,
            "inv_freq must rotate .* at most D = 8, got 10",
        ),
    ],
)
def test_bad_arguments_are_named(positions, inv_freq, error, message):
    with pytest.raises(error, match=message):
        rope(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), positions, inv_freq)
