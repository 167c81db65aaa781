"""What a Transformers config says of RoPE."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastllm.errors import ConfigError

_LOCAL = ("sliding", "local", "chunked")


def is_local(kind: str) -> bool:
    """Whether a kind of layer attends within a fixed reach: other frequencies would gain it nothing."""
    return any(word in kind for word in _LOCAL)


def config_of(model_or_config: Any) -> Any:
    """The text config of a model, or of a config itself."""
    config = model_or_config if hasattr(model_or_config, "model_type") else getattr(model_or_config, "config", None)
    if config is None:
        raise ConfigError(f"{type(model_or_config).__name__} has no config")
    try:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        text.head_dim if hasattr(type(text), "head_dim") else None
    except Exception as error:  # of configs whose layers differ in it
        raise ConfigError(f"{type(config).__name__}: {' '.join(str(error).split())}") from error
    return text


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside wrappers of parallel training and compilation (DDP, DeepSpeed, torch.compile)."""
    for name in ("module", "_orig_mod"):
        inner = model._modules.get(name)
        if inner is not None and not hasattr(model.__dict__.get("config"), "model_type"):
            return unwrapped(inner)
    return model


def _nested(parameters: dict[str, Any]) -> bool:
    return bool(parameters) and all(v is None or isinstance(v, dict) for v in parameters.values())


def parameters_of(config: Any) -> dict[str, dict[str, Any]]:
    """RoPE parameters by kind of layer; "" where there is one kind."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        raise ConfigError(f"{type(config).__name__} has no RoPE parameters")
    if _nested(parameters):
        return {kind: dict(of_kind) for kind, of_kind in parameters.items() if of_kind}
    return {"": dict(parameters)}


def set_parameters(config: Any, after: dict[str, dict[str, Any]]) -> None:
    """The other way: those of the kinds in `after` replaced."""
    if "" in after:
        config.rope_parameters = dict(after[""])
    else:
        config.rope_parameters = {**config.rope_parameters, **{kind: dict(p) for kind, p in after.items()}}


def refusal(config: Any) -> str:
    """Why the config's own rules forbid its parameters, with which it would not load again: a family may take but some methods
    (Phi-3: longrope). Empty: they do not."""
    try:
        getattr(config, "validate_rope", lambda: None)()
    except Exception as error:  # of transformers, of many types
        return " ".join(str(error).split())
    return ""


def rescalable(config: Any, parameters: dict[str, dict[str, Any]]) -> list[str]:
    """The kinds of layers whose frequencies a longer text asks for: those of no fixed reach."""
    layers = getattr(config, "layer_types", None) or ()
    if all(is_local(kind) for kind in (layers if layers and "" not in parameters else parameters)):
        raise ConfigError(
            f"every layer with RoPE of {type(config).__name__} attends within a fixed reach, and other frequencies would gain it "
            "nothing"
        )
    return [kind for kind in parameters if not is_local(kind)]


def trained_length(config: Any, before: dict[str, dict[str, Any]]) -> int:
    for old in before.values():
        if found := old.get("original_max_position_embeddings"):
            return int(found)
    found = getattr(config, "original_max_position_embeddings", None) or getattr(
        config, "max_position_embeddings", None
    )
    if found is None:
        raise ConfigError("the config tells no trained length: give original_length=")
    return int(found)


def base_of(parameters: dict[str, Any]) -> float:
    base = parameters.get("rope_theta")
    if base is None:
        raise ConfigError(f"the config tells no rope_theta: its RoPE parameters are {parameters}")
    return float(base)


def rotated(config: Any, parameters: dict[str, Any]) -> int:
    """Rotated dimensions of a head."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if getattr(config, "qk_rope_head_dim", None):
        head = config.qk_rope_head_dim
    return int(head * parameters.get("partial_rotary_factor", 1.0))
