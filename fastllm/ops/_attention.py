"""What the attention ops share: checks of their arguments, positions, the definition of softmax attention."""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.ops import _check


def check_scores(
    q: Tensor,
    scale: float | None,
    window: int | None,
    sinks: int,
    sink_logits: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
) -> float:
    """Checks what bends or hides scores; returns the scale."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    _check.in_range("scale", scale, float("-inf"))
    if window is not None:
        _check.is_count("window", window, 1, " (the query itself) or None")
    _check.is_count("sinks", sinks, 0)
    if softcap is not None:
        _check.in_range("softcap", softcap, 0.0, open_low=True)
    for name, value in (("sink_logits", sink_logits), ("alibi_slopes", alibi_slopes)):
        if value is not None:
            _check.is_floating(name, value)
            _check.has_shape(name, value, (q.shape[1],), "one per query head")
            _check.same_device(name, value, "q", q)
    return scale


def check_qkv(q: Tensor, k: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    layout = "(B, heads, L, D)" if rank == 4 else "(T, heads, D), as packed inputs are"
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check.is_floating(name, t)
        if t.dim() != rank:
            raise ValueError(f"{name} must have shape {layout}, got {tuple(t.shape)}")
        _check.same_device(name, t, "q", q)
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"k and v must agree in all but their last dimension, got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if q.shape[-1] != k.shape[-1] or q.shape[-1] == 0 or v.shape[-1] == 0:
        raise ValueError(
            f"q and k must have one head dimension and v one of its own, all above 0, got q {tuple(q.shape)}, "
            f"k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if rank == 4 and q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size, got {q.shape[0]} and {k.shape[0]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {q.shape[1]} and {k.shape[1]}")
    return q, k, v


def check_mask(mask: Tensor, shape: tuple[int, ...], q: Tensor) -> Tensor:
    _check.is_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where a key is visible, got {mask.dtype}")
    _check.same_device("mask", mask, "q", q)
    try:
        return mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"mask must be broadcastable to (B, H, Lq, Lk) = {tuple(shape)}, got {tuple(mask.shape)}"
        ) from None


def positions(
    bounds_q: Tensor | None, bounds_k: Tensor | None, queries: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Position of each query (Lq, 1) and key (1, Lk) in its document, and which pairs share one (None: all)."""
    i = torch.arange(queries, device=device)
    j = torch.arange(keys, device=device)
    if bounds_q is None or bounds_k is None:
        return (i + (keys - queries)).unsqueeze(1), j.unsqueeze(0), None
    bounds_q, bounds_k = bounds_q.long(), bounds_k.long()
    document_q, document_k = ((bounds[1:] <= n.unsqueeze(-1)).sum(-1) for bounds, n in ((bounds_q, i), (bounds_k, j)))
    shift = (bounds_k[1:] - bounds_k[:-1]) - (bounds_q[1:] - bounds_q[:-1]) - bounds_q[:-1]
    if bounds_q.shape[0] > 1:
        i = i + shift[document_q]
        j = j - bounds_k[document_k]
    return i.unsqueeze(1), j.unsqueeze(0), document_q.unsqueeze(1) == document_k.unsqueeze(0)


def attend(
    q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None, p: Tensor, j: Tensor,
    visible: Tensor | None, scale: float, causal: bool, window: int, sinks: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition: out (..., H, Lq, Dv) and lse (..., H, Lq) of queries at positions p and keys at positions j.

    p (..., Lq, 1), j (1, Lk) and visible (None: all) broadcast against the scores.
    """
    dtype = q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    group = q.shape[-3] // k.shape[-3]
    k, v = (t.repeat_interleave(group, -3) if group != 1 else t for t in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(wide).view(-1, 1, 1) * (j - p)
    if visible is None:
        visible = torch.ones((), dtype=torch.bool, device=q.device).expand(q.shape[-2], k.shape[-2])
    if causal:
        visible = visible & (j <= p)
    if window:
        visible = visible & ((p - j < window) | (j < sinks))
    scores = scores.masked_fill(~visible, float("-inf"))
    extra = () if sink_logits is None else (sink_logits.to(wide).view(-1, 1, 1).expand(*scores.shape[:-1], 1),)
    columns = torch.cat((scores, *extra), -1)
    dead = (columns == float("-inf")).all(-1, keepdim=True)  # also where there are no keys
    shift = columns.detach().amax(-1, keepdim=True) if columns.shape[-1] else columns.new_zeros(*columns.shape[:-1], 1)
    shift = shift.masked_fill(dead, 0.0)
    weights = torch.exp(columns - shift)
    total = weights.sum(-1, keepdim=True).masked_fill(dead, 1.0)
    out = (weights[..., : scores.shape[-1]] / total) @ v
    lse = (total.log() + shift).masked_fill(dead, float("-inf")).squeeze(-1)
    return out.to(dtype), lse


def fresh_out(q: Tensor, channels: int) -> Tensor:
    """An output for q as kernels write it: the heads of a token side by side. Not a view of another tensor, which autograd
    would not let a caller change."""
    if q.dim() == 3:
        return q.new_empty(q.shape[0], q.shape[1], channels)
    batch, heads, queries = q.shape[:3]
    row = heads * channels
    return q.new_empty_strided((batch, heads, queries, channels), (queries * row, channels, row, 1))


def lay_out(out: Tensor) -> Tensor:
    """(B, H, L, D) as fresh_out has it."""
    return out.transpose(1, 2).contiguous().transpose(1, 2).clone()  # which keeps the strides and is no view
