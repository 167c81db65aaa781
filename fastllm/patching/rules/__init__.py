"""One rule per op. A rule recognises modules by signature, structure and numerical probe, never by a family's name.

A rule is a module with
  ``find(model)``                     yields Found (to be patched) and Skipped (looks like it, but is left, and why);
  ``bind(module, settings)``          the callable that stands in the module's slot;
  ``verify(found, dtype)``            runs one module against its original; returns what disagrees, or "".
Where something else than a callable stands in the slot, ``REPLACEMENT`` is its class, and there is no ``bind``. A rule whose
``find`` takes ``options`` is given what a user's mapping of ops holds for it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Found:
    """A module a rule recognised: the slot of its ``__dict__`` to fill, plain settings for ``bind``, and the kind that
    one verification covers. What only serves another replacement (`auxiliary`) is not counted in the report."""

    path: str
    module: nn.Module
    slot: str
    settings: dict[str, Any] = field(default_factory=dict)
    kind: Hashable = ()
    auxiliary: bool = False


def has_hooks(module: nn.Module) -> bool:
    """True when something watches or changes the module's inputs or outputs."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
