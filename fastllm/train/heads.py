"""What goes into and comes out of a model's head, through whatever wraps the model: DDP, DeepSpeed, PEFT, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastllm.errors import ConfigError
from fastllm.patching.deferred import DeferredLogits


@dataclass(frozen=True)
class HeadInput:
    """The hidden states (B, T, C) that reach the LM head, the head, and what the model does with logits, as keyword arguments
    of the losses from hidden states."""

    hidden: Tensor
    head: nn.Module
    options: dict[str, Any]


def hidden_states(model: Any, inner: Any, **inputs: Any) -> HeadInput:
    """Runs a causal LM up to its head: no logits are made.

    Args:
        model: called with `inputs`, as training calls it.
        inner: the causal LM within `model`, with adapters if it has them. It must not be patched with fastllm's "loss".

    Raises:
        ConfigError: a model without an LM head, or whose logits are more than the head's, scaled and soft-capped.
    """
    head = inner.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise ConfigError(f"{type(inner).__name__} has no LM head")
    before = head.__dict__.get("forward")
    head.__dict__["forward"] = lambda hidden: _Unmade(hidden, head.weight, None)  # type: ignore[arg-type]
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        if before is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = before
    if not isinstance(logits, _Unmade):
        raise ConfigError(f"the logits of {type(inner).__name__} do not come from its output embeddings")
    scale, softcap = logits.scale, logits.softcap
    if softcap is None:
        return HeadInput(logits.hidden, head, {"logit_scale": scale})
    # softcap tanh(scale z) = softcap tanh((scale softcap) z / softcap)
    return HeadInput(logits.hidden, head, {"logit_scale": scale * softcap, "softcap": softcap})


class _Unmade(DeferredLogits):
    def _compute(self) -> Tensor:
        raise ConfigError(
            "this model does more with its logits than to scale and soft-cap them, which a loss without logits does not know"
        )


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets what `module` returns while the block runs."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()
