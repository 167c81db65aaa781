"""The exact mix of attention results over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastllm.ops import _check
from fastllm.ops._op import COMPOSED


def merge_attention(outs: Tensor | Sequence[Tensor], lses: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What attention over all keys would give, from its results over parts of them.

    ``lse = log(sum_n exp(lses[n]))`` and ``out = sum_n exp(lses[n] - lse) * outs[n]``.

    Args:
        outs: n results (..., Dv) of one shape and dtype, or one tensor (n, ..., Dv).
        lses: their lse (...), or one tensor (n, ...). A part in which a query saw nothing has -inf and counts for nothing.

    Returns:
        out (..., Dv) in the dtype of `outs` and lse (...), fp32 (float64 for float64). Where no part saw a key: 0 and -inf.
        Differentiable in both arguments.

    Raises:
        TypeError: no tensors. ValueError: none given, or shapes, dtypes or devices that do not match.
    """
    for name, value in (("outs", outs), ("lses", lses)):
        if isinstance(value, Tensor):
            _check.has_rank_of_at_least(name, value, 1)
    outs = outs.unbind(0) if isinstance(outs, Tensor) else tuple(outs)
    lses = lses.unbind(0) if isinstance(lses, Tensor) else tuple(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be as many, at least one, got {len(outs)} and {len(lses)}")
    first = outs[0]
    for n, (out, lse) in enumerate(zip(outs, lses)):
        _check.is_floating(f"outs[{n}]", out)
        _check.is_floating(f"lses[{n}]", lse)
        if out.dim() == 0 or out.shape != first.shape or out.dtype != first.dtype:
            raise ValueError(
                f"outs must all have one shape (..., Dv) and dtype, got {tuple(first.shape)} {first.dtype} and "
                f"{tuple(out.shape)} {out.dtype}"
            )
        _check.has_shape(f"lses[{n}]", lse, tuple(first.shape[:-1]), "that of outs without the last dimension")
        _check.same_device(f"outs[{n}]", out, "outs[0]", first)
        _check.same_device(f"lses[{n}]", lse, "outs[0]", first)
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    logs = torch.stack([lse.to(wide) for lse in lses])
    blind = (logs == float("-inf")).all(0)
    shift = logs.detach().amax(0).masked_fill(blind, 0.0)
    shares = torch.exp(logs - shift)
    total = shares.sum(0).masked_fill(blind, 1.0)
    shares = (shares / total).unsqueeze(-1)
    mixed = outs[0].to(wide) * shares[0]
    for out, share in zip(outs[1:], shares[1:]):
        mixed = mixed + out.to(wide) * share
    return mixed.to(first.dtype), (total.log() + shift).masked_fill(blind, float("-inf"))


COMPOSED["merge_attention"] = "operations of PyTorch, wherever its tensors are"
