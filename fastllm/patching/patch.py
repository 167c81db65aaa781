"""patch, unpatch, patched: find, replace, verify, report."""

from __future__ import annotations

import fnmatch
import importlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from fastllm import backends
from fastllm.errors import PatchError
from fastllm.ops import _op
from fastllm.patching.dilated import DilatedConfig
from fastllm.patching.replacement import Replacement, install, remove, replaced_by
from fastllm.patching.report import ABSENT, Patched, PatchReport, Skipped
from fastllm.patching.rules import Found

# op name -> its rule in fastllm.patching.rules, in the order they are applied
RULES = {
    "rms_norm": "rms_norm",
    "layer_norm": "layer_norm",
    "rope": "rope",
    "glu": "glu",
    "attention": "attention",
    "loss": "loss",
}
OPS = tuple(RULES)  # the names a user may ask for


def patch(
    model: nn.Module,
    ops: str | Iterable[str] | Mapping[str, Any] = "auto",
    *,
    exclude: Iterable[str] = (),
    strict: bool = False,
    verify: bool = True,
) -> PatchReport:
    """Puts fastllm's kernels into this model instance.

    Acts on the instance alone: classes, module globals, other instances and torch stay as they are; state_dict,
    config, save_pretrained, deepcopy, pickling, PEFT, checkpointing, device moves, ZeRO and torch.compile keep
    working. Patching a patched model adds what is missing. ``unpatch`` undoes it to the last bit.

    Args:
        model: a Transformers model, or a wrapper around one (PEFT, DeepSpeed, DDP), or any module with such parts.
        ops: "auto" for every op there is a rule for, one name, or several, of "rms_norm", "layer_norm", "rope",
            "glu", "attention", "loss". A mapping holds options for an op, or None: {"attention": DilatedConfig(...)} makes
            the model's attention LongNet's.
        exclude: op names to leave out, and globs of module paths to leave alone ("model.layers.0.*", "*.q_norm").
        strict: raise, and leave the model as it was, unless every requested op was applied somewhere; with "auto", every
            op that the model has.
        verify: run every replaced kind of module once against its original, forward and backward, in fp32 and in the
            model's dtype; put back what disagrees.

    Returns:
        PatchReport: what runs on a kernel now, what was left and why. Nothing is skipped silently.

    Raises:
        ValueError: an unknown op. TypeError: model is not a module, or ops or exclude are no names.
        PatchError: with ``strict``, naming each requested op that could not be applied.

    Warns:
        UserWarning: when nothing could be patched, or an entry of `exclude` names no op and matches no module.

    In a training step with labels, ``outputs.logits`` of a patched causal LM is computed when it is first used, and raises
    FastLLMError when that is after the optimizer has changed the head.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    asked, options = _requested(ops)
    excluded = _names("exclude", exclude, "op names and path globs")
    wanted = [op for op in asked if op not in excluded]
    globs = [e for e in excluded if e not in OPS]
    for glob in globs:
        if not any(fnmatch.fnmatchcase(path, glob) for path, _ in model.named_modules()):
            warnings.warn(
                f"exclude: {glob!r} is no op ({', '.join(OPS)}) and matches no module of {type(model).__name__}",
                stacklevel=2,
            )

    report = PatchReport(type(model).__name__)
    with _as_outside():
        installed = _apply(model, wanted, options, globs, verify, report)
    report.skipped += [Skipped("", op, "excluded") for op in asked if op in excluded]
    missing = [op for op in wanted if op not in report.counts]
    if ops == "auto" and report.patched:
        missing = [op for op in missing if Skipped("", op, ABSENT) not in report.skipped]
    if strict and missing:
        for found in installed:
            remove(found.module)
        reasons = "; ".join(f"{op} ({_reasons(report, op)})" for op in missing)
        raise PatchError(f"{type(model).__name__}: could not apply {reasons}")
    if not report.patched:
        warnings.warn(
            f"fastllm.patch changed nothing in {type(model).__name__}: "
            + ("; ".join(f"{op}: {_reasons(report, op)}" for op in asked) or "no op was asked for"),
            stacklevel=2,
        )
    return report


def _apply(
    model: nn.Module, wanted: list[str], options: dict[str, Any], globs: list[str], verify: bool, report: PatchReport
) -> list[Found]:
    """Finds, verifies and installs; tells the report."""
    installed: list[Found] = []
    for op in wanted:
        rule = importlib.import_module(f"fastllm.patching.rules.{RULES[op]}")
        any_found = False
        verdicts: dict[Any, str] = {}
        for found in rule.find(model, options[op]) if op in options else rule.find(model):
            if any(fnmatch.fnmatchcase(found.path, glob) for glob in globs):
                report.skipped.append(Skipped(found.path, op, "excluded"))
                any_found = True
                continue
            if isinstance(found, Skipped):
                report.skipped.append(found)
                continue
            any_found = True
            if found.slot not in _slots_of(found.module):
                if verify:
                    if found.kind not in verdicts:
                        verdicts[found.kind] = _verify(rule, found, model)
                    if verdicts[found.kind]:
                        report.skipped.append(Skipped(found.path, op, f"verification: {verdicts[found.kind]}"))
                        continue
                install(RULES[op], found.module, found.slot, found.settings)
                installed.append(found)
            if not found.auxiliary:
                report.patched.append(Patched(found.path, op, _backend(rule, found.module, model)))
        if not any_found and not any(s.op == op for s in report.skipped):
            report.skipped.append(Skipped("", op, ABSENT))
    return installed


@contextmanager
def _as_outside() -> Iterator[None]:
    """Probes and verification mean the same wherever patch is called: no autocast, gradients as ever."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.amp.is_autocast_available(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def unpatch(model: nn.Module) -> None:
    """Undoes ``patch``: the model computes what it did before, bit for bit, and carries no trace of the patch."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        remove(module)


@contextmanager
def patched(
    model: nn.Module, ops: str | Iterable[str] | Mapping[str, Any] = "auto", **options: Any
) -> Iterator[PatchReport]:
    """``with fastllm.patched(model) as report:`` patches for the block only; a part patched before stays patched."""
    before = {module: replaced_by(module) for module in model.modules()}
    report = patch(model, ops, **options)
    try:
        yield report
    finally:
        for module in model.modules():
            for rule in replaced_by(module) - before.get(module, set()):
                remove(module, rule)


def _requested(ops: str | Iterable[str] | Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The ops asked for, in order, and the options of those that have any."""
    options = {op: value for op, value in ops.items() if value is not None} if isinstance(ops, Mapping) else {}
    asked = _names("ops", ops, "op names")
    if asked == ["auto"]:
        asked = list(RULES)
    for op in asked:
        if op not in OPS:
            raise ValueError(f"ops must be 'auto' or any of {', '.join(map(repr, OPS))}, got {op!r}")
    for op, value in options.items():
        if op != "attention" or not isinstance(value, DilatedConfig):
            raise TypeError(f"ops[{op!r}] must be None or, of 'attention', a DilatedConfig, got {value!r}")
    return asked, options


