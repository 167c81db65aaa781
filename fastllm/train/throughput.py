"""How much work a training step is, and how fast it was done: tokens per second and device, TFLOPS, MFU, HFU.

Model FLOPs are those that the mathematics asks for, whatever the kernels do; hardware FLOPs add the forward pass that
activation checkpointing repeats. Both count matrix products only, a multiplication and an addition as two.
Sources: Chowdhery et al., PaLM (arXiv 2204.02311), appendix B; Korthikanti et al. (arXiv 2205.05198) for hardware FLOPs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Dense peak of the matrix units in bf16 and fp16, operations a second, from the makers' data sheets. The first name that
# the device's own contains counts. H100 without more is the SXM module.
_PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}
CONVENTIONS = ("causal", "palm")


def peak_flops(device: str | torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second that the matrix units of `device` do at best in `dtype`, dense; None where that is not known.

    Args:
        device: a torch device, or the name of one as ``torch.cuda.get_device_name`` gives it.
        dtype: of the operands. Peaks are known for bf16 and fp16; fp32's depends on torch's settings for TF32.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    words = device.replace("-", " ").split()
    if "MIG" in words:  # a part of a GPU
        return None
    for name, peak in _PEAKS.items():
        if all(word in words for word in name.split()):
            return peak
    return None


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one training step: `model` as the mathematics asks, `hardware` with what checkpointing repeats."""

    model: float
    hardware: float


@dataclass(frozen=True)
class Throughput:
    """What a step, or many, did in `seconds` on `devices`. Tokens are counted three ways: every position of the batch,
    those that are not padding, and those whose prediction is trained on."""

    seconds: float
    tokens: int
    real_tokens: int
    trainable_tokens: int
    flops: StepFlops
    devices: int = 1
    peak: float | None = None  # operations a second of one device, see peak_flops

    @property
    def tokens_per_s(self) -> float:
        """TGS over all positions: tokens per second and device."""
        return self.tokens / self.seconds / self.devices

    @property
    def real_tokens_per_s(self) -> float:
        return self.real_tokens / self.seconds / self.devices

    @property
    def trainable_tokens_per_s(self) -> float:
        return self.trainable_tokens / self.seconds / self.devices

    @property
    def tflops(self) -> float:
        """Model TFLOPS of one device."""
        return self.flops.model / self.seconds / self.devices / 1e12

    @property
    def hardware_tflops(self) -> float:
        return self.flops.hardware / self.seconds / self.devices / 1e12

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: the share of the peak; None where the peak is not known."""
        return self.tflops * 1e12 / self.peak if self.peak else None

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs utilisation."""
        return self.hardware_tflops * 1e12 / self.peak if self.peak else None


def step_flops(
    model: nn.Module, lengths: Sequence[int], *, convention: str = "causal", logits: int | None = None
) -> StepFlops:
    """FLOPs of one training step (forward and backward) of a causal language model of Transformers.

    A token costs 6·(N - N_embedding): 2 for each weight forward, 2 for the gradient of the activations, 2 for that of the
    weight. A frozen weight takes 4, and 2 where nothing before it is trained, so that no gradient goes further down (but for what is
    beside the first trained weight within its layer, of which up to 2 too many are counted: with LoRA 0.3 % of a 7B model). A weight of
    an expert counts for the share of the experts that a token visits. A table that only looks up counts nothing, a head tied to
    it does. Attention costs 6·H·D·Σs² per layer under the causal mask, less where a window hides more; D is the mean of the
    widths of keys and values where they differ. Padding is not work: FLOPs are those of the real tokens. Towers for images and
    sound are left out.

    Args:
        model: plain, patched, wrapped by PEFT, or with parameters sharded by ZeRO-3. Layers for which gradient
            checkpointing is on add their forward pass to `hardware`.
        lengths: real tokens of every document in the batch, without padding: rows, or the parts of packed rows.
        convention: "causal", or "palm" for 12·H·D·Σs², PaLM's count without the causal discount.
        logits: tokens that the LM head works for; default: all.

    Raises:
        ValueError: unknown convention, a negative length, or a model whose config does not tell its attention heads.
    """
    return StepCost(model, convention=convention)(lengths, logits)


