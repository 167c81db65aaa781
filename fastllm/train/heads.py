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


# ---- scores ----------------------------------------------------------------------------------------------------------


def score_head(model: Any) -> nn.Module:
    """The layer of a sequence classifier that makes one number of every token's last hidden state.

    Args:
        model: of transformers, with LoRA adapters or without.

    Raises:
        ConfigError: a model that makes its score of anything else, or more than one.
    """
    plain = bare_model(model)
    body = plain.base_model
    found = [m for m in plain.children() if m is not body and any(True for _ in m.parameters())]
    weight = getattr(found[0], "weight", None) if len(found) == 1 and getattr(body, "pooler", None) is None else None
    if weight is None or getattr(weight, "ds_shape", weight.shape)[0] != 1:
        raise ConfigError(
            f"a reward model or critic has one layer that scores every token, which {type(plain).__name__} has not"
        )
    return found[0]


def bare_model(model: Any) -> Any:
    """The transformers model, with adapters in it or not, within a PeftModel."""
    return model.get_base_model() if hasattr(model, "peft_config") else model
