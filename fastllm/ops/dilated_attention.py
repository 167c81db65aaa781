"""LongNet's dilated attention (Ding et al., arXiv 2307.02486): segments of the sequence, sparser the longer they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops._attention import check_qkv, check_scores
from fastllm.ops._op import COMPOSED
from fastllm.ops.attention import attention
from fastllm.ops.merge_attention import merge_attention


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Attention within dilated segments, several patterns mixed by their softmax denominators.

    Pattern n cuts the sequence into segments of ``segment_lengths[n]`` tokens. Within one, head h keeps the tokens whose
    offset is ``h`` modulo ``dilation_rates[n]``; they attend to each other. A query's results over the patterns that hold
    it are mixed as ``merge_attention`` does, and gradients flow through the mixing weights. Cost per pattern is
    ``L * segment / rate**2`` scores a head: linear in L.

    Args:
        q: (B, H, L, D), float32, bfloat16 or float16.
        k: (B, K, L, D) where K divides H.
        v: (B, K, L, Dv).
        segment_lengths, dilation_rates: a pattern each, all at least 1. A rate of 1 in one pattern lets every query see a
            key; a query that no pattern holds gives 0.
        causal: whether keys after a query are hidden.
        scale: of the products; D^-1/2 unless given.
        key_mask: (B, L) bool, False where a token is padding that no query may see.

    Returns:
        (B, H, L, Dv) in q's dtype. Differentiable in q, k and v.

    Raises:
        TypeError, ValueError: as ``attention``, and for q and k of different lengths or patterns that do not pair up.
    """
    q, k, v = check_qkv(q, k, v, 4)
    scale = check_scores(q, scale, None, 0, None, None, None)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"q and k must have one length, got {q.shape[2]} and {k.shape[2]}")
    if not isinstance(segment_lengths, Sequence) or not isinstance(dilation_rates, Sequence):
        raise TypeError(
            f"segment_lengths and dilation_rates must be sequences of integers, got {segment_lengths!r} and {dilation_rates!r}"
        )
    patterns = list(zip(segment_lengths, dilation_rates))
    if not patterns or len(segment_lengths) != len(dilation_rates) or any(w < 1 or r < 1 for w, r in patterns):
        raise ValueError(
            "segment_lengths and dilation_rates must pair up, at least one pair, all at least 1, got "
            f"{list(segment_lengths)} and {list(dilation_rates)}"
        )
    if key_mask is not None:
        _check.is_tensor("key_mask", key_mask)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (q.shape[0], q.shape[2])):
        raise ValueError(
            f"key_mask must be a bool tensor of shape (B, L) = {(q.shape[0], q.shape[2])}, got {key_mask.dtype} "
            f"{tuple(key_mask.shape)}"
        )
    if q.shape[1] == 0:
        return attention(q, k, v, scale=scale)
    group = q.shape[1] // k.shape[1]
    if group > 1 and any(r > 1 for _, r in patterns):  # heads that share keys keep different tokens of them
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    results = [_pattern(q, k, v, segment, rate, causal, scale, key_mask) for segment, rate in patterns]
    return merge_attention(*zip(*results))[0] if len(results) > 1 else results[0][0]


def _pattern(
    q: Tensor, k: Tensor, v: Tensor, segment: int, rate: int, causal: bool, scale: float, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One pattern's out and lse; 0 and -inf for the queries it does not hold."""
    heads, length = q.shape[1:3]
    segment = min(segment, length) if length else segment
    count = -(-length // segment)
    padded = -(-segment // rate) * rate  # a segment with room for whole strides
    if not causal or padded * count != length or key_mask is not None:
        real = torch.ones(1, length, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
        real = _segments(real[:, None, :, None], segment, padded).squeeze(-1)  # (B|1, 1, count, padded)
    else:
        real = None
    if rate == 1:
        whole = [_segments(t, segment, padded) for t in (q, k, v)]
        out, lse = _attend(whole[0], whole[1], whole[2], real, causal, scale)
        return _whole(out, segment, length), _whole(lse.unsqueeze(-1), segment, length).squeeze(-1)
    outs, lses = [], []
    # Heads in rows of `rate`, of which head h keeps the tokens of offset h; what is left over is one row that is not full.
    for first, width in ((0, rate), (heads // rate * rate, heads % rate)):
        rows = (heads - first) // width if width else 0
        if not rows:
            continue
        kept = [
            _diagonal(_segments(t[:, first : first + rows * width], segment, padded), width, rate) for t in (q, k, v)
        ]
        seen = None
        if real is not None:
            offsets = real.view(real.shape[0], 1, count, padded // rate, rate)[..., :width]
            seen = (
                offsets.movedim(-1, 1).flatten(1, 2).repeat(1, rows, 1, 1)
            )  # (B|1, rows * width, count, padded / rate)
        out, lse = _attend(kept[0], kept[1], kept[2], seen, causal, scale)
        outs.append(_whole(_spread(out, width, rate, 0.0), segment, length))
        lses.append(_whole(_spread(lse.unsqueeze(-1), width, rate, float("-inf")), segment, length).squeeze(-1))
    return (torch.cat(outs, 1), torch.cat(lses, 1)) if len(outs) > 1 else (outs[0], lses[0])


def _diagonal(t: Tensor, width: int, rate: int) -> Tensor:
    """Of (B, rows * width, segments, tokens, D), of head h (modulo width) the tokens of offset h modulo rate."""
    t = t.unflatten(1, (-1, width)).unflatten(4, (-1, rate))[..., :width, :]
    return t.diagonal(dim1=2, dim2=5).movedim(-1, 2).flatten(1, 2)


def _spread(t: Tensor, width: int, rate: int, empty: float) -> Tensor:
    """The transpose of _diagonal: the tokens that a head did not keep are `empty`."""
    t = t.unflatten(1, (-1, width))
    room = t.new_full((*t.shape[:-1], rate, t.shape[-1]), empty)
    filled = torch.diagonal_scatter(room[..., :width, :], t.movedim(2, -1), dim1=2, dim2=5)
    if width < rate:
        filled = torch.cat((filled, room[..., width:, :]), -2)
    return filled.flatten(1, 2).flatten(3, 4)


def _segments(t: Tensor, segment: int, padded: int) -> Tensor:
    """(B, H, L, D) to (B, H, segments, padded, D), zeros where a segment ends early."""
    length = t.shape[2]
    count = -(-length // segment)
    if count * segment != length:
        t = F.pad(t, (0, 0, 0, count * segment - length))
    t = t.unflatten(2, (count, segment))
    return F.pad(t, (0, 0, 0, padded - segment)) if padded != segment else t


def _whole(t: Tensor, segment: int, length: int) -> Tensor:
    """(B, H, segments, padded, D) back to (B, H, L, D)."""
    return t[:, :, :, :segment].flatten(2, 3)[:, :, :length]


def _attend(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention within each segment: (B, H, segments, tokens, D) and, of keys, real (B|1, H|1, segments, tokens)."""
    batch, _, count = q.shape[:3]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    mask = None
    if real is not None:
        mask = real.transpose(1, 2).expand(batch, count, -1, -1).flatten(0, 1).unsqueeze(2)
    out, lse = attention(q, k, v, causal=causal, scale=scale, mask=mask, return_lse=True)
    return (t.unflatten(0, (batch, count)).transpose(1, 2) for t in (out, lse))  # type: ignore[return-value]


COMPOSED["dilated_attention"] = "attention within segments, whatever backend serves it, and merge_attention"