class StepCost:
    """``step_flops`` of one model for many steps: the model is walked through once, for as long as `holds`.

    Args, Raises: as ``step_flops``.
    """

    def __init__(self, model: nn.Module, *, convention: str = "causal") -> None:
        model = _checked(model, (), convention)
        self.convention = convention
        self._parameters = list(model.parameters())
        self._layers = [m for m in model.modules() if isinstance(getattr(m, "gradient_checkpointing", None), bool)]
        self._state = self._now()
        repeated = _checkpointed(model)
        first = (
            None if repeated.share else _first_trained(model)
        )  # checkpointing has gradients go down to the embedding
        self._share, self._of_token, self._of_logits, self._again = repeated.share, 0.0, 0.0, 0.0
        below, head = first is not None, _head(model)
        for name, parameter, used in _weights(model):
            below = below and name != first and not parameter.requires_grad
            cost = 2.0 * used * (3 if parameter.requires_grad else 1 if below else 2)
            if id(parameter) in head:
                self._of_logits += cost
            else:
                self._of_token += cost
            if name in repeated.parameters:
                self._again += 2.0 * used
        layers = list(_attention_layers(model))
        layer = _layer_of(first)  # below it nothing runs backward; below the head, nothing at all
        untouched = 0 if first is None else len(layers) if layer is None else layer
        self._attention, self._untouched = Counter(layers), Counter(layers[:untouched])

    def _now(self) -> list[bool]:
        return [p.requires_grad for p in self._parameters] + [bool(m.gradient_checkpointing) for m in self._layers]

    @property
    def holds(self) -> bool:
        """Whether the model trains and checkpoints what it did."""
        return self._now() == self._state

    def __call__(self, lengths: Sequence[int], logits: int | None = None) -> StepFlops:
        if any(length < 0 for length in lengths):
            raise ValueError(f"lengths must not be negative, got {min(lengths)}")
        tokens = sum(lengths)

        def forward(layers: Counter[tuple[float, int | None, bool]]) -> float:
            return sum(count * _attention_forward(*layer, lengths, self.convention) for layer, count in layers.items())

        whole = forward(self._attention)
        model = self._of_token * tokens + self._of_logits * (tokens if logits is None else logits)
        model += 3 * whole - 2 * forward(self._untouched)
        return StepFlops(model, model + self._again * tokens + whole * self._share)


def forward_flops(
    model: nn.Module, lengths: Sequence[int], *, convention: str = "causal", adapters: bool = True, logits: int | None = None
) -> float:  # fmt: skip
    """FLOPs of a forward pass alone, as of a reference policy: 2 for each weight and token, and the attention's.

    Args and Raises: as ``step_flops``. adapters: whether PEFT's count, or the model as it is without them.
    """
    model = _checked(model, lengths, convention)
    tokens, head = sum(lengths), _head(model)
    weights = 2.0 * sum(
        used * (tokens if logits is None or id(parameter) not in head else logits)
        for _, parameter, used in _weights(model, adapters)
    )
    return weights + sum(_attention_forward(*layer, lengths, convention) for layer in _attention_layers(model))


def _checked(model: Any, lengths: Sequence[int], convention: str) -> Any:
    """The model within DDP or DeepSpeed."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if any(length < 0 for length in lengths):
        raise ValueError(f"lengths must not be negative, got {min(lengths)}")
    while not hasattr(getattr(model, "config", None), "model_type"):
        inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def _first_trained(model: nn.Module) -> str | None:
    """The first trained parameter, where it is known what runs before it: all that are trained are in layers or in the head."""
    of_head = _head(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    known = all(_layer_of(name) is not None or id(p) in of_head for name, p in trained)
    tied = any(id(m.weight) in of_head for m in model.modules() if isinstance(m, nn.Embedding))
    return trained[0][0] if trained and known and not tied else None


def _layer_of(name: str | None) -> int | None:
    """The number of the layer that a parameter belongs to."""
    found = re.search(r"(?:layers|h|blocks|block)\.(\d+)\.", name or "")
    return int(found.group(1)) if found else None


# ---- weights -----------------------------------------------------------------------------------------------------


def _weights(model: nn.Module, adapters: bool = True) -> Iterator[tuple[str, Tensor, float]]:
    """Name, parameter and the number of its elements that act on one token."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    multiplied = _head(model)
    for name, parameter in model.named_parameters():
        if id(parameter) in tables and id(parameter) not in multiplied:
            continue
        if not _in_use(model, name, adapters) or _TOWER.search(name):
            continue
        yield name, parameter, _elements(parameter) * _visited(model, name)