def _names(argument: str, given: Any, what: str) -> list[str]:
    names = [given] if isinstance(given, str) else list(given) if isinstance(given, Iterable) else [given]
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument} must hold {what} as strings, got {given!r}")
    return list(dict.fromkeys(names))


def _verify(rule: Any, found: Found, model: nn.Module) -> str:
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for dtype in dict.fromkeys((torch.float32, own if own in backends.KERNEL_DTYPES else torch.float32)):
        try:
            problem = rule.verify(found, dtype)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            return f"{problem} ({str(dtype).removeprefix('torch.')})"
    return ""


def _slots_of(module: nn.Module) -> set[str]:
    return {name for name, value in module.__dict__.items() if isinstance(value, Replacement)}


def _backend(rule: Any, module: nn.Module, model: nn.Module) -> str:
    parameter = next(iter(module.parameters()), next(iter(model.parameters()), None))
    device = parameter.device if parameter is not None else torch.device("cpu")
    dtype = parameter.dtype if parameter is not None else torch.float32
    op = _op.PUBLIC[getattr(rule, "KERNEL", rule.OP)]
    return (
        "chosen when the weights have a device"
        if device.type == "meta"
        else backends.select(op.name, op.kernels, device, dtype)
    )


def _reasons(report: PatchReport, op: str) -> str:
    return ", ".join(dict.fromkeys(s.reason for s in report.skipped if s.op == op)) or "nothing of the kind found"
