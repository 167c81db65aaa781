"""The one table of backends, dtypes and devices, and the one tolerance rule, that every op's tests use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastllm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# (backend, device): the definition and the C++ kernels on the CPU, Triton on a GPU or in the interpreter.
BACKENDS = [("torch", "cpu"), ("cpp", "cpu"), ("triton", DEVICE)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ATOL = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}

each_backend = pytest.mark.parametrize(("backend", "device"), BACKENDS, ids=[b for b, _ in BACKENDS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def assert_close_as_eager(ours: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, what: str = "output") -> None:
    """err(ours) <= 2 err(eager in the same dtype) + atol max(1, max|exact|), against fp64; NaN and inf as eager."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    ours64, eager64, exact = ours.detach().double().cpu(), eager.detach().double().cpu(), exact.detach().cpu()
    finite = exact.isfinite() & eager64.isfinite()
    assert torch.equal(ours64.isnan(), eager64.isnan()), f"{what}: NaN in other places than the definition has them"
    assert torch.equal(ours64[~finite].nan_to_num(), eager64[~finite].nan_to_num()), f"{what}: other infinities"
    if not finite.any():
        return
    bound = 2 * (eager64 - exact)[finite].abs().max() + ATOL[dtype] * exact[finite].abs().max().clamp(min=1)
    error = (ours64 - exact)[finite].abs().max()
    assert error <= bound, f"{what}: error {error:.3g} against fp64, at most {bound:.3g} allowed"


def check_op(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    backend: str,
    device: str = "cpu",
    *,
    reference: Callable[..., Any] | None = None,
    no_grad: Sequence[int] = (),
    keep_dtype: Sequence[int] = (),
) -> None:
    """Compares outputs and every input gradient of function(*inputs) on one backend with fp64, by the tolerance rule.

    Floating inputs are rounded to `dtype` (except positions in `keep_dtype`); the fp64 reference sees the rounded
    values. `reference` is the plain formula in PyTorch, `function`'s own definition where None. `no_grad` lists
    positions without a gradient. Strides of the inputs are kept, so non-contiguous views are tested as such.
    """
    rounded = [
        i.to(dtype) if isinstance(i, Tensor) and i.is_floating_point() and n not in keep_dtype else i
        for n, i in enumerate(inputs)
    ]
    needs = [isinstance(i, Tensor) and i.is_floating_point() and n not in no_grad for n, i in enumerate(rounded)]

    def run(f: Callable[..., Any], cast: Callable[[Tensor], Tensor], backend: str) -> tuple[list[Tensor], list[Tensor]]:
        arguments = [cast(i) if isinstance(i, Tensor) else i for i in rounded]
        arguments = [a.detach().requires_grad_() if n else a for a, n in zip(arguments, needs)]
        with fastllm.use_backend(backend):
            outputs = f(*arguments)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        generator = torch.Generator().manual_seed(7)
        scalar = sum(
            (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum()
            for o in outputs
            if o.requires_grad
        )
        wanted = [a for a, n in zip(arguments, needs) if n]
        grads = torch.autograd.grad(scalar, wanted) if wanted and isinstance(scalar, Tensor) else []
        return outputs, list(grads)

    exact = run(reference or function, lambda t: t.double() if t.is_floating_point() else t, "torch")
    eager = run(function, lambda t: t, "torch")
    ours = run(function, lambda t: t.to(device), backend)
    positions = [n for n, need in enumerate(needs) if need]
    for kind, a, b, c in [("output", *x) for x in zip(ours[0], eager[0], exact[0])]:
        assert a.dtype == b.dtype, f"{kind}: dtype {a.dtype}, the definition has {b.dtype}"
        assert_close_as_eager(a, b, c, dtype, kind)
    for position, a, b, c in zip(positions, ours[1], eager[1], exact[1]):
        assert_close_as_eager(a, b, c, dtype, f"gradient of input {position}")
