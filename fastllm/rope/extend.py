"""extend_context and restore_context: a model reads further than it was trained to, and it is proven that it does."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.errors import ConfigError
from fastllm.rope import angles, laws, lengthwise
from fastllm.rope._config import (
    base_of,
    config_of,
    parameters_of,
    refusal,
    rescalable,
    rotated,
    set_parameters,
    trained_length,
    unwrapped,
)
from fastllm.rope.scaling import _METHODS, METHODS, scaling

_KEPT = "_fastllm_context"  # where a model keeps what restore_context needs
# What a config of transformers calls each method; the others by their own names.
_OF_METHODS = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "exponent", "beta_fast", "beta_slow",
    "truncate", "mscale", "mscale_all_dim", "attention_factor", "low_freq_factor", "high_freq_factor", "short_factor",
    "long_factor",
}  # fmt: skip
_BY_FACTOR = ("linear", "ntk", "ntk_mixed", "dynamic", "yarn", "llama3")  # nothing else of them changes a frequency
_TYPES = {"abf": "default", "dynamic": lengthwise.DOUBLING}


@dataclass(frozen=True)
class Extension:
    """What extend_context did.

    before, after: RoPE parameters by kind of layer ("" where all are of one kind). length_before, length: tokens.
    factor: how far the frequencies are stretched; length / original_length unless it was given. bound: tokens up to which the
    scaling laws predict that a model tuned so can read; None where they say nothing of the method. needs_tuning: whether perplexity
    is worse than without the method, at any position, until the model was tuned.
    """

    method: str
    original_length: int
    length_before: int
    length: int
    factor: float
    before: dict[str, dict[str, Any]]
    after: dict[str, dict[str, Any]]
    bound: float | None
    needs_tuning: bool
    modules: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.method}: {self.length_before:,} -> {self.length:,} tokens by a factor of {self.factor:.3g}; trained for "
            f"{self.original_length:,}; in {', '.join(self.modules)}"
        ]
        for kind, after in self.after.items():
            lines.append(f"  {kind or 'all layers'}: {self.before[kind]} -> {after}")
        if self.bound is not None:
            lines.append(f"  predicted bound once tuned: {self.bound:,.0f} tokens")
        if self.needs_tuning:
            lines.append("  worse than before until the model is tuned at the new length")
        return "\n".join(lines)


def extend_context(model: nn.Module, max_length: int, method: str = "yarn", **params: Any) -> Extension:
    """Rescales the rotary embeddings of a Transformers model, patched or not, for `max_length` tokens.

    Every rotary module is rebuilt with the new frequencies, in fp32 whatever the model's dtype, and the config says so, so that
    save_pretrained and from_pretrained give the same model; its angles are exact at any position. Layers of a fixed reach (sliding
    windows, where they have a RoPE of their own) stay as they are. The effect is proven: frequencies, and logits beyond the old
    length, must have changed.
    Extending an extended model starts again from the trained length.

    Args:
        model: a Transformers model with RoPE, or a wrapper around one (PEFT, DDP, DeepSpeed, torch.compile).
        max_length: tokens to read.
        method: "yarn" (the lowest perplexity without tuning), "linear", "ntk", "ntk_mixed", "dynamic", "llama3", "longrope",
            "abf"; what they are says ``fastllm.rope.scaling``.
        **params: of the method; ``factor`` is max_length / trained length unless given; ``adjusted_base`` of "abf" is the base by
            which the laws reach max_length; ``original_length`` replaces the trained length that the config tells.

    Returns:
        Extension: before, after, the factor and the predicted bound; printed, a few lines.

    Raises:
        ConfigError: no RoPE in the model, a length that is not positive, an unknown method or parameter, no trained length to be
            found, or frequencies and logits that did not change.

    Warns:
        UserWarning: a target beyond the predicted bound.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    with torch.inference_mode(False):  # frequencies made under it could not be trained with
        return _extended(unwrapped(model), max_length, method, params)


