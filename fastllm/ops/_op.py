"""How an op is declared: its schema, definition, fake, Triton launcher and gradient, once, beside each other.

    _norm = Op("norm(Tensor x, float eps) -> Tensor", definition,
               fake=..., triton="norm:forward", save=..., backward=...)
    _norm_backward = Op("norm_backward(Tensor grad, Tensor x, float eps) -> Tensor", definition_of_it,
                        fake=..., triton="norm:backward")

registers torch.ops.fastllm.norm with PyTorch: the C++ kernel of the extension for CPU tensors, the Triton launcher for
CUDA tensors, the definition for any other device, a fake for torch.compile and FakeTensor, and autograd. Calling the
Op is calling that, unless a backend is forced or no kernel serves the tensor; then the definition runs under
PyTorch's own autograd, or the forced kernel does under the same gradient rule.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

from fastllm import backends
from fastllm.errors import BackendError
from fastllm.kernels import cpp, triton

LIBRARY = torch.library.Library("fastllm", "DEF")
PUBLIC: dict[str, Op] = {}  # public op name -> the Op that does its work, for backends.explain
# public op name -> who serves a call with these arguments (this library's own kernels: "fastllm"), why, why no other library
ROUTES: dict[str, Callable[..., tuple[str, str, dict[str, str]]]] = {}
COMPOSED: dict[str, str] = {}  # public op name -> what it is made of, where that is no Op of its own

_HAS_TRITON = not triton.unavailable()
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_EXACT_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class Op:
    """One operator ``torch.ops.fastllm.<name>``.

    Args:
        schema: ``"name(Tensor x, ...) -> ..."`` in PyTorch's schema language; tensors come first, the first decides
            device and dtype.
        definition: the same computation in plain PyTorch, returning as many tensors as the schema says.
        fake: shapes, dtypes and strides of the outputs, as ``torch.library.register_fake`` wants it.
        triton: ``"file:function"`` under ``fastllm.kernels.triton``, imported at first use; None: no Triton kernel.
        composed: instead of kernels of its own, a Python function that calls torch and other Ops; it serves wherever
            their kernels do, and runs below autograd.
        cuda: there is a CUDA C++ kernel, ``torch.ops.fastllm.<name>_cuda``, for calls that force that backend.
        save, backward: the gradient, ``save(ctx, inputs, output)`` and ``backward(ctx, *grads)`` as in
            ``torch.library.register_autograd``. Without them the gradient is the definition's, which for a backward
            op is what makes a gradient of a gradient right.
        backward_once: `backward` where no other pass will read what was saved and no gradient of the gradient is wanted, so that it
            may write over that; eager calls use it. ``ctx.wanted`` says which inputs need a gradient.
        expanded: an input may be expanded (its step along a dimension 0), which torch.compile is to leave so: it keeps only the
            order of strides else, and writes an expanded input out in full.
        public: the public functions this op serves, for ``backends.explain``; constants: their arguments for which no kernel
            finds a gradient, so that the definition serves where one requires it.
    """

    def __init__(
        self,
        schema: str,
        definition: Callable[..., Any],
        *,
        fake: Callable[..., Any],
        triton: str | None = None,
        composed: Callable[..., Any] | None = None,
        cuda: bool = False,
        save: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
        backward_once: Callable[..., Any] | None = None,
        expanded: bool = False,
        public: Sequence[str] = (),
        constants: Sequence[str] = (),
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.definition, self.constants = definition, tuple(constants)
        self._triton = triton
        self._launcher = composed
        LIBRARY.define(schema, tags=_EXACT_TAGS if expanded else _TAGS)
        LIBRARY.impl(self.name, definition, "CompositeExplicitAutograd")
        if composed is not None:
            LIBRARY.impl(self.name, composed, "CPU")
        if triton is not None or composed is not None:
            LIBRARY.impl(self.name, self.launch, "CUDA")
        torch.library.register_fake(f"fastllm::{self.name}", fake, lib=LIBRARY)
        self.torch_op = getattr(torch.ops.fastllm, self.name).default
        has_cpp = not cpp.unavailable() and torch._C._dispatch_has_kernel_for_dispatch_key(
            f"fastllm::{self.name}", "CPU"
        )
        self.kernels = frozenset(
            name
            for name, there in (
                ("torch", True),
                ("cpp", has_cpp),
                ("triton", triton is not None or composed is not None),
            )
            if there
        )
        # The devices whose tensors go straight to PyTorch's dispatcher because a kernel of this op is registered for them. On
        # any other the dispatcher has the definition, but below autograd, where a definition that differentiates finds nothing.
        served = {"cpu": has_cpp, "cuda": "triton" in self.kernels and _HAS_TRITON}
        self._devices = frozenset(device for device, there in served.items() if there)
        self.save, self.backward = save or _save_inputs, backward or self._backward_by_definition
        self.backward_once = backward_once
        # An op that writes over its input serves inside other ops, below autograd, and has no gradient of its own.
        self.mutates = self.torch_op._schema.is_mutable
        if not self.mutates:
            torch.library.register_autograd(
                f"fastllm::{self.name}", self.backward, setup_context=self.save, lib=LIBRARY
            )
        PUBLIC.update(dict.fromkeys(public, self))
        if cuda:
            self._define_cuda(schema, fake)

    def __call__(self, x: torch.Tensor, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._dispatch(x, *args)
        # torch.func transforms and forward-mode differentiation see through the definition.
        if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            if backends.forced not in (None, "torch"):
                raise BackendError(
                    f"{self.name}: backend {backends.forced!r} cannot serve torch.func transforms or forward-mode differentiation"
                )
            return self.definition(x, *args)
        # Eager calls skip the two crossings between Python and C++ that a gradient registered from Python costs.
        device = x.device.type
        if backends.forced is not None and backends.forced != backends.PREFERRED.get(device):
            return self._dispatch(x, *args)
        if x.dtype not in backends.KERNEL_DTYPES or device not in self._devices:
            return self._dispatch(x, *args)
        if torch.is_grad_enabled() and not self.mutates and torch._C._any_requires_grad(x, *args):
            return _apply(self, self.torch_op, x, *args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.torch_op(x, *args)

    def _dispatch(self, x: torch.Tensor, *args: Any) -> Any:
        backend = backends.select(self.name, self.kernels, x.device, x.dtype)
        if backend == "torch":
            return self.definition(x, *args)
        if backend == "triton" and x.device.type == "cpu":
            return self.launch(x, *args) if self.mutates else _Eager.apply(self, self.launch, x, *args)
        return self.cuda_op(x, *args) if backend == "cuda" else self.torch_op(x, *args)

    def _define_cuda(self, schema: str, fake: Callable[..., Any]) -> None:
        """Declares the op that the CUDA extension implements; CUDA tensors of the op itself are Triton's."""
        name = f"{self.name}_cuda"

        def backward(ctx: Any, *grads: Any) -> Any:
            with backends.use_backend("cuda"):
                return self.backward(ctx, *grads)

        LIBRARY.define(name + schema.removeprefix(self.name), tags=_TAGS)
        torch.library.register_fake(f"fastllm::{name}", fake, lib=LIBRARY)
        torch.library.register_autograd(f"fastllm::{name}", backward, setup_context=self.save, lib=LIBRARY)
        self.cuda_op = getattr(torch.ops.fastllm, name).default
        self.kernels |= {"cuda"}

    def launch(self, *args: Any) -> Any:
        """Runs the Triton kernel itself, without autograd, on the device of the first tensor: Triton takes the current one."""
        if self._launcher is None:
            assert self._triton is not None
            file, function = self._triton.split(":")
            self._launcher = getattr(importlib.import_module(f"fastllm.kernels.triton.{file}"), function)
        device = args[0].device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launcher(*args)
        return self._launcher(*args)

    def _backward_by_definition(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if is_tensor else other for is_tensor, other in ctx.layout]
        return vjp(self.definition, inputs, grads)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.layout = [(isinstance(i, torch.Tensor), None if isinstance(i, torch.Tensor) else i) for i in inputs]
    ctx.save_for_backward(*(i for i in inputs if isinstance(i, torch.Tensor)))


