"""A training step without memory: forward and backward pass on tensors that have shapes and no values, every byte counted.

What a step holds is found by running it, with the model's own code and kernels' own rules of what they save, not by a formula
for each architecture. Layers that are all alike are run three of, and the middle one is then repeated.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastllm.ops import _linear_rows

_FEW = 3  # layers of which the middle one stands for all


@dataclass(frozen=True)
class Timeline:
    """Bytes of activations (all that is neither a parameter nor its gradient) and of gradients at every moment of a step."""

    activations: numpy.ndarray
    gradients: numpy.ndarray

    def peak(self, share: float = 1.0, *, held: bool = False) -> int:
        """The most bytes at one time. share: of the gradients that is kept; held: they are there from the beginning."""
        gradients = self.gradients[-1] if held else self.gradients
        return int((self.activations + share * gradients).max())

    @property
    def saved(self) -> int:
        """Activations at their most."""
        return int(self.activations.max())


def step(
    build: Callable[[int | None], nn.Module], layers: int, alike: bool, batch: int, length: int, *, autocast: bool
) -> Timeline:
    """The timeline of one step of a causal LM on `batch` rows of `length` tokens.

    Args:
        build: makes the model, ready to train, on the meta device; with a number, with so many layers.
        layers: of the model. alike: whether a layer in the middle stands for all of them.
        autocast: compute in bf16 with weights as they are.
    """
    few = alike and layers > _FEW
    model = build(_FEW if few else None)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), _not_packed():
        _make_fake(model)
        model.train()
        with _Ledger(model) as ledger:
            marks = _mark_layers(model, _FEW, ledger) if few else None
            ids = torch.zeros(batch, length, dtype=torch.long)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            del loss
    deltas = numpy.array(ledger.deltas, dtype=numpy.int64)
    if few and marks is not None:
        more = layers - _FEW
        (a, b), (c, d) = (marks["forward"][1:3], marks["backward"][1::-1])
        middle, back = deltas[a:b], deltas[c:d]
        deltas = numpy.concatenate((
            deltas[:b], numpy.tile(middle, (more, 1)), deltas[b:d], numpy.tile(back, (more, 1)), deltas[d:],
        ))  # fmt: skip
    total = deltas.cumsum(0)
    return Timeline(total[:, 0], total[:, 1])


class _Ledger(TorchDispatchMode):
    """Notes every storage that comes and goes: (change of activations, change of gradients)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.deltas: list[tuple[int, int]] = [(0, 0)]
        self.kind: dict[int, tuple[int, int]] = {}  # of a storage: bytes, and 0 for an activation, 1 for a gradient
        self.known = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self.hooks = [
            p.register_post_accumulate_grad_hook(self._accumulated) for p in model.parameters() if p.requires_grad
        ]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        if (hidden := _hidden_inside(function, args)) > 0:
            self.deltas += [(hidden, 0), (-hidden, 0)]
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or key in self.kind:
            return
        size = storage.nbytes()
        self.kind[key] = (size, 0)
        self.deltas.append((size, 0))
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        size, gradient = self.kind.pop(key)
        self.deltas.append((0, -size) if gradient else (-size, 0))

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        key = parameter.grad.untyped_storage()._cdata
        size, gradient = self.kind.get(key, (0, 1))
        if not gradient:
            self.kind[key] = (size, 1)
            self.deltas.append((-size, size))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for hook in self.hooks:
            hook.remove()


def _hidden_inside(function: Any, args: Any) -> int:
    """Bytes that one of fastllm's ops holds within itself: a chunk of logits, and where it must the fp32 sum of the weight's gradient."""
    if not str(function).startswith("fastllm.linear_"):
        return 0
    hidden, weight = args[0], args[1]
    tokens, width = hidden.numel() // hidden.shape[-1], weight.element_size()
    rows, classes = _linear_rows._chunk(tokens, weight, True, weight.requires_grad)
    summed = 4 * weight.numel() if width < 4 and rows < tokens else 0
    return rows * classes * width + summed


def _mark_layers(model: nn.Module, count: int, ledger: _Ledger) -> dict[str, list[int]]:
    """Where in the ledger each layer begins forward, and where it begins backward."""
    found = layers_of(model, count)
    marks: dict[str, list[int]] = {"forward": [0] * count, "backward": [0] * count}

    def mark(way: str, number: int) -> None:
        marks[way][number] = len(ledger.deltas)

    def after(number: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            if marks["backward"][number] == 0 and first.requires_grad:
                first.register_hook(lambda _: mark("backward", number))

        return hook

    def before(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if marks["forward"][number] == 0:  # not again where checkpointing repeats it
                mark("forward", number)

        return hook

    for number, layer in enumerate(found):
        layer.register_forward_pre_hook(before(number))
        layer.register_forward_hook(after(number))
    return marks


def layers_of(model: nn.Module, count: int) -> list[nn.Module]:
    """The decoder's layers: the first list of `count` modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of {count} layers")
    return list(lists[0])


def _make_fake(model: nn.Module) -> None:
    """Puts tensors without values on the CPU in the place of the meta device's, which autocast does not know."""
    new: dict[int, Any] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, value in place.items():
                if value is None:
                    continue
                if id(value) not in new:
                    fake = torch.empty(value.shape, dtype=value.dtype)
                    kept = isinstance(value, nn.Parameter)
                    new[id(value)] = nn.Parameter(fake, requires_grad=value.requires_grad) if kept else fake
                place[name] = new[id(value)]


@contextmanager
def _not_packed() -> Iterator[None]:
    """transformers looks into position ids for packed rows; these have no values to look at, and are not packed."""
    from transformers import masking_utils

    with mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None, create=True):
        yield


def shortened(config: Any, count: int | None) -> Any:
    """The configuration with `count` layers."""
    if count is None:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config()
    name = next(n for n in ("num_hidden_layers", "n_layer", "n_layers") if hasattr(text, n))
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types[:count])
    setattr(text, name, count)
    return config
