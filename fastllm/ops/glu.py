"""Gated linear units (Shazeer, arXiv 2002.05202): an activation of one projection times another."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops._op import Op, vjp

# The values of the op's `activation`, known by number to every kernel.
SILU, GELU_TANH, GELU_ERF = 0, 1, 2
_GELU = {"tanh": GELU_TANH, "none": GELU_ERF}


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` with ``silu(z) = z / (1 + exp(-z))``.

    Args:
        gate, up: (..., C) of one shape, float32, bfloat16 or float16; float64 is served by the definition. They may be
            the halves of one fused projection, ``gate_up.chunk(2, -1)``: rows are read where they lie.

    Returns:
        (..., C), contiguous, in the promoted dtype of gate and up. The activation and the product are computed in
        float32 and rounded once. Differentiable in gate and up, any number of times.

    Raises:
        TypeError: gate or up is not a floating-point tensor.
        ValueError: their shapes or devices differ.
    """
    return _gated(gate, up, SILU)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """``gelu(gate) * up``, gelu as ``torch.nn.functional.gelu`` has it (Hendrycks and Gimpel, arXiv 1606.08415).

    Args:
        gate, up: as for ``swiglu``.
        approximate: ``"tanh"`` for ``z / 2 * (1 + tanh(sqrt(2 / pi) * (z + 0.044715 z³)))``, ``"none"`` for
            ``z / 2 * (1 + erf(z / sqrt(2)))``.

    Returns:
        As ``swiglu``.

    Raises:
        TypeError: gate or up is not a floating-point tensor.
        ValueError: their shapes or devices differ, or approximate is another word.
    """
    activation = _GELU.get(approximate)
    if activation is None:
        _check.one_of("approximate", approximate, tuple(_GELU))
    return _gated(gate, up, activation)


def _gated(gate: Tensor, up: Tensor, activation: int | None) -> Tensor:
    _check.is_floating("gate", gate)
    _check.is_floating("up", up)
    if up.shape != gate.shape:
        _check.has_shape("up", up, gate.shape, "that of gate")
    _check.same_device("up", up, "gate", gate)
    if gate.dtype != up.dtype:
        dtype = torch.promote_types(gate.dtype, up.dtype)
        gate, up = gate.to(dtype), up.to(dtype)
    return _glu(gate, up, activation)


def _definition(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    z = gate.to(wide)
    if activation == SILU:
        activated = F.silu(z)
    elif activation == GELU_TANH:
        activated = F.gelu(z, approximate="tanh")
    else:
        activated = torch.where(z == torch.inf, z, F.gelu(z))  # F.gelu(inf) is NaN on some CPUs
    return (activated * up.to(wide)).to(gate.dtype).contiguous()


def _fake(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _backward_definition(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    grads = vjp(_definition, (gate, up, activation), (grad,))[:2]  # None: frozen, where a further derivative is taken
    return tuple(None if g is None else g.contiguous() for g in grads)  # type: ignore[return-value]


def _backward_fake(grad: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (gate, up))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gate, up = ctx.saved_tensors
    return *_glu_backward(grad, gate, up, ctx.activation), None


_glu = Op(
    "glu(Tensor gate, Tensor up, int activation) -> Tensor",
    _definition,
    fake=_fake,
    triton="glu:forward",
    save=_save,
    backward=_backward,
    public=["swiglu", "geglu"],
)
_glu_backward = Op(
    "glu_backward(Tensor grad, Tensor gate, Tensor up, int activation) -> (Tensor grad_gate, Tensor grad_up)",
    _backward_definition,
    fake=_backward_fake,
    triton="glu:backward",
)
