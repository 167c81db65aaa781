"""What training a model takes, before it is begun: memory of each GPU under ZeRO 0 to 3 and offload, and what fits.

Activations come from a simulated step (``simulate.py``), the rest from counting. Sources: Rajbhandari et al., ZeRO (arXiv
1910.02054), for what each stage shards; DeepSpeed's own buffers as its versions 0.18 and 0.19 make them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastllm.errors import ConfigError
from fastllm.train import simulate
from fastllm.train.throughput import _first, peak_flops, step_flops

PRECISIONS = ("bf16", "fp32", "autocast", "pure-bf16")
OPTIMIZERS = {"adamw": 8, "adamw8bit": 2}  # bytes of two moments for each trained parameter, besides a master copy
_KERNELS = ("fused", "sdpa", "eager")  # fastllm's; transformers' own; those that store attention scores
SPARE = 0.06  # of the memory: the CUDA context, libraries' workspaces, what the allocator cannot use
LIVE_PARAMETERS = 1_000_000_000  # that ZeRO-3 keeps gathered: stage3_max_live_parameters


@dataclass(frozen=True)
class Layout:
    """Bytes on each GPU under one ZeRO stage, and on the host for each GPU. `total` is the peak of a step that keeps activations,
    `total_checkpointed` that of one that checkpoints every layer."""

    stage: int
    offload: str
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    total: int
    total_checkpointed: int
    host: int
    fits: bool | None
    fits_checkpointed: bool | None

    @property
    def name(self) -> str:
        return f"ZeRO-{self.stage}" + ("" if self.offload == "none" else f" + offload {self.offload}")


@dataclass(frozen=True)
class Plan:
    """What `memory` found; bytes throughout. `activations` are the peaks of a micro batch on one GPU, "kept" and
    "checkpointed", with fastllm's kernels ("fused"), with transformers' own ("sdpa": logits are stored) and with "eager" attention, which
    stores its scores too."""

    model: str
    parameters: int
    trained: int
    settings: dict[str, Any]
    activations: dict[str, dict[str, int]]
    layouts: list[Layout]
    recommended: str | None
    kv_bytes_per_token: int
    kv_tokens: int | None
    speed: dict[str, float] = field(default_factory=dict)

    def layout(self, stage: int, offload: str = "none") -> Layout:
        return next(one for one in self.layouts if (one.stage, one.offload) == (stage, offload))


def memory(
    model: Any,
    *,
    gpus: int = 1,
    gpu_memory: float | None = None,
    seq: int = 2048,
    batch: int = 1,
    accumulation: int = 1,
    precision: str = "bf16",
    optimizer: str = "adamw",
    lora: int | dict[str, Any] | None = None,
    device: str | None = None,
    mfu: float | None = None,
    link: float | None = None,
    patch: bool = True,
    compare: bool = True,
) -> Plan:
    """Plans full or LoRA training of a causal LM. No weights are made; a model of any size takes seconds.

    Args:
        model: a configuration of transformers.
        gpus: that share the work, data-parallel.
        gpu_memory: bytes of each; None: nothing is said of what fits.
        seq, batch: tokens of a row, and rows of a micro batch on each GPU. accumulation: micro batches of a step.
        precision: "bf16" as DeepSpeed has it (weights and gradients 2 bytes, a master copy in fp32), "fp32", "autocast" (weights
            in fp32, products in bf16; what ``bf16: true`` is without DeepSpeed) or "pure-bf16" (all in bf16, the moments too, and
            no copy in fp32; what ``dtype: bfloat16`` is without DeepSpeed).
        optimizer: "adamw" or "adamw8bit".
        lora: the rank of adapters on every linear layer, or fields of peft.LoraConfig; None: all weights are trained.
        device: a GPU's name whose peak is known, "H100" say; mfu: the share of it that training reaches. Both or neither.
        link: bytes a second that a GPU sends and receives at once.
        patch: with fastllm's kernels and fused loss.
        compare: say also what activations would be without them.

    Raises:
        ConfigError: a number or a name without meaning, or a model that is no causal LM.
    """
    _check(gpus, seq, batch, accumulation, precision, optimizer, gpu_memory, device, mfu, link)
    try:
        whole = _build(model, lora, precision, kernels="sdpa", checkpointing=False, count=None)
    except ConfigError:
        raise
    except Exception as error:  # of transformers and peft, of many types
        raise ConfigError(f"cannot build the model: {(str(error).strip().splitlines() or [''])[0]}") from error
    parameters = sum(p.numel() for p in whole.parameters())
    trained = sum(p.numel() for p in whole.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for p in whole.parameters())
    gradients = sum(p.numel() * p.element_size() for p in whole.parameters() if p.requires_grad)
    chosen = "fused" if patch else "sdpa"
    timelines = {
        kernels: {
            checkpointing: _simulated(model, lora, precision, batch, seq, kernels=kernels, checkpointing=checkpointing)
            for checkpointing in (False, True)
        }
        for kernels in (_KERNELS if compare else [chosen])
    }
    sizes = _Sizes(parameters, trained, weights, gradients, optimizer, precision, gpus, accumulation, _hidden(model))
    limit = None if gpu_memory is None else gpu_memory * (1 - SPARE)
    ways = [(stage, "none") for stage in range(4)] + [(2, "optimizer"), (3, "optimizer"), (3, "all")]
    layouts = [_layout(stage, offload, sizes, timelines[chosen], limit) for stage, offload in ways]
    per_token, tokens = _kv(model, 2 if precision != "fp32" else 4, gpu_memory, parameters)
    settings = {
        "gpus": gpus, "gpu_memory": gpu_memory, "seq": seq, "batch": batch, "accumulation": accumulation,
        "precision": precision, "optimizer": optimizer, "lora": lora, "patch": patch, "device": device, "mfu": mfu, "link": link,
    }  # fmt: skip
    name = type(whole.get_base_model() if lora else whole).__name__  # type: ignore[operator]
    activations = {
        kernels: {"kept": found[False].saved, "checkpointed": found[True].saved} for kernels, found in timelines.items()
    }
    return Plan(
        name, parameters, trained, settings, activations, layouts, _recommended(layouts), per_token, tokens,
        _speed(whole, sizes, seq, batch, device, mfu, link),
    )  # fmt: skip


# ---- memory ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sizes:
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: str
    precision: str
    gpus: int
    accumulation: int
    hidden: int


def _layout(
    stage: int, offload: str, sizes: _Sizes, timelines: dict[bool, simulate.Timeline], limit: float | None
) -> Layout:
    shards = sizes.gpus
    weights, gradients = sizes.weights, sizes.gradients
    optimizer = OPTIMIZERS[sizes.optimizer] * sizes.trained
    deepspeed = stage > 0 or sizes.precision == "bf16"
    if deepspeed:  # it steps on an fp32 copy, also of fp32 weights
        optimizer += 4 * sizes.trained
    elif sizes.precision == "pure-bf16" and sizes.optimizer == "adamw":
        optimizer //= 2  # moments in the dtype of the weights
    width = sizes.weights // max(1, sizes.parameters)
    buffers = 0
    if stage >= 1:
        optimizer = math.ceil(optimizer / shards)
    if stage >= 2:
        gradients = math.ceil(gradients / shards)
        buffers += 2 * width * sizes.hidden**2  # a bucket that is filled and one that is sent
    if stage == 3:
        weights = math.ceil(weights / shards)
        buffers += width * min(sizes.parameters, LIVE_PARAMETERS)
    elif stage == 0 and shards > 1 and not deepspeed:
        buffers += gradients  # DistributedDataParallel's buckets
    host = 0
    if offload != "none":
        host, optimizer = optimizer + gradients, 0
        gradients = 0
    if offload == "all":
        host, weights = host + weights, 0
    # In the optimizer's step DeepSpeed has the gradients of a shard, without ZeRO all of them, in fp32 once more.
    stepped = math.ceil(sizes.trained / shards) if stage else sizes.trained
    stepping = gradients + (4 * stepped if deepspeed and offload == "none" else 0)
    share = 1.0 if stage < 2 else gradients / max(1, sizes.gradients)
    held = stage > 0 or sizes.accumulation > 1
    totals = []
    for checkpointing in (False, True):
        running = timelines[checkpointing].peak(share, held=held)
        totals.append(weights + optimizer + buffers + max(running, stepping))
    fits = [None if limit is None else total <= limit for total in totals]
    return Layout(stage, offload, weights, gradients, optimizer, buffers, totals[0], totals[1], host, fits[0], fits[1])


def _recommended(layouts: list[Layout]) -> str | None:
    """The fastest that fits: rather more shards than checkpointing, rather that than offload."""
    if layouts[0].fits is None:
        return None
    for offloaded in (False, True):
        some = [one for one in layouts if (one.offload != "none") == offloaded]
        for one in some:
            if one.fits:
                return one.name
        for one in some:
            if one.fits_checkpointed:
                return f"{one.name} with checkpointing"
    return "none: more GPUs, a smaller micro batch, shorter rows or LoRA are needed"


def _kv(config: Any, width: int, gpu_memory: float | None, parameters: int) -> tuple[int, int | None]:
    """Bytes of the KV cache for a token in all layers, and the tokens that fit beside the weights, summed over rows."""
    text = config.get_text_config()
    heads = _first(text, "num_key_value_heads", "num_attention_heads", "n_head", "n_heads") or 1
    layers = _first(text, "num_hidden_layers", "n_layer", "n_layers") or 0
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    size = _first(text, "head_dim")
    if _first(text, "kv_lora_rank"):
        each = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim)
    else:
        whole = _first(text, "hidden_size", "n_embd", "d_model") or 0
        queries = _first(text, "num_attention_heads", "n_head", "n_heads") or 1
        each = heads * 2 * (size or whole // queries)
    per_token = width * each * sum("attention" in kind and "linear" not in kind for kind in kinds)
    if gpu_memory is None or not per_token:
        return per_token, None
    return per_token, max(0, int((gpu_memory * (1 - SPARE) - width * parameters) // per_token))


# ---- time --------------------------------------------------------------------------------------------------------


def _speed(
    model: nn.Module, sizes: _Sizes, seq: int, batch: int, device: str | None, mfu: float | None, link: float | None
) -> dict[str, float]:
    rows = batch * sizes.accumulation
    flops = step_flops(model, [seq] * rows)
    found = {"flops_per_gpu": flops.model}
    if device is not None and mfu is not None:
        peak = peak_flops(device, torch.bfloat16)
        if peak is None:
            raise ConfigError(f"the peak of {device!r} is not known")
        found["step_s"] = flops.model / (peak * mfu)
        found["tgs"] = seq * rows / found["step_s"]
    width = sizes.weights // max(1, sizes.parameters)
    others = (sizes.gpus - 1) / sizes.gpus
    # Weights are gathered for each forward and each backward pass, and gradients scattered, of every micro batch.
    gathered = 2 * sizes.weights * sizes.accumulation * others
    scattered = width * sizes.trained * sizes.accumulation * others
    found["zero3_bytes"] = gathered + scattered
    if link:
        found["zero3_s"] = found["zero3_bytes"] / link
    return found


# ---- models ------------------------------------------------------------------------------------------------------


def _build(
    config: Any, lora: Any, precision: str, *, kernels: str, checkpointing: bool, count: int | None
) -> nn.Module:
    """The model on the meta device, in the state in which training has it."""
    import transformers

    import fastllm

    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{type(config).__name__} describes no causal LM")
    dtype = torch.bfloat16 if precision.endswith("bf16") else torch.float32
    more = {"attn_implementation": "eager"} if kernels == "eager" else {}
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(simulate.shortened(config, count), dtype=dtype, **more)
    if lora:
        import peft

        settings = lora if isinstance(lora, dict) else {"r": lora, "target_modules": "all-linear"}
        adapters = peft.LoraConfig(**{"task_type": "CAUSAL_LM", **settings})
        model = peft.get_peft_model(model, adapters, low_cpu_mem_usage=True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    if checkpointing:
        newer = getattr(model, "activation_checkpointing_enable", None)  # the name since transformers 5.23
        (newer or model.gradient_checkpointing_enable)()
        if lora:
            model.enable_input_require_grads()
    if kernels == "fused":
        fastllm.patch(model, verify=False)
    return model


def _simulated(
    config: Any, lora: Any, precision: str, batch: int, seq: int, *, kernels: str, checkpointing: bool
) -> simulate.Timeline:
    text = config.get_text_config()
    layers = _first(text, "num_hidden_layers", "n_layer", "n_layers")
    assert layers is not None
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    # Where some layers are dense and others a mixture of experts, no one stands for all.
    mixed = _first(text, "first_k_dense_replace", "num_dense_layers", "decoder_sparse_step") or 0
    build: Callable[[int | None], nn.Module] = lambda count: _build(  # noqa: E731
        config, lora, precision, kernels=kernels, checkpointing=checkpointing, count=count
    )
    alike = len(set(kinds)) == 1 and mixed < 2
    try:
        return simulate.step(build, layers, alike, batch, seq, autocast=precision == "autocast")
    except Exception as error:  # of models whose code looks at values, which are not there
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"a step of {type(config).__name__}'s model cannot be simulated: {said}") from error


def _hidden(config: Any) -> int:
    return _first(config.get_text_config(), "hidden_size", "n_embd", "d_model") or 0


def _check(
    gpus: int, seq: int, batch: int, accumulation: int, precision: str, optimizer: str, gpu_memory: Any, device: Any,
    mfu: Any, link: Any,
) -> None:  # fmt: skip
    for name, value in (("gpus", gpus), ("seq", seq), ("batch", batch), ("accumulation", accumulation)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    for name, value in (("gpu_memory", gpu_memory), ("link", link)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} must be above 0, got {value}")
    if (device is None) != (mfu is None):
        raise ConfigError("device and mfu belong together: the peak, and the share of it that training reaches")
    if mfu is not None and not 0 < mfu <= 1:
        raise ConfigError(f"mfu must lie in (0, 1], got {mfu}")
