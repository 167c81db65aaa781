"""The causal-LM loss: head, scale, soft-cap and cross entropy in one op, logits never stored whole.

The head returns deferred logits while training; the model's loss function turns them into linear_cross_entropy. Whatever
else a model, an adapter or a user does with them computes the real logits. A head that something wraps, watches or
shards is called as ever, and only the cross entropy is fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastllm import ops
from fastllm.patching import probing
from fastllm.patching.deferred import Deferred, DeferredLogits
from fastllm.patching.replacement import Replacement, occupied, original_forward, slot_of
from fastllm.patching.report import Skipped
from fastllm.patching.rules import Found, has_hooks

OP = "loss"
KERNEL = "linear_cross_entropy"


def find(model: nn.Module) -> Iterator[Found | Skipped]:
    from transformers.loss.loss_utils import ForCausalLMLoss

    for path, module in model.named_modules():
        if not hasattr(type(module), "loss_function") or not hasattr(module, "get_output_embeddings"):
            continue
        if not _calls(type(module).forward, "loss_function"):
            continue
        there = module.__dict__.get("_loss_function")
        mine = isinstance(there, Replacement)
        if not mine and module.loss_function is not ForCausalLMLoss:
            yield Skipped(
                path, OP, f"its loss is {getattr(module.loss_function, '__name__', 'custom')}, not the causal-LM loss"
            )
            continue
        yield Found(path, module, "_loss_function", {"part": "loss"}, "loss")
        head = module.get_output_embeddings()
        name = next((n for n, m in module.named_modules() if m is head), None)
        where = f"{path}.{name}" if path and name else (name or path)
        if name is None or type(head) is not nn.Linear:
            yield Skipped(
                where or path,
                OP,
                "the head stays as it is, for it is no plain nn.Linear: its logits are computed, their cross entropy is fused",
            )
        elif occupied(head, slot_of(head)) or occupied(module, slot_of(module)):
            yield Skipped(
                where,
                OP,
                "the head stays as it is, for its forward was replaced by other code: its logits are computed, their cross "
                "entropy is fused",
            )
        else:
            yield Found(where, head, slot_of(head), {"part": "head"}, "head", auxiliary=True)
            yield Found(path, module, slot_of(module), {"part": "model"}, "model", auxiliary=True)


def bind(module: nn.Module, settings: dict[str, Any]) -> Callable[..., Any]:
    return {"loss": _bind_loss, "head": _bind_head, "model": _bind_model}[settings["part"]](module)


def verify(found: Found, dtype: torch.dtype) -> str:
    if found.settings["part"] != "head":
        return ""  # the loss is verified with its head; the model's forward is its own
    from transformers.loss.loss_utils import ForCausalLMLoss

    head = nn.Linear(24, 53, bias=found.module.bias is not None, device="meta")  # initialising draws random numbers
    weight = probing.random((53, 24), dtype, probing.device_of(found.module))
    head.weight = nn.Parameter(weight)
    if head.bias is not None:
        head.bias = nn.Parameter(probing.random((53,), dtype, weight.device))
    hidden = probing.random((2, 9, 24), dtype, weight.device)
    labels = torch.arange(18, device=weight.device).view(2, 9) % 53
    labels[0, 3] = labels[1, 8] = -100
    deferred, loss = _bind_head(head), _bind_loss(head)
    for items in (None, torch.tensor(11.0, device=weight.device)):
        problem = probing.disagreement(
            lambda h: ForCausalLMLoss(original_forward(head)(h) / 2.0, labels, 53, num_items_in_batch=items),  # noqa: B023
            lambda h: loss(deferred(h) / 2.0, labels, 53, num_items_in_batch=items),  # noqa: B023
            [hidden], list(head.parameters()), dtype,
        )  # fmt: skip
        if problem:
            return problem
    return ""


def _calls(forward: Any, name: str) -> bool:
    while forward is not None:
        if name in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _bind_head(head: nn.Module) -> Callable[[Tensor], Any]:
    def forward(hidden: Tensor) -> Any:
        weight: Any = head.weight
        bias: Any = head.bias
        whole = type(weight) is nn.Parameter and not hasattr(weight, "ds_id") and not hasattr(weight, "_fsdp_flattened")
        if not (head.training and torch.is_grad_enabled() and whole) or has_hooks(head) or "_hf_hook" in head.__dict__:
            return F.linear(hidden, weight, bias)
        return DeferredLogits(hidden, weight, bias)

    return forward


def _bind_model(model: nn.Module) -> Callable[..., Any]:
    """The class's forward; deferred logits leave it only beside a loss, for which they were computed in part already."""
    forward = original_forward(model)

    def run(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if isinstance(output, tuple):
            return output if isinstance(output[0], Tensor) and output[0].dim() == 0 else _real(output)
        logits = getattr(output, "logits", None)
        if isinstance(logits, Deferred) and output.loss is None:
            output.logits = logits.tensor()
        return output

    return run


def _real(output: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(o.tensor() if isinstance(o, Deferred) else o for o in output)


def _bind_loss(_: nn.Module) -> Callable[..., Tensor]:
    return causal_lm_loss


def causal_lm_loss(
    logits: Tensor | DeferredLogits,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss: tokens < n predict token n; the sum is divided by num_items_in_batch where given."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:].contiguous()
    target = shift_labels.reshape(-1).to(logits.device)
    options: dict[str, Any] = {"ignore_index": ignore_index, "num_items": num_items_in_batch}
    if isinstance(num_items_in_batch, Tensor):
        options["num_items"] = num_items_in_batch.to(logits.device)
    if isinstance(logits, DeferredLogits) and logits._computed is None and logits.weight.shape[0] == vocab_size:
        scale, softcap = logits.scale, logits.softcap
        if softcap is not None:  # softcap tanh(scale z) = softcap tanh((scale softcap) z / softcap)
            scale *= softcap
        hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
        return ops.linear_cross_entropy(
            hidden, logits.weight, target, bias=logits.bias, softcap=softcap, logit_scale=scale, **options
        )
    real = logits.tensor() if isinstance(logits, Deferred) else logits
    return ops.cross_entropy(real.view(-1, vocab_size), target, **options)
