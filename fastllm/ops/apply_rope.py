"""Rotary position embedding from tables (arXiv 2104.09864, eq. 34; Transformers' ``apply_rotary_pos_emb``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastllm import backends
from fastllm.ops import _check
from fastllm.ops._op import Op


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Rotates the first R of the D dimensions of each head; the others pass through.

    Half-split (GPT-NeoX, Llama): dimension i < R/2 pairs with i + R/2. Interleaved (GPT-J): 2i with 2i + 1. A pair
    (x1, x2) becomes (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2), each element with its own table entry.

    Args:
        q: (B, H, L, D). k: (B, K, L, D). float32, bfloat16, float16 (float64: the definition), one dtype; any strides.
        cos, sin: (B or 1, L, R), R even and at most D, one value per rotated dimension in the layout's own order, in
            float32 or any other floating dtype. Constants: where one requires a gradient the definition serves.

    Returns:
        The rotated q and k in their dtypes and memory order; computed in fp32 and rounded once.

    Raises:
        TypeError: a tensor is not floating-point. ValueError: shapes, dtypes or devices differ, or R is odd or > D.
    """
    check_heads(q, k)
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, Tensor) or not table.is_floating_point():
            _check.is_floating(name, table)
        if table.dim() != 3 or table.shape[1] != q.shape[2] or table.shape[0] not in (1, q.shape[0]):
            batch = "1" if q.shape[0] == 1 else f"1 or {q.shape[0]}"
            raise ValueError(
                f"{name} must have shape ({batch}, {q.shape[2]}, R) for q {tuple(q.shape)}, got {tuple(table.shape)}"
            )
        if table.device != q.device:
            _check.same_device(name, table, "q", q)
    if cos.shape[2] != sin.shape[2] or cos.dtype != sin.dtype:
        raise ValueError(
            f"cos and sin must have one R and one dtype, got {cos.shape[2]} {cos.dtype} and {sin.shape[2]} {sin.dtype}"
        )
    check_rotated("cos", cos.shape[2], q)
    if (cos.requires_grad or sin.requires_grad) and torch.is_grad_enabled():
        backends.by_definition("apply_rope", "kernels have no gradient for cos and sin")
        return _definition(q, k, cos, sin, interleaved, False)
    if cos.dtype == torch.float64 and q.dtype != torch.float64:
        cos, sin = cos.float(), sin.float()
    return _apply_rope(q, k, cos, sin, interleaved, False)


def check_heads(q: Tensor, k: Tensor) -> None:
    """q (B, H, L, D) and k (B, K, L, D) that can be rotated together."""
    for name, x in (("q", q), ("k", k)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            _check.is_floating(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape (B, heads, L, D), got {tuple(x.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"q and k must agree in B, L and D, got {tuple(q.shape)} and {tuple(k.shape)}")
    if q.dtype != k.dtype:
        raise ValueError(f"q and k must have one dtype, got {q.dtype} and {k.dtype}")
    if q.device != k.device:
        _check.same_device("k", k, "q", q)


def check_rotated(name: str, rotated: int, q: Tensor) -> None:
    if rotated % 2 or rotated > q.shape[3]:
        raise ValueError(f"{name} must rotate an even number of dimensions, at most D = {q.shape[3]}, got {rotated}")


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> Tensor:
    """The definition for one tensor: x (B, H, L, D), cos and sin (B or 1, 1, L, R) in the dtype to compute in."""
    rotated = cos.shape[-1]
    wide = x[..., :rotated].to(torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32))
    x1, x2, c1, c2, s1, s2 = (part for t in (wide, cos, sin) for part in _halves(t, interleaved))
    if transposed:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    y = torch.stack((y1, y2), -1).flatten(-2) if interleaved else torch.cat((y1, y2), -1)
    return like_input(torch.cat((y.to(x.dtype), x[..., rotated:]), -1), x)


def _halves(t: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return t[..., 0::2], t[..., 1::2]
    half = t.shape[-1] // 2
    return t[..., :half], t[..., half:]


def like_input(y: Tensor, x: Tensor) -> Tensor:
    """y in the memory order that the kernels give the output for input x."""
    strides = fake_output(x).stride()
    if y.stride() == strides:
        return y
    return torch.empty_strided(y.shape, strides, dtype=y.dtype, device=y.device).copy_(y) if not y.requires_grad else y


def fake_output(x: Tensor) -> Tensor:
    """An uninitialised output: x's own memory order where its last dimension is contiguous."""
    return torch.empty_like(x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous())


def _definition(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    c, s = (t.to(wide).unsqueeze(1) for t in (cos, sin))
    return rotate(q, c, s, interleaved, transposed), rotate(k, c, s, interleaved, transposed)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool) -> tuple[Tensor, Tensor]:
    return fake_output(q), fake_output(k)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.interleaved, ctx.transposed = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors  # a rotation is linear: its gradient is the transposed rotation
    return *_apply_rope(grad_q, grad_k, cos, sin, ctx.interleaved, not ctx.transposed), None, None, None, None


_apply_rope = Op(
    "apply_rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool transposed) -> (Tensor, Tensor)",
    _definition,
    fake=_fake,
    triton="rope:apply_rope",
    save=_save,
    backward=_backward,
    public=["apply_rope"],
    constants=["cos", "sin"],
)
