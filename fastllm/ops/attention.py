"""Softmax attention with every mask in one place: causal, window, sinks, documents, boolean masks, ALiBi, soft-cap.

Forward after Dao (arXiv 2307.08691): scores of a block of queries and keys at a time, an online softmax, no matrix of
all scores. Blocks that no query sees are not computed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops._op import Op, vjp


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """``softmax(scores) @ v`` over the keys each query sees.

    Query i stands at position ``p = i + Lk - Lq``. It sees key j where all of these hold: ``j <= p`` (causal);
    ``p - j < window`` or ``j < sinks``; ``mask[..., i, j]``; both are of one document (packed). Its score is
    ``scale * q·k``, then ``softcap * tanh(score / softcap)``, then ``+ slope * (j - p)``.

    Args:
        q: (B, H, Lq, D), float32, bfloat16 or float16; float64 is served by the definition. Packed: (T, H, D).
        k: (B, K, Lk, D) where K divides H: query head h uses key head ``h // (H / K)``. Packed: (T, K, D).
        v: (B, K, Lk, Dv). Packed: (T, K, Dv).
        causal: whether keys after a query's position are hidden.
        scale: of the products; D^-1/2 unless given.
        window: keys a query sees, itself included; None: all.
        sinks: first keys that stay visible whatever the window.
        sink_logits: (H,) learned logits: exp(sink_logit) joins the denominator of the softmax, and nothing else.
        alibi_slopes: (H,) slopes (arXiv 2108.12409). A constant: gradients come from the definition.
        softcap: bound of the scores, > 0; None: none.
        mask: bool, broadcastable to (B, H, Lq, Lk); True where a key is visible.
        cu_seqlens_q, cu_seqlens_k: (documents + 1,) int32, ascending from 0 to T: where documents begin, for packed
            inputs. cu_seqlens_k defaults to cu_seqlens_q. Documents may be empty.
        return_lse: also return the logarithm of each softmax's denominator, the sink logit's term included.

    Returns:
        (B, H, Lq, Dv) in q's dtype, or packed (T, H, Dv); with `return_lse` also the fp32 lse, (B, H, Lq) or (H, T). A
        query that sees nothing gives 0 and lse -inf. Differentiable in q, k, v and sink_logits, through lse too.

    Raises:
        TypeError: a tensor of the wrong kind. ValueError: shapes, dtypes or devices that do not match, H not a multiple of K,
        window < 1, sinks < 0, cu_seqlens that do not ascend from 0 to T (checked on the CPU).
    """
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    q, k, v = _check_qkv(q, k, v, 3 if packed else 4)
    head_dim = q.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    _check.in_range("scale", scale, float("-inf"))
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (the query itself) or None, got {window}")
    if sinks < 0:
        raise ValueError(f"sinks must be at least 0, got {sinks}")
    if softcap is not None:
        _check.in_range("softcap", softcap, 0.0, open_low=True)
    heads = q.shape[1]
    for name, value in (("sink_logits", sink_logits), ("alibi_slopes", alibi_slopes)):
        if value is not None:
            _check.is_floating(name, value)
            _check.has_shape(name, value, (heads,), "one per query head")
            _check.same_device(name, value, "q", q)
    if packed:
        if mask is not None:
            raise ValueError("mask cannot be combined with cu_seqlens_q and cu_seqlens_k")
        cu_seqlens_q = cu_seqlens_k if cu_seqlens_q is None else cu_seqlens_q
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        _check_documents("cu_seqlens_q", cu_seqlens_q, q.shape[0], q)
        _check_documents("cu_seqlens_k", cu_seqlens_k, k.shape[0], k)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k must tell of as many documents, got {cu_seqlens_q.shape[0] - 1} and "
                f"{cu_seqlens_k.shape[0] - 1}"
            )
    elif mask is not None:
        mask = _check_mask(mask, (q.shape[0], heads, q.shape[2], k.shape[2]), q)
    value_dim = v.shape[-1]
    if head_dim % 8:
        q, k = (F.pad(t, (0, -head_dim % 8)) for t in (q, k))
    if value_dim % 8:
        v = F.pad(v, (0, -value_dim % 8))
    out, lse = _attention(
        q, k, v, sink_logits, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k, scale, causal, window or 0, sinks,
        softcap or 0.0,
    )  # fmt: skip
    out = out[..., :value_dim] if value_dim % 8 else out
    return (out, lse) if return_lse else out


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    layout = "(B, heads, L, D)" if rank == 4 else "(T, heads, D), as packed inputs are"
    for name, t in (("q", q), ("k", k), ("v", v)):
        _check.is_floating(name, t)
        if t.dim() != rank:
            raise ValueError(f"{name} must have shape {layout}, got {tuple(t.shape)}")
        _check.same_device(name, t, "q", q)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k and v must agree in all but their last dimension, got {tuple(k.shape)} and {tuple(v.shape)}")
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


def _check_mask(mask: Tensor, shape: tuple[int, ...], q: Tensor) -> Tensor:
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


def _check_documents(name: str, bounds: Tensor, tokens: int, like: Tensor) -> None:
    _check.is_tensor(name, bounds)
    if bounds.dtype != torch.int32:
        raise TypeError(f"{name} must be an int32 tensor, got {bounds.dtype}")
    if bounds.dim() != 1 or bounds.shape[0] < 1:
        raise ValueError(f"{name} must have shape (documents + 1,), got {tuple(bounds.shape)}")
    _check.same_device(name, bounds, "q", like)
    if bounds.device.type == "cpu" and not torch.compiler.is_compiling() and type(bounds) is Tensor:
        values = bounds.tolist()
        if values[0] != 0 or values[-1] != tokens or any(b < a for a, b in zip(values, values[1:])):
            raise ValueError(f"{name} must ascend from 0 to T = {tokens}, got {values}")


def positions(
    bounds_q: Tensor | None, bounds_k: Tensor | None, queries: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Position of each query (Lq, 1) and key (1, Lk) in its document, and which pairs share one (None: all)."""
    i = torch.arange(queries, device=device)
    j = torch.arange(keys, device=device)
    if bounds_q is None or bounds_k is None:
        return (i + (keys - queries)).unsqueeze(1), j.unsqueeze(0), None
    bounds_q, bounds_k = bounds_q.long(), bounds_k.long()
    document_q = torch.searchsorted(bounds_q, i, right=True) - 1
    document_k = torch.searchsorted(bounds_k, j, right=True) - 1
    shift = (bounds_k[1:] - bounds_k[:-1]) - (bounds_q[1:] - bounds_q[:-1]) - bounds_q[:-1]
    if bounds_q.shape[0] > 1:
        i = i + shift[document_q]
        j = j - bounds_k[document_k]
    return i.unsqueeze(1), j.unsqueeze(0), document_q.unsqueeze(1) == document_k.unsqueeze(0)


