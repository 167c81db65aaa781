"""Softmax attention with every mask in one place: causal, window, sinks, documents, boolean masks, ALiBi, soft-cap.

Forward after Dao (arXiv 2307.08691): scores of a block of queries and keys at a time, an online softmax, no matrix of
all scores. Blocks that no query sees are not computed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastllm.ops import _check, _libraries
from fastllm.ops._attention import (
    attend,
    check_mask,
    check_qkv,
    check_scores,
    fresh_out,
    lay_out,
    positions,
)
from fastllm.ops._op import ROUTES, Op, vjp


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
    dropout_p: float = 0.0,
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
        dropout_p: 0.0; there is no dropout here, and asking for it is an error rather than forgotten.

    Returns:
        (B, H, Lq, Dv) in q's dtype, or packed (T, H, Dv); with `return_lse` also the fp32 lse, (B, H, Lq) or (H, T). A
        query that sees nothing gives 0 and lse -inf. Differentiable in q, k, v and sink_logits, through lse too.

    Raises:
        TypeError: a tensor of the wrong kind. ValueError: shapes, dtypes or devices that do not match, H not a multiple of K,
        window < 1, sinks < 0, dropout_p other than 0, cu_seqlens that do not ascend from 0 to T (checked on the CPU).
    """
    call = _checked(
        q, k, v, causal, scale, window, sinks, sink_logits, alibi_slopes, softcap, mask, cu_seqlens_q, cu_seqlens_k, return_lse,
        dropout_p,
    )  # fmt: skip
    library = _libraries.choose(call)
    return _by_ours(call) if library == _libraries.OURS else _libraries.LIBRARIES[library].run(call)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None, window: int | None, sinks: int,
    sink_logits: Tensor | None, alibi_slopes: Tensor | None, softcap: float | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, return_lse: bool, dropout_p: float,
) -> _libraries.Call:  # fmt: skip
    if dropout_p:
        raise ValueError(f"dropout_p must be 0: attention without dropout is all that is here, got {dropout_p}")
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    q, k, v = check_qkv(q, k, v, 3 if packed else 4)
    scale = check_scores(q, scale, window, sinks, sink_logits, alibi_slopes, softcap)
    if packed:
        if mask is not None:
            raise ValueError("mask cannot be combined with cu_seqlens_q and cu_seqlens_k")
        cu_seqlens_q = cu_seqlens_k if cu_seqlens_q is None else cu_seqlens_q
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        documents = (
            _check.is_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q),
            _check.is_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k),
        )
        if documents[0] != documents[1]:
            raise ValueError(
                f"cu_seqlens_q and cu_seqlens_k must tell of as many documents, got {documents[0]} and {documents[1]}"
            )
    elif mask is not None:
        mask = check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q)
    return _libraries.Call(
        q, k, v, causal, scale, window, sinks, sink_logits, alibi_slopes, softcap, mask, cu_seqlens_q, cu_seqlens_k, return_lse
    )  # fmt: skip


def _by_ours(call: _libraries.Call) -> Any:
    q, k, v = call.q, call.k, call.v
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if head_dim % 8:
        q, k = (F.pad(t, (0, -head_dim % 8)) for t in (q, k))
    if value_dim % 8:
        v = F.pad(v, (0, -value_dim % 8))
    out, lse, _ = _attention(
        q, k, v, call.sink_logits, call.alibi_slopes, call.mask, call.cu_seqlens_q, call.cu_seqlens_k, call.scale, call.causal,
        call.window or 0, call.sinks, call.softcap or 0.0,
    )  # fmt: skip
    out = out[..., :value_dim] if value_dim % 8 else out
    return (out, lse) if call.return_lse else out


def _definition(
    q: Tensor, k: Tensor, v: Tensor, sink_logits: Tensor | None, alibi_slopes: Tensor | None, mask: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, scale: float, causal: bool, window: int, sinks: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The third result is what rounding lse to fp32 lost: a backward pass that takes its weights from lse alone is off
    by 1e-7 times the scores."""
    packed = cu_seqlens_q is not None
    if packed:
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    p, j, visible = positions(cu_seqlens_q, cu_seqlens_k, q.shape[-2], k.shape[-2], q.device)
    visible = visible if mask is None else mask
    out, lse = attend(q, k, v, sink_logits, alibi_slopes, p, j, visible, scale, causal, window, sinks, softcap)
    return (out.transpose(0, 1).contiguous() if packed else lay_out(out)), lse, torch.zeros_like(lse)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((q.shape[1], q.shape[0]) if q.dim() == 3 else q.shape[:3], dtype=wide)
    return fresh_out(q, v.shape[-1]), lse, torch.empty_like(lse)


def _backward_definition(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lost: Tensor,
    sink_logits: Tensor | None, alibi_slopes: Tensor | None, mask: Tensor | None, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return _definition(q, k, v, sink_logits, alibi_slopes, mask, *rest)[:2]

    grads = vjp(attend, (q, k, v), (grad_out, grad_lse))
    return tuple(
        torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None else g.contiguous()
        for g, t in zip(grads, (q, k, v))
    )  # type: ignore[return-value]


def _backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, sink_logits, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, *output, sink_logits, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, lost, sink_logits, alibi_slopes, mask, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    rest = (mask, cu_seqlens_q, cu_seqlens_k, *ctx.how)
    none = (None,) * 8
    if grad_out is None and grad_lse is None:
        return (None,) * 5 + none
    if torch.is_grad_enabled() or (alibi_slopes is not None and alibi_slopes.requires_grad):

        def attend(q: Tensor, k: Tensor, v: Tensor, sink_logits: Any, alibi_slopes: Any) -> tuple[Tensor, ...]:
            return _definition(q, k, v, sink_logits, alibi_slopes, *rest)[:2]

        return vjp(attend, (q, k, v, sink_logits, alibi_slopes), (grad_out, grad_lse)) + none
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grad_q, grad_k, grad_v = _attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, lost, sink_logits, alibi_slopes, *rest
    )
    grad_sinks = None
    if sink_logits is not None and sink_logits.requires_grad:
        # d lse / d sink = exp(sink - lse) =: s; d out / d sink = -s out.
        delta = (grad_out.float() * out.float()).sum(-1)
        delta = delta.t() if q.dim() == 3 else delta
        delta = -delta if grad_lse is None else grad_lse - delta
        share = torch.exp(sink_logits.float().unsqueeze(-1) - lse).masked_fill(lse == float("-inf"), 0.0)
        grad_sinks = (share * delta).movedim(-2, 0).flatten(1).sum(1).to(sink_logits.dtype)
    return grad_q, grad_k, grad_v, grad_sinks, None, *none


_ARGUMENTS = (
    "Tensor? sink_logits, Tensor? alibi_slopes, Tensor? mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, float scale, "
    "bool causal, int window, int sinks, float softcap"
)
_attention = Op(
    f"attention(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor out, Tensor lse, Tensor lost)",
    _definition,
    fake=_fake,
    triton="attention:forward",
    save=_save,
    backward=_backward,
    expanded=True,  # a mask that is the same for all heads or queries
    public=["attention"],
)
# Of queries, keys and values; contiguous.
_attention_backward = Op(
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lost, "
    f"{_ARGUMENTS}) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _backward_definition,
    fake=_backward_fake,
    triton="attention:backward",
    expanded=True,
)


def _route(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[str, str, dict[str, str]]:
    defaults = {n: p.default for n, p in inspect.signature(attention).parameters.items() if n not in ("q", "k", "v")}
    return _libraries.reasons(_checked(q, k, v, **{**defaults, **options}))


ROUTES["attention"] = _route
