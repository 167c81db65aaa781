"""Tensors not yet computed: what an activation or an output head returns so that the next step can be fused with it.

A deferred value behaves as the tensor it stands for: any use that is not fused computes the tensor and goes on with
it, so a model that does something unforeseen gets the unfused result and never a wrong one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastllm.errors import FastLLMError

# Under torch.compile an operator arrives as the function of the operator module, not as the method.
_PRODUCTS = {operator.mul, torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__}
_QUOTIENTS = {operator.truediv, torch.div, torch.true_divide, Tensor.div, Tensor.__truediv__}


class Deferred:
    """Computes ``self._compute()`` once, at the first use that is not fused."""

    def __init__(self) -> None:
        self._computed: Tensor | None = None

    def _compute(self) -> Tensor:
        raise AssertionError("a subclass computes")

    def tensor(self) -> Tensor:
        """The tensor this stands for."""
        if self._computed is None:
            self._computed = self._compute()
        return self._computed

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __len__(self) -> int:
        return len(self.tensor())

    def __iter__(self) -> Any:
        return iter(self.tensor())

    def __bool__(self) -> bool:
        return bool(self.tensor())

    def __repr__(self) -> str:
        return repr(self.tensor())

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.clone, (self.tensor(),)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = materialized(args), materialized(kwargs or {})
        return function(*args, **kwargs)


def _delegate(name: str) -> Callable[..., Any]:
    def method(self: Deferred, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*materialized(others))

    return method


for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "floordiv",
    "mod",
    "pow",
    "rpow",
    "matmul",
    "rmatmul",
    "neg",
    "abs",
    "getitem",
    "setitem",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "and",
    "or",
    "xor",
    "invert",
    "float",
    "int",
]:
    setattr(Deferred, f"__{_name}__", _delegate(f"__{_name}__"))
Deferred.__hash__ = object.__hash__  # type: ignore[method-assign]


def materialized(value: Any) -> Any:
    """`value` with every deferred tensor in it computed."""
    if isinstance(value, Deferred):
        return value.tensor()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(materialized(v) for v in value)
    if type(value) is dict:
        return {k: materialized(v) for k, v in value.items()}
    return value


class DeferredActivation(Deferred):
    """``act(gate)``, which a product with a tensor of the same shape and dtype fuses."""

    def __init__(
        self, gate: Tensor, act: Callable[[Tensor], Tensor], product: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.gate, self.act, self.product = gate, act, product

    def _compute(self) -> Tensor:
        return self.act(self.gate)

    def times(self, up: Any) -> Tensor:
        """The product, fused where it can be."""
        if isinstance(up, Tensor) and up.shape == self.gate.shape and up.dtype == self.gate.dtype:
            return self.product(self.gate, up)
        return self.tensor() * materialized(up)

    __mul__ = __rmul__ = times

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _PRODUCTS and len(args) == 2 and not kwargs:
            one, other = args
            return one.times(other) if isinstance(one, DeferredActivation) else other.times(one)
        return super().__torch_function__(function, types, args, kwargs)


class DeferredLogits(Deferred):
    """``linear(hidden, weight, bias)`` followed by a scale, a soft-cap and a cast, in the order models apply them.

    Recorded: products and quotients with numbers, tanh, casts to a floating dtype. The value is
    ``scale * z`` before a tanh and ``softcap * tanh(scale * z)`` after one.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.scale = 1.0
        self.softcap: float | None = None
        self.steps: tuple[Callable[[Tensor], Tensor], ...] = ()  # the same chain, to compute exactly as the model would
        kind = hidden.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if autocast else hidden.dtype
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        if torch.compiler.is_compiling():
            return []
        return [t._version for t in (self.hidden, self.weight, self.bias) if t is not None]

    def _compute(self) -> Tensor:
        if self.versions and self._versions() != self.versions:
            raise FastLLMError(
                "outputs.logits of a patched model in training are computed when first used, and the output head has changed "
                "since the forward pass (an optimizer step?): use them before it, or patch with exclude='loss'"
            )
        logits = torch.nn.functional.linear(self.hidden, self.weight, self.bias)
        for step in self.steps:
            logits = step(logits)
        return logits

    def _then(
        self, step: Callable[[Tensor], Tensor], scale: float, softcap: float | None, dtype: torch.dtype
    ) -> DeferredLogits:
        after = type(self)(self.hidden, self.weight, self.bias)
        after.scale, after.softcap, after.steps, after.dtype = scale, softcap, (*self.steps, step), dtype
        after.versions = self.versions
        return after

    def times(self, factor: Any) -> Any:
        if type(factor) in (int, float) and factor > 0:
            scale, softcap = (
                (self.scale * factor, None) if self.softcap is None else (self.scale, self.softcap * factor)
            )
            return self._then(lambda x: x * factor, scale, softcap, self.dtype)
        return self.tensor() * materialized(factor)

    __mul__ = __rmul__ = times

    def over(self, divisor: Any) -> Any:
        if type(divisor) in (int, float) and divisor > 0:
            scale, softcap = (
                (self.scale / divisor, None) if self.softcap is None else (self.scale, self.softcap / divisor)
            )
            return self._then(lambda x: x / divisor, scale, softcap, self.dtype)
        return self.tensor() / materialized(divisor)

    __truediv__ = over

    def tanh(self) -> Any:
        if self.softcap is not None:
            return self.tensor().tanh()
        return self._then(torch.tanh, self.scale, 1.0, self.dtype)

    def contiguous(self) -> DeferredLogits:
        return self  # products are

    def float(self) -> DeferredLogits:
        return self.to(torch.float32)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype) and args[0].is_floating_point:
            dtype = args[0]
            return self._then(lambda x: x.to(dtype), self.scale, self.softcap, dtype)
        return self.tensor().to(*args, **kwargs)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.weight.shape[0]))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.hidden.dim()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.tanh, Tensor.tanh) and len(args) == 1 and not kwargs and isinstance(args[0], cls):
            return args[0].tanh()
        if len(args) == 2 and not kwargs:
            one, other = args
            if function in _PRODUCTS:
                return one.times(other) if isinstance(one, cls) else other.times(one)
            if function in _QUOTIENTS and isinstance(one, cls):
                return one.over(other)
        return super().__torch_function__(function, types, args, kwargs)