def _head(model: nn.Module) -> set[int]:
    """The parameters that make logits, a tied table among them, by id."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()


_TOWER = re.compile(r"(^|\.)(vision|visual|audio|image)[a-z_]*\.")  # sees no token of the text


def _in_use(model: nn.Module, name: str, adapters: bool) -> bool:
    """False for what PEFT holds beside what it uses: other adapters, the originals of modules it trains, looked-up factors."""
    active = getattr(model, "active_adapters", None)
    if not active or callable(active) or not hasattr(model, "peft_config"):
        return True
    if not adapters:
        return ".lora_" not in name and ".modules_to_save." not in name
    if ".original_module." in name or "lora_embedding_A" in name:
        return False
    others = [adapter for adapter in model.peft_config if adapter not in active]  # type: ignore[union-attr]
    return not any(f".{adapter}." in f"{name}." for adapter in others)


def _elements(parameter: Tensor) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor in a parameter's place


def _visited(model: nn.Module, name: str) -> float:
    """The share of the tokens that meet this parameter: below 1 only for the experts of a mixture."""
    if ".experts." not in f".{name}":
        return 1.0
    config = _config(model)
    every = _first(config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
    if not every or not chosen:
        raise ValueError(
            f"{name} belongs to an expert, but the config tells no number of experts, or of those per token"
        )
    return min(1.0, chosen / every)


@dataclass(frozen=True)
class _Repeated:
    parameters: frozenset[str]
    share: float  # of the layers


def _checkpointed(model: nn.Module) -> _Repeated:
    """The layers whose forward pass runs again in the backward pass."""
    layers = [
        (name, m) for name, m in model.named_modules() if isinstance(getattr(m, "gradient_checkpointing", None), bool)
    ]
    layers = [(name, m) for name, m in layers if name.rsplit(".", 1)[-1].isdigit()]  # a model has the attribute as well
    chosen = [(name, m) for name, m in layers if getattr(m, "gradient_checkpointing", False)]
    names = frozenset(f"{name}.{inner}" for name, m in chosen for inner, _ in m.named_parameters())
    return _Repeated(names, len(chosen) / len(layers) if layers else 0.0)


# ---- attention ---------------------------------------------------------------------------------------------------


def _attention_layers(model: nn.Module) -> Iterator[tuple[float, int | None, bool]]:
    """For every layer with softmax attention: heads x width, its reach, and whether that is a chunk rather than a window."""
    config = _config(model)
    heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    layers = _first(config, "num_hidden_layers", "n_layer", "n_layers")
    hidden = _first(config, "hidden_size", "n_embd", "d_model")
    if not heads or not layers or not hidden:
        raise ValueError(f"the config ({type(config).__name__}) does not tell heads, layers and hidden size")
    keys = _first(config, "head_dim") or hidden // heads
    values = keys
    if _first(config, "kv_lora_rank"):  # multi-head latent attention
        keys = config.qk_nope_head_dim + config.qk_rope_head_dim
        values = config.v_head_dim
    width = heads * (keys + values) / 2
    window = _first(config, "sliding_window") if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
    for kind in kinds[:layers]:  # linear attention and convolutions have their work in their weights
        if "linear" in kind or not ("attention" in kind or "hybrid" in kind):
            continue
        if "chunked" in kind:
            yield width, _first(config, "attention_chunk_size"), True
        else:
            yield width, window if "sliding" in kind else None, False


def _attention_forward(
    width: float, reach: int | None, chunked: bool, lengths: Sequence[int], convention: str
) -> float:
    if convention == "palm":
        return 4 * width * sum(length**2 for length in lengths)
    seen = 0.0
    for length in lengths:
        near = min(length, reach or length)
        if chunked and near:
            seen += (length // near * near**2 + (length % near) ** 2) / 2
        else:
            seen += visible_pairs(length, length, reach)
    return 4 * width * seen


def visible_pairs(queries: int, keys: int, window: int | None = None, *, causal: bool = True) -> float:
    """Pairs of a query and a key that it sees, half of the square where queries and keys are the same tokens under a causal mask;
    the last query stands at the last key."""
    if not causal:
        return float(queries * keys)

    def up_to(position: int) -> float:
        near = min(position, window or position)
        return near**2 / 2 + (position - near) * near

    return up_to(keys) - up_to(keys - queries)


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config to read heads and layers from")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _first(config: Any, *names: str) -> int | None:
    try:
        return next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
    except Exception as error:  # of configs whose layers differ in it
        raise ValueError(f"{type(config).__name__}: {' '.join(str(error).split())}") from error
