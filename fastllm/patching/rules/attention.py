"""Attention modules that ask transformers' AttentionInterface for their implementation, and the models that make masks.

Their config is seen through a view whose attention implementation is ours; the config stays as it is. Where every
attention of a model is ours, its masks are too; else they are those of its own implementation, which ours takes.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.patching import probing
from fastllm.patching.attention import View, attention_forward, eager_of
from fastllm.patching.dilated import DilatedConfig
from fastllm.patching.report import Skipped
from fastllm.patching.rules import Found

OP = "attention"
SLOT = "config"
REPLACEMENT = View

_TAKEN = frozenset(
    "module query key value attention_mask dropout scaling sliding_window softcap is_causal s_aux position_bias position_ids "  # noqa: SIM905
    "cache_position output_attentions use_cache cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split()
)

_SUPPORT = ("_supports_sdpa", "_supports_flash_attn")  # what a model says of itself: its masks are not eager's alone


def find(model: nn.Module, options: DilatedConfig | None = None) -> Iterator[Found | Skipped]:
    settings = {"dilated": (options.segment_lengths, options.dilation_rates)} if options else {}
    attentions: list[tuple[nn.Module, bool]] = []
    supported = True
    for path, module in model.named_modules():
        if any(
            hasattr(module, flag) for flag in _SUPPORT
        ):  # a Transformers model; what follows is inside it, or another one
            supported = any(getattr(module, flag, False) for flag in _SUPPORT)
        if not _asks_for_attention(_class(module)):
            continue
        passes = _passes(_class(module))
        attentions.append((module, "sliding_window" in passes))
        config = module.__dict__.get(SLOT)
        implementation = getattr(config.previous if isinstance(config, View) else config, "_attn_implementation", None)
        eager = eager_of(_class(module))
        if implementation not in ("sdpa", "eager"):
            yield Skipped(path, OP, f"its attention implementation is {implementation!r}, not sdpa or eager")
        elif eager is None:
            yield Skipped(path, OP, "it names no eager attention to check against")
        elif not supported:
            yield Skipped(path, OP, "its model supports no attention implementation but eager")
        elif _changes_mask(_class(module)):
            yield Skipped(path, OP, "its forward changes the mask before its attention sees it")
        elif not passes <= _TAKEN:
            yield Skipped(
                path, OP, f"it gives its attention {', '.join(sorted(passes - _TAKEN))}, which ours does not take"
            )
        else:
            numbers = tuple(sorted((n, v) for n, v in vars(module).items() if isinstance(v, (int, float))))
            yield Found(path, module, SLOT, settings, (eager, implementation, *numbers, bool(options)))
    for path, module in model.named_modules():
        if path and SLOT in module.__dict__ and _makes_masks(_class(module)):
            below = [a for a in attentions if any(a[0] is m for m in module.modules())]
            if (
                below
                and all(isinstance(m.__dict__.get(SLOT), View) for m, _ in below)
                and _only_ours_take_masks(module)
            ):
                windows = all(passed for _, passed in below)
                yield Found(path, module, SLOT, {"windows": windows, **settings}, auxiliary=True)


def verify(found: Found, dtype: torch.dtype) -> str:
    if found.auxiliary or found.settings.get("dilated"):
        return ""  # masks have no weights to check; dilated attention is another function
    module = found.module
    eager = eager_of(_class(module))
    assert eager is not None
    device = probing.device_of(module)
    config = module.__dict__[SLOT]
    group = int(getattr(module, "num_key_value_groups", 1) or 1)
    sinks = getattr(module, "sinks", None)
    heads = sinks.shape[0] if isinstance(sinks, Tensor) and sinks.numel() else 2 * group
    head_dim = getattr(module, "head_dim", None)
    head_dim = head_dim if isinstance(head_dim, int) and head_dim > 0 else 16
    length, window = 9, 4
    options: dict[str, Any] = {"scaling": getattr(module, "scaling", None) or head_dim**-0.5, "dropout": 0.0}
    passes = _passes(_class(module))
    if "softcap" in passes:
        options["softcap"] = getattr(module, "attn_logit_softcapping", None) or getattr(
            config, "attn_logit_softcapping", None
        )
    if "s_aux" in passes:
        options["s_aux"] = None if sinks is None else sinks.detach().to(dtype)
    q = probing.random(
        (2, heads, length, head_dim), dtype, device, seed=3, scale=1 / (options["scaling"] * head_dim**0.5)
    )
    k, v = (probing.random((2, heads // group, length, head_dim), dtype, device, seed=s) for s in (4, 5))
    i = torch.arange(length, device=device)
    near = (i <= i.unsqueeze(1)) & (i.unsqueeze(1) - i < window)
    padding = torch.ones(2, length, dtype=torch.bool, device=device)
    padding[1, length - 2 :] = False
    for mask, seen in (
        (padding.new_empty(2, 0), (i <= i.unsqueeze(1))[None, None]),
        (padding.to(torch.uint8), near & padding[:, None, None]),
    ):
        hidden = torch.zeros(seen.shape, device=device).masked_fill(~seen, float("-inf"))

        def original(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor = hidden) -> Tensor:
            return eager(module, q, k, v, hidden.to(q.dtype), sliding_window=window, **options)[0]

        def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
            return attention_forward(module, q, k, v, mask, sliding_window=window, is_causal=True, **options)[0]

        problem = probing.disagreement(original, ours, [q, k, v], [], dtype)
        if problem:
            return problem
    return ""


def _class(module: nn.Module) -> Any:
    return type(module)


def _code(cls: type) -> tuple[str, ...]:
    forward: Any = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    return forward.__code__.co_names if isinstance(forward, types.FunctionType) else ()


@functools.cache
def _asks_for_attention(cls: type) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in _code(cls)


@functools.cache
def _makes_masks(cls: type) -> bool:
    return any(n.startswith("create_") and "mask" in n for n in _code(cls))


@functools.cache
def _source(cls: type) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward))))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):
        return None


@functools.cache
def _passes(cls: type) -> frozenset[str]:
    """The keywords that a forward gives to its attention function."""
    tree = _source(cls)
    if tree is None:
        return frozenset({"what its source, which is not there, would tell"})
    names = [{k.arg for k in n.keywords if k.arg} for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return frozenset().union(*(n for n in names if n & {"scaling", "dropout"}))


@functools.cache
def _changes_mask(cls: type) -> bool:
    """True where a forward assigns to its mask or takes a part of it."""
    tree = _source(cls)
    nodes = [] if tree is None else list(ast.walk(tree))
    assigned = any(isinstance(n, ast.Name) and n.id == "attention_mask" and isinstance(n.ctx, ast.Store) for n in nodes)
    return assigned or any(
        isinstance(n, (ast.Subscript, ast.Attribute))
        and isinstance(n.value, ast.Name)
        and n.value.id == "attention_mask"
        for n in nodes
    )


def _only_ours_take_masks(module: nn.Module) -> bool:
    """False where a module takes an attention mask and neither hands it on nor is ours."""
    for child in module.modules():
        takes = _takes_mask(_class(child))
        if (
            takes
            and not isinstance(child.__dict__.get(SLOT), View)
            and not any(_takes_mask(_class(m)) for m in child.modules() if m is not child)
        ):
            return False
    return True


@functools.cache
def _takes_mask(cls: type) -> bool:
    try:
        return "attention_mask" in inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return False