def _definition(
    q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, scale: float, causal: bool, window: int, sinks: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    packed = cu_seqlens_q is not None
    dtype = q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (t.to(wide).transpose(0, 1) if packed else t.to(wide) for t in (q, k, v))
    group = q.shape[-3] // k.shape[-3]
    k, v = (t.repeat_interleave(group, -3) if group > 1 else t for t in (k, v))
    p, j, visible = positions(cu_seqlens_q, cu_seqlens_k, q.shape[-2], k.shape[-2], q.device)
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
    if mask is not None:
        visible = visible & mask
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
    out = out.to(dtype)
    if packed:
        return out.transpose(0, 1).contiguous(), lse
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.dim() == 3:
        return q.new_empty(q.shape[0], q.shape[1], v.shape[-1]), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)
    batch, heads, queries = q.shape[:3]
    return q.new_empty(batch, queries, heads, v.shape[-1]).transpose(1, 2), q.new_empty(q.shape[:3], dtype=wide)


def _backward_definition(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    sink_logits: Tensor | None, alibi_slopes: Tensor | None, mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _definition(q, k, v, sink_logits, alibi_slopes, mask, *rest)

    grads = vjp(attend, (q, k, v), (grad_out, grad_lse))
    return tuple(
        torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None else g.contiguous()
        for g, t in zip(grads, (q, k, v))
    )  # type: ignore[return-value]


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sink_logits, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, sink_logits, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, sink_logits, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    rest = (mask, cu_seqlens_q, cu_seqlens_k, *ctx.how)
    none = (None,) * 8
    if grad_out is None and grad_lse is None:
        return (None,) * 5 + none
    if torch.is_grad_enabled() or (alibi_slopes is not None and alibi_slopes.requires_grad):

        def attend(q: Tensor, k: Tensor, v: Tensor, sink_logits: Any, alibi_slopes: Any) -> tuple[Tensor, Tensor]:
            return _definition(q, k, v, sink_logits, alibi_slopes, *rest)

        return vjp(attend, (q, k, v, sink_logits, alibi_slopes), (grad_out, grad_lse)) + none
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_q, grad_k, grad_v = _attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, sink_logits, alibi_slopes, *rest
    )
    grad_sinks = None
    if sink_logits is not None and sink_logits.requires_grad:
        # d lse / d sink = exp(sink - lse) =: s; d out / d sink = -s out.
        delta = (grad_out.float() * out.float()).sum(-1)
        delta = delta.t() if q.dim() == 3 else delta
        delta = -delta if grad_lse is None else grad_lse - delta
        share = torch.exp(sink_logits.float().unsqueeze(-1) - lse)
        grad_sinks = (share * delta).movedim(-2, 0).flatten(1).sum(1).to(sink_logits.dtype)
    return grad_q, grad_k, grad_v, grad_sinks, None, *none


_ARGUMENTS = (
    "Tensor? sink_logits, Tensor? alibi_slopes, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, "
    "bool causal, int window, int sinks, float softcap"
)
_attention = Op(
    f"attention(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor out, Tensor lse)",
    _definition,
    fake=_fake,
    triton="attention:forward",
    save=_save,
    backward=_backward,
    public=["attention"],
)
# Of queries, keys and values; contiguous.
_attention_backward = Op(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_ARGUMENTS}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _backward_definition,
    fake=_backward_fake,
    triton="attention:backward",
)