def _extended(model: nn.Module, max_length: int, method: str, params: dict[str, Any]) -> Extension:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise ConfigError(f"max_length must be a number of tokens, at least 1, got {max_length!r}")
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    config = config_of(model)
    rotary = dict(_rotary_modules(model, config))
    if not rotary or not getattr(config, "rope_parameters", None):
        raise ConfigError(f"{type(model).__name__} has no rotary position embedding to rescale")
    _derived_elsewhere(model)
    current = _state(config, rotary)
    holder = next(iter(rotary.values()))  # wrappers of the model come and go; this module stays
    kept = holder.__dict__.get(_KEPT, current)
    length_before, parameters_before = getattr(config, "max_position_embeddings", 0), parameters_of(config)
    try:
        _put_back(model, kept)
        plan = _plan(config, max_length, method, dict(params))
        modules = _apply(model, config, rotary, plan)
    except BaseException:
        _put_back(model, current)
        raise
    holder.__dict__[_KEPT] = kept
    if plan.bound is not None and max_length > plan.bound:
        warnings.warn(
            f"{max_length} tokens lie beyond the {plan.bound:,.0f} that the scaling laws predict for this base",
            stacklevel=3,
        )
    return Extension(
        method, plan.original, length_before, max_length, plan.factor, {k: parameters_before[k] for k in plan.after}, plan.after,
        plan.bound, method == "linear", modules,
    )  # fmt: skip


def restore_context(model: nn.Module) -> None:
    """Undoes ``extend_context``: frequencies and config are what they were, to the last bit. Nothing to a model not extended."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    for module in list(model.modules()):
        if kept := module.__dict__.pop(_KEPT, None):
            _put_back(model, kept)


@dataclass(frozen=True)
class _Plan:
    method: str
    length: int
    original: int
    factor: float
    after: dict[str, dict[str, Any]]
    bound: float | None


def _plan(config: Any, max_length: int, method: str, params: dict[str, Any]) -> _Plan:
    """The RoPE parameters to come, all of them checked."""
    for name in ("head_dim", "base", "length"):
        if name in params:
            raise ConfigError(f"{name} is the model's own, and no parameter of {method}")
    before = parameters_of(config)
    original, factor = params.pop("original_length", None), params.pop("factor", None)
    original = trained_length(config, before) if original is None else original
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise ConfigError(f"original_length must be a number of tokens, at least 1, got {original!r}")
    reads = max(original, getattr(config, "max_position_embeddings", None) or 0)
    if factor is None and max_length <= reads and not params and not _follows(before):
        raise ConfigError(f"max_length must lie beyond the {reads} tokens that the model reads, got {max_length}")
    if max_length <= original:
        raise ConfigError(f"max_length must lie beyond the {original} tokens of the training, got {max_length}")
    factor = max_length / original if factor is None else factor
    if method in _BY_FACTOR and factor == 1 and not isinstance(factor, bool):
        raise ConfigError(f"factor must be greater than 1 for {method} to change anything, got {factor!r}")
    after, dims = {}, {}
    for kind in rescalable(config, before):
        old = before[kind]
        dims[kind] = rotated(config, old)
        after[kind] = _rescaled(method, old, dims[kind], original, max_length, factor, params)
    return _Plan(method, max_length, original, factor, after, _bound(method, after, dims, original, before))


def _apply(model: nn.Module, config: Any, rotary: dict[str, nn.Module], plan: _Plan) -> list[str]:
    """Changes config and modules and proves that it told; returns the paths of the modules."""
    follows = plan.method in ("dynamic", "longrope")
    same = all(parameters_of(config)[kind] == new for kind, new in plan.after.items())  # loaded again, say
    name = type(model).__name__
    for path, module in rotary.items():
        if _computes_its_own(module) or not _as_told(module, config):
            raise ConfigError(
                f"{path} of {name} does not have the frequencies that its config tells: its RoPE is not of the usual kind"
            )
    old_logits, positions = _logits(model, config, plan.original)
    set_parameters(config, plan.after)
    # "dynamic" finds its factor from this number, which stays that of the training
    config.max_position_embeddings = plan.original if plan.method == "dynamic" else max(plan.length, plan.original)
    if plan.method in ("linear", "abf"):  # their parameters have no room for it
        config.original_max_position_embeddings = plan.original
    if why := refusal(config):
        raise ConfigError(f"{type(config).__name__} does not take {plan.method}: {why}")
    changed = [name for name, module in rotary.items() if _rebuild(module, config)]
    for path, module in rotary.items():
        if follows:
            lengthwise.install(_owner(model, path), module)
        else:
            angles.install(module)
    if same and follows:
        return list(rotary)
    if not changed and not follows:
        raise ConfigError(f"{plan.method} did not change any frequency of {name}: they are already what it asks for")
    new_logits, _ = _logits(model, config, plan.original, positions)
    if old_logits is not None and new_logits is not None and torch.equal(old_logits, new_logits):
        raise ConfigError(
            f"{plan.method} changed the frequencies of {name}, but not its logits past {plan.original} tokens"
        )
    return changed or list(rotary)


# ---- what is there ---------------------------------------------------------------------------------------------------


def _rotary_modules(model: nn.Module, config: Any) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold frequencies and were built from this config: not those of towers or decoders with one of their own."""
    for name, module in model.named_modules():
        holds = any(buffer.endswith("inv_freq") for buffer in module._buffers)
        own = getattr(module, "config", None)
        if holds and getattr(own, "previous", own) is config:
            yield name, module