def vjp(definition: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Any]) -> tuple[Any, ...]:
    """Gradients of ``definition(*inputs)`` for output gradients `grads`, one per input (None: not differentiable).

    Differentiable itself when gradients are enabled, so that second derivatives exist.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), _autograd():
        wanted = [isinstance(i, torch.Tensor) and i.is_floating_point() for i in inputs]
        if again:
            inputs = [i.view_as(i) if w and i.requires_grad else i for i, w in zip(inputs, wanted)]
            wanted = [w and i.requires_grad for i, w in zip(inputs, wanted)]
        else:
            inputs = [i.detach().requires_grad_() if w else i for i, w in zip(inputs, wanted)]
        outputs = definition(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(o, g) for o, g in zip(outputs, grads) if o is not None and g is not None and o.requires_grad]
        found: tuple[Any, ...] = ()
        if pairs and any(wanted):
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [i for i, w in zip(inputs, wanted) if w],
                [g for _, g in pairs],
                create_graph=again,
                allow_unused=True,
            )
    each = iter(found or [None] * sum(wanted))
    return tuple(next(each) if w else None for w in wanted)


def _autograd() -> AbstractContextManager[Any]:
    """PyTorch's autograd where the dispatcher has left it behind: in a definition that it runs as the op's kernel."""
    if torch.compiler.is_compiling() or not torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOGRAD[1]):
        return nullcontext()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        excluded = excluded.remove(key)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


_AUTOGRAD = tuple(
    getattr(torch._C.DispatchKey, f"Autograd{name}") for name in ("Functionality", "Other", "NestedTensor")
)


# Whether the backward pass under way was told to retain the graph.
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph


def is_batched(grad: torch.Tensor) -> bool:
    """Whether it is one of torch.vmap, or of is_grads_batched."""
    return torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_batchedtensor(grad)


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether what is done with it may be on record, to be done again with other numbers: its own, if any, decide nothing."""
    return (
        type(tensor) is not torch.Tensor
        or torch._C._len_torch_dispatch_stack() > 0  # make_fx, FakeTensorMode
        or torch.compiler.is_compiling()
    )


class _Eager(torch.autograd.Function):
    """An op's own gradient rule around a direct call of its kernel."""

    @staticmethod
    def forward(ctx: Any, op: Op, kernel: Callable[..., Any], *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            output = kernel(*args)
        ctx.op, ctx.forced = op, backends.forced
        op.save(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        rule = ctx.op.backward
        once = ctx.op.backward_once and not (torch.is_grad_enabled() or keeps_graph())
        if once and not any([g is not None and is_batched(g) for g in grads]):
            rule, ctx.wanted = ctx.op.backward_once, ctx.needs_input_grad[2:]
        if ctx.forced is None:
            found = rule(ctx, *grads)
        else:
            with backends.use_backend(ctx.forced):
                found = rule(ctx, *grads)
        return (None, None, *found) if isinstance(found, tuple) else (None, None, found)


# Without Function.apply's own look at every argument for what torch.func left behind: only for kernels that PyTorch's dispatcher
# calls, which sees to that as well.
_apply = super(torch.autograd.Function, _Eager).apply
