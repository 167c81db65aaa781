"""Rotary embedding with angles computed inside the kernel, right at any position (arXiv 2104.09864, eq. 34)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm import backends
from fastllm.ops import _check
from fastllm.ops._op import Op
from fastllm.ops.apply_rope import check_heads, check_rotated, fake_output, rotate


def rope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    *,
    attention_factor: float = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """``apply_rope`` with angle ``position_ids * inv_freq``; no table of cosines exists in memory.

    The angle is reduced in double precision, so its error does not grow with the position: below 1e-6 rad at position
    4,000,000, where a product in fp32 is off by 0.1 rad.

    Args:
        q: (B, H, L, D). k: (B, K, L, D). As in ``apply_rope``.
        position_ids: (B or 1, L), an integer tensor.
        inv_freq: (R / 2,), radians per position of each pair, floating; R at most D. A constant: where it requires a
            gradient the definition serves.
        attention_factor: multiplies cosines and sines (YaRN, LongRoPE).
        interleaved: pairs (2i, 2i + 1) instead of (i, i + R/2).

    Returns:
        The rotated q and k in their dtypes and memory order.

    Raises:
        TypeError: a tensor has the wrong kind of dtype. ValueError: shapes, dtypes or devices do not match, or R > D.
    """
    check_heads(q, k)
    _check.is_tensor("position_ids", position_ids)
    if position_ids.is_floating_point() or position_ids.is_complex() or position_ids.dtype == torch.bool:
        raise TypeError(f"position_ids must be an integer tensor, got dtype {position_ids.dtype}")
    if position_ids.dim() != 2 or position_ids.shape[1] != q.shape[2] or position_ids.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"position_ids must have shape (1 or {q.shape[0]}, {q.shape[2]}), got {tuple(position_ids.shape)}"
        )
    _check.is_floating("inv_freq", inv_freq)
    if inv_freq.dim() != 1:
        raise ValueError(f"inv_freq must have shape (R / 2,), got {tuple(inv_freq.shape)}")
    check_rotated("inv_freq", 2 * inv_freq.shape[0], q)
    _check.same_device("position_ids", position_ids, "q", q)
    _check.same_device("inv_freq", inv_freq, "q", q)
    arguments = (q, k, position_ids.long(), inv_freq, attention_factor, interleaved, False)
    if inv_freq.requires_grad and torch.is_grad_enabled():
        backends.by_definition("rope", "kernels have no gradient for inv_freq")
        return _definition(*arguments)
    return _rope(*arguments)


def _definition(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    attention_factor: float,
    interleaved: bool,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    angles = position_ids.double().unsqueeze(-1) * inv_freq.double()
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    cos, sin = ((f(angles) * attention_factor).to(wide).unsqueeze(1) for f in (torch.cos, torch.sin))
    return rotate(q, cos, sin, interleaved, transposed), rotate(k, cos, sin, interleaved, transposed)


def _fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return fake_output(q), fake_output(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, position_ids, inv_freq, *ctx.rest, ctx.transposed = inputs
    ctx.save_for_backward(position_ids, inv_freq)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    grads = _rope(grad_q, grad_k, *ctx.saved_tensors, *ctx.rest, not ctx.transposed)
    return *grads, None, None, None, None, None


_rope = Op(
    "rope(Tensor q, Tensor k, Tensor position_ids, Tensor inv_freq, float attention_factor, bool interleaved,"
    " bool transposed) -> (Tensor, Tensor)",
    _definition,
    fake=_fake,
    triton="rope:rope",
    save=_save,
    backward=_backward,
    public=["rope"],
    constants=["inv_freq"],
)