def _derived_elsewhere(model: nn.Module) -> None:
    """Some attentions scale their scores by RoPE parameters that only their constructor reads."""
    for module in model.modules():
        code = getattr(type(module).__init__, "__code__", None)
        if code is not None and any("mscale" in str(word) for word in (*code.co_names, *code.co_consts)):
            raise ConfigError(
                f"{type(module).__name__} finds its scale from RoPE parameters when it is built: change the config and load the "
                "model again"
            )


def _follows(before: dict[str, dict[str, Any]]) -> bool:
    return any(of_kind.get("rope_type") in lengthwise.KINDS for of_kind in before.values())


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module whose forward makes positions and calls the rotary module `name`."""
    return model.get_submodule(name.rpartition(".")[0])


def _rescaled(
    method: str, old: dict[str, Any], dim: int, original: int, length: int, factor: float, params: dict[str, Any]
) -> dict[str, Any]:
    """The RoPE parameters of a config for this method; `params` are checked by trying them."""
    base, params = base_of(old), dict(params)
    kept = {k: v for k, v in old.items() if k not in _OF_METHODS}  # of the family: partial rotation, sections, ...
    if old.get("rope_type") == _TYPES.get(method, method):  # its own settings, unless others are given
        known = inspect.signature(_METHODS[method]).parameters
        params = {k: v for k, v in old.items() if k in known and k != "rope"} | params
    if method == "abf" and params.get("adjusted_base") is None:
        params["adjusted_base"] = laws.base_for(dim, base, original, length)
    scaling(method, head_dim=dim, base=base, original_length=original, factor=factor, length=length, **params)
    new = {"rope_type": _TYPES.get(method, method), "rope_theta": base, **kept}
    if method == "abf":
        return new | {"rope_theta": float(params["adjusted_base"])}
    if method == "default":
        return new
    if method == "llama3":
        params = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} | params
    new |= {"factor": float(factor), **{k: list(v) if isinstance(v, tuple) else v for k, v in params.items()}}
    if method != "linear":
        new["original_max_position_embeddings"] = original
    return new


def _bound(
    method: str,
    after: dict[str, dict[str, Any]],
    dims: dict[str, int],
    original: int,
    before: dict[str, dict[str, Any]],
) -> float | None:
    if method not in ("abf", "ntk"):
        return None
    bounds = []
    for kind, new in after.items():
        dim, base = dims[kind], float(new["rope_theta"])
        if method == "ntk" and dim > 2:
            base *= new["factor"] ** (dim / (dim - 2))
        bounds.append(laws.max_context(dim, base, original, pretrained_base=float(before[kind]["rope_theta"])))
    return min(bounds)


# ---- changing it -----------------------------------------------------------------------------------------------------


def _built(module: nn.Module, config: Any) -> nn.Module:
    """What a rotary module's constructor makes of the config now."""
    try:
        with torch.device("cpu"):
            return type(module)(config)
    except Exception as error:  # of a constructor of transformers, of many types
        raise ConfigError(f"{type(module).__name__} cannot be built: {' '.join(str(error).split())}") from error


def _as_told(module: nn.Module, config: Any) -> bool:
    """Whether a rotary module's frequencies are those of its config, as far as their dtype holds them; frequencies that follow
    the text are what they were last."""
    parameters = config.rope_parameters
    kinds = [of for of in ([parameters] if "rope_type" in parameters else parameters.values()) if of]
    if any("dynamic" in of.get("rope_type", "") or of.get("rope_type") == "longrope" for of in kinds):
        return True
    fresh = _built(module, config)
    for name, value in fresh._buffers.items():
        there = module._buffers.get(name)
        if there is None or value is None or there.device.type == "meta" or not name.endswith("inv_freq"):
            continue
        if there.shape != value.shape or not torch.allclose(there.cpu(), value.to(there.dtype), rtol=1e-2, atol=1e-7):
            return False
    return True


