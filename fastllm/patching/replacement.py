"""The one thing a patch leaves on a model: a callable in an instance's attribute, which knows how to undo itself."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

ABSENT = "absent"  # a string, so that it survives pickling as itself


class Replacement:
    """Stands in ``module.__dict__[slot]`` and calls ``function(*args, **kwargs)`` of a rule.

    A rule is a module of fastllm.patching.rules with ``bind(module, settings) -> callable``. Only the rule's name, the
    module and plain settings are pickled and deep-copied; the callable is bound again, so a copy of a patched model is
    patched and shares nothing with the first.
    """

    def __init__(self, rule: str, module: nn.Module, slot: str, settings: dict[str, Any], previous: Any) -> None:
        self.rule, self.module, self.slot, self.settings, self.previous = rule, module, slot, settings, previous
        self.function: Callable[..., Any] = importlib.import_module(f"fastllm.patching.rules.{rule}").bind(
            module, settings
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rule, self.module, self.slot, self.settings, self.previous)

    @property
    def __code__(self) -> Any:  # torch.export asks a model's forward for it
        return inspect.unwrap(type(self.module).forward).__code__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(original_forward(self.module))


def original_forward(module: nn.Module) -> Callable[..., Any]:
    """The class's own forward, bound to the module."""
    return type(module).forward.__get__(module)


def slot_of(module: nn.Module) -> str:
    """Where a forward belongs: beneath an accelerate hook (device_map) if there is one."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def occupied(module: nn.Module, slot: str) -> bool:
    """True when something else than the class's own method or a replacement of ours stands in the slot already."""
    there = module.__dict__.get(slot)
    ours = there is None or isinstance(there, Replacement)
    return not ours and getattr(there, "__func__", None) is not type(module).forward


def install(rule: str, module: nn.Module, slot: str, settings: dict[str, Any]) -> None:
    """Puts a rule's Replacement, of its own kind if it has one, into the slot."""
    kind = getattr(importlib.import_module(f"fastllm.patching.rules.{rule}"), "REPLACEMENT", Replacement)
    module.__dict__[slot] = kind(rule, module, slot, settings, module.__dict__.get(slot, ABSENT))


def remove(module: nn.Module, rule: str | None = None) -> int:
    """Undoes every replacement on this module (of one rule, if named); returns how many there were."""
    mine = [r for r in module.__dict__.values() if isinstance(r, Replacement) and rule in (None, r.rule)]
    for replacement in mine:
        # An accelerate hook may have come or gone since: look for the object, not for the name it was given.
        slot = next(name for name, value in module.__dict__.items() if value is replacement)
        if isinstance(replacement.previous, str) and replacement.previous == ABSENT:
            if slot == "_old_forward":
                module.__dict__[slot] = original_forward(module)
            else:
                del module.__dict__[slot]
        else:
            module.__dict__[slot] = replacement.previous
    return len(mine)


def replaced_by(module: nn.Module) -> set[str]:
    """The rules that already act on this module."""
    return {r.rule for r in module.__dict__.values() if isinstance(r, Replacement)}
