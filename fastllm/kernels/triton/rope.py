"""Rotary embedding: one program per token rotates all heads of q or k, with cosines read from a table or computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastllm.kernels.triton._launch import Configuration, Work, triton_type
from fastllm.kernels.triton._numeric import narrow


@triton.jit
def _angles(position, inv_freq, attention_factor):
    # fp64 until the angle is within half a turn: the error must not grow with the position
    angle = position.to(tl.float64) * inv_freq.to(tl.float64)
    turns = tl.floor(angle * 0.15915494309189535 + 0.5)
    angle = (angle - turns * 6.283185307179586).to(tl.float32)
    return tl.cos(angle) * attention_factor, tl.sin(angle) * attention_factor


@triton.jit
def _rotate_kernel(
    x_ptr, y_ptr, cos_ptr, sin_ptr, position_ptr, inv_freq_ptr,
    heads, length, dim, rotated, attention_factor,
    x_batch, x_head, x_token, y_batch, y_head, y_token, cos_batch, cos_token, sin_batch, sin_token,
    position_batch, position_token,
    FROM_POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    # A pair (x1, x2) becomes (x1 c1 + x2 u, x2 c2 + x1 w); u = -s1, w = s2, or for the transpose u = s2, w = -s1.
    program = tl.program_id(0)
    batch = (program // length).to(tl.int64)
    token = (program % length).to(tl.int64)
    half = rotated // 2
    pair = tl.arange(0, PAIRS)
    inside = pair < half
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + half
    if FROM_POSITIONS:
        position = tl.load(position_ptr + batch * position_batch + token * position_token)
        inv_freq = tl.load(inv_freq_ptr + pair, mask=inside, other=0.0)
        c1, s1 = _angles(position, inv_freq, attention_factor)
        c2, s2 = c1, s1
    else:
        cos_ptr += batch * cos_batch + token * cos_token
        sin_ptr += batch * sin_batch + token * sin_token
        c1 = tl.load(cos_ptr + first, mask=inside, other=0.0).to(tl.float32)
        c2 = tl.load(cos_ptr + second, mask=inside, other=0.0).to(tl.float32)
        s1 = tl.load(sin_ptr + first, mask=inside, other=0.0).to(tl.float32)
        s2 = tl.load(sin_ptr + second, mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        u, w = s2, -s1
    else:
        u, w = -s1, s2
    x_ptr += batch * x_batch + token * x_token
    y_ptr += batch * y_batch + token * y_token
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        mask = (head < heads) & inside[None, :]
        x_row = x_ptr + head.to(tl.int64) * x_head
        y_row = y_ptr + head.to(tl.int64) * y_head
        x1 = tl.load(x_row + first[None, :], mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(x_row + second[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(y_row + first[None, :], narrow(x1 * c1[None, :] + x2 * u[None, :], y_ptr), mask=mask)
        tl.store(y_row + second[None, :], narrow(x2 * c2[None, :] + x1 * w[None, :], y_ptr), mask=mask)
        if REST > 0:
            rest = rotated + tl.arange(0, REST)[None, :]
            keep = (head < heads) & (rest < dim)
            tl.store(y_row + rest, tl.load(x_row + rest, mask=keep), mask=keep)


def apply_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transposed: bool
) -> tuple[Tensor, Tensor]:
    cos, sin = _last_dim_contiguous(cos), _last_dim_contiguous(sin)
    return tuple(_launch(x, cos, sin, None, None, cos.shape[2], 1.0, interleaved, transposed) for x in (q, k))  # type: ignore[return-value]


def rope(
    q: Tensor,
    k: Tensor,
    position_ids: Tensor,
    inv_freq: Tensor,
    attention_factor: float,
    interleaved: bool,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    inv_freq = (inv_freq if inv_freq.dtype == torch.float64 else inv_freq.float()).contiguous()
    rotated = 2 * inv_freq.shape[0]
    return tuple(  # type: ignore[return-value]
        _launch(x, None, None, position_ids, inv_freq, rotated, attention_factor, interleaved, transposed)
        for x in (q, k)
    )


def _last_dim_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.numel() == 0 else t.contiguous()


def _launch(
    x: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, inv_freq: Tensor | None, rotated: int,
    attention_factor: float, interleaved: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    x = _last_dim_contiguous(x)
    y = torch.empty_like(x)
    batch, heads, length, dim = x.shape
    if not y.numel():
        return y

    def strides(t: Tensor | None) -> tuple[int, int]:
        return (0, 0) if t is None else (0 if t.shape[0] == 1 else t.stride(0), t.stride(1))

    _rotate_kernel[(batch * length,)](
        x, y, cos if cos is not None else x, sin if sin is not None else x, positions if positions is not None else x,
        inv_freq if inv_freq is not None else x, heads, length, dim, rotated, attention_factor,
        *x.stride()[:3], *y.stride()[:3], *strides(cos), *strides(sin), *strides(positions),
        FROM_POSITIONS=positions is not None, INTERLEAVED=interleaved, TRANSPOSED=transposed,
        **_blocks(heads, dim, rotated), num_warps=4,
    )  # fmt: skip
    return y


def _blocks(heads: int, dim: int, rotated: int) -> dict[str, int]:
    pairs = triton.next_power_of_2(max(rotated // 2, 1))
    rest = triton.next_power_of_2(dim - rotated) if rotated < dim else 0
    return {"HEADS": min(triton.next_power_of_2(heads), max(1, 1024 // max(pairs, rest))), "PAIRS": pairs, "REST": rest}


def configurations() -> list[Configuration]:
    """Llama's heads in both dtypes and layouts, a partial rotation, and angles from positions."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for heads, dim, rotated, interleaved, from_positions in (
            (32, 128, 128, False, False),
            (32, 128, 128, True, False),
            (32, 128, 64, False, False),
            (32, 128, 128, False, True),
        ):
            t = triton_type(dtype)
            signature = {
                "x_ptr": t, "y_ptr": t, "cos_ptr": t, "sin_ptr": t,
                "position_ptr": "*i64" if from_positions else t, "inv_freq_ptr": "*fp32" if from_positions else t,
                "heads": "i32", "length": "i32", "dim": "i32:16", "rotated": "i32:16", "attention_factor": "fp32",
            }  # fmt: skip
            for name in ("x", "y"):
                signature |= {f"{name}_batch": "i64:16", f"{name}_head": "i32:16", f"{name}_token": "i32:16"}
            for name in ("cos", "sin", "position"):
                signature |= {f"{name}_batch": "i32:16", f"{name}_token": "i32:16"}
            found.append(
                Configuration(
                    _rotate_kernel,
                    signature,
                    {
                        "FROM_POSITIONS": from_positions,
                        "INTERLEAVED": interleaved,
                        "TRANSPOSED": False,
                        **_blocks(heads, dim, rotated),
                    },
                    label=f"rope {t[1:]} D={dim} R={rotated}"
                    + " interleaved" * interleaved
                    + " from positions" * from_positions,
                    work=Work(f"4×{heads}×2048×{dim}", 2 * 4 * heads * 2048 * dim * dtype.itemsize),
                )
            )
    return found