def _computes_its_own(module: nn.Module) -> bool:
    """Whether a rotary module finds its frequencies anew at every call (PhiMoE), and does not read those that it holds."""
    return "rope_init_fn" in inspect.unwrap(type(module).forward).__code__.co_names


def _rebuild(module: nn.Module, config: Any) -> bool:
    """Gives a rotary module what its constructor makes of the config now; True where frequencies are others than before."""
    before = dict(module._buffers)
    fresh = _built(module, config)
    module.__dict__.update(_attributes(fresh))
    changed = False
    for name, value in fresh._buffers.items():
        there = before.get(name)
        on_device = there is not None and there.device.type != "meta"
        module._buffers[name] = value.to(there.device) if value is not None and on_device else value  # type: ignore[union-attr]
        if name.endswith("inv_freq") and value is not None:
            same = on_device and there.shape == value.shape and torch.equal(there.float().cpu(), value.float())  # type: ignore[union-attr]
            changed |= not same
    return changed


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Numbers and names that a rotary module keeps beside its buffers."""
    plain = (int, float, str, dict, list)
    return {
        name: copy.copy(value)
        for name, value in vars(module).items()
        if isinstance(value, plain) and not name.startswith("_") and name != "training"
    }


def _state(config: Any, rotary: dict[str, nn.Module]) -> dict[str, Any]:
    return {
        "rope_parameters": copy.deepcopy(config.rope_parameters),
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        "original_length": getattr(config, "original_max_position_embeddings", None),
        "follows": any(isinstance(m.__dict__.get("forward"), lengthwise.Frequencies) for m in rotary.values()),
        "exact": any(angles.installed(module) for module in rotary.values()),
        "rotary": [
            {
                "attributes": _attributes(module),
                "buffers": {k: None if v is None else v.clone() for k, v in module._buffers.items()},
            }
            for module in rotary.values()
        ],
    }


def _put_back(model: nn.Module, kept: dict[str, Any]) -> None:
    config = config_of(model)
    config.rope_parameters = copy.deepcopy(kept["rope_parameters"])
    config.max_position_embeddings = kept["max_position_embeddings"]
    if kept["original_length"] is None:
        config.__dict__.pop("original_max_position_embeddings", None)
    for (name, module), state in zip(dict(_rotary_modules(model, config)).items(), kept["rotary"]):
        lengthwise.remove(_owner(model, name), module)
        angles.remove(module)
        module.__dict__.update({k: copy.copy(v) for k, v in state["attributes"].items()})
        for buffer, value in state["buffers"].items():
            there = module._buffers.get(buffer)
            real = value is not None and value.device.type != "meta"
            device = there.device if real and there is not None and there.device.type != "meta" else None
            module._buffers[buffer] = value if value is None or device is None else value.to(device)
        for buffer in set(module._buffers) - set(state["buffers"]):
            del module._buffers[buffer]
        if kept["follows"]:
            lengthwise.install(_owner(model, name), module)
        elif kept["exact"]:
            angles.install(module)


# ---- the proof -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _logits(
    model: nn.Module, config: Any, original: int, positions: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Logits of a few tokens past the trained length; None of a model that cannot run now (no weights yet) or takes no
    positions."""
    parameter = next(iter(model.parameters()), None)
    if parameter is None or parameter.device.type == "meta" or hasattr(parameter, "ds_id"):
        return None, None
    tokens = torch.arange(4, device=parameter.device).unsqueeze(0) % config.vocab_size
    if positions is None:
        positions = torch.tensor([[0, original // 2, original, original + 1]], device=parameter.device)
    training = {m: m.training for m in model.modules()}
    for module in training:  # not by eval(), which some modules do more at
        module.training = False
    decoder = {"decoder_input_ids": tokens} if getattr(model.config, "is_encoder_decoder", False) else {}
    try:
        out = model(input_ids=tokens, position_ids=positions, use_cache=False, **decoder)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        return None, positions
    except (ValueError, RuntimeError, AttributeError, LookupError) as error:
        said = " ".join(str(error).split())
        raise ConfigError(f"{type(model).__name__} cannot be tried: {type(error).__name__}: {said}") from error
    finally:
        for module, was in training.items():
            module.training = was
    found = getattr(out, "logits", None)
    return (found if found is not None else out[0]).clone(), positions
