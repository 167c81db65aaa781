"""Every causal-LM family of the installed transformers, as a tiny random model, patched against unpatched.

    python -m fastllm.patching.sweep [--only PATTERN] [--markdown FILE] [--json FILE]

For each family: logits, loss and the gradient of every parameter, in fp32, to 1e-4 of their scale; and which decoder layers
hold something patched. Exit code 1 if a family is wrong or fewer match than --least.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import inspect
import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Sizes that make any family small. A name is used only where the family's config has it.
TINY: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "word_embed_proj_dim": 64,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "decoder_layers": 2, "encoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "attention_head_dim": 16, "kv_channels": 16, "rotary_dim": 8,
    "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96, "ffn_hidden_size": 96, "decoder_ffn_dim": 96, "encoder_ffn_dim": 96,
    "moe_intermediate_size": 48, "shared_expert_intermediate_size": 48, "moe_shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1, "first_k_dense_replace": 1, "max_position_embeddings": 128, "n_positions": 128, "sliding_window": 8,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False,
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0,
    "resid_dropout": 0.0, "embedding_dropout": 0.0, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
}  # fmt: skip
SEQUENCE, PADDING = 24, 5


@dataclass
class Result:
    """What happened to one family: status is "matches", "wrong", "nothing to patch" or "not built"."""

    family: str
    status: str
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    layers_patched: int = 0
    error: float = 0.0


def families() -> dict[str, str]:
    """model_type -> class name of every causal LM transformers maps."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(family: str) -> Any:
    """The family's default config, with every size it has made small."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    config = kind(**_small(kind()))
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and not isinstance(part, dict):
            setattr(config, name, type(part)(**_small(part)))
    return config


def _small(config: Any) -> dict[str, Any]:
    chosen = {}
    for name, value in TINY.items():
        own = config.attribute_map.get(name, name)
        if isinstance(getattr(type(config), own, None), property):
            continue
        try:
            there = getattr(config, name, None)
        except Exception:  # a config may refuse to name one value where layers differ; its default stays
            continue
        unset = there is None and name in ("head_dim", "num_key_value_heads") and hasattr(config, name)
        if unset or (there is not None and not isinstance(there, (list, tuple, dict))):
            chosen[own] = value
    if hasattr(config, "kv_lora_rank") and "num_key_value_heads" in chosen:  # latent attention has no groups
        chosen["num_key_value_heads"] = TINY["num_attention_heads"]
    for name in ("num_key_value_heads", "multi_query_group_num"):
        if getattr(config, name, None) == 1:
            chosen[name] = 1
    return chosen


def tiny_model(family: str) -> Any:
    """A random model of the family, small, in fp32, ready to train, with parameters away from their initial zeros and ones."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(family)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    except (ValueError, TypeError):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.float().train()


def check(family: str) -> Result:
    """Builds, runs, patches, runs again, unpatches, runs a third time."""
    import fastllm

    try:
        model = tiny_model(family)
        size = sum(p.numel() for p in model.parameters())
        if size > 60_000_000:
            return Result(family, "not built", f"{size / 1e6:.0f} M parameters even when every known size is small")
        vocabulary = min(99, model.get_input_embeddings().weight.shape[0])
        ids = torch.randint(3, vocabulary, (2, SEQUENCE), generator=torch.Generator().manual_seed(1))
        before = _run(model, ids)
        padded = _takes_mask(model)
        before_padded = _run(model, ids, padded=True) if padded else {}
    except Exception as error:
        return Result(family, "not built", _one_line(error))
    if not all(t.isfinite().all() for t in before.values()):
        return Result(family, "not built", "the unpatched tiny model gives NaN or inf")
    again = _run(model, ids)
    noise = _difference(before, again)[0]
    if noise > 1e-6:
        return Result(family, "not built", f"the unpatched model does not repeat itself ({noise:.1g})")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = fastllm.patch(model)
        layers, patched = _layers(model, [record.path for record in report.patched])
        result = Result(family, "matches", counts=report.counts, layers=layers, layers_patched=patched)
        if not report.patched:
            result.status, result.reason = (
                "nothing to patch",
                "; ".join(sorted({f"{s.op}: {s.reason}" for s in report.skipped})),
            )
            return result
        result.error, where = _difference(before, _run(model, ids))
        if padded:
            padded_error, which = _difference(before_padded, _run(model, ids, padded=True))
            if not padded_error <= result.error:
                result.error, where = padded_error, f"{which}, with a padded row,"
        fastllm.unpatch(model)
        if not result.error <= 1e-4 and not result.error <= 2 * _sensitivity(model, ids, padded):
            result.status, result.reason = "wrong", f"{where} differs by {result.error:.2g} of its scale"
            return result
        left, where = _difference(before, _run(model, ids))
        if left != 0:
            result.status, result.reason = "wrong", f"after unpatch {where} differs by {left:.2g}"
    except Exception as error:
        return Result(family, "wrong", _one_line(error))
    return result


def _takes_mask(model: nn.Module) -> bool:
    return "attention_mask" in inspect.signature(type(model).forward).parameters


def _run(model: nn.Module, ids: torch.Tensor, padded: bool = False) -> dict[str, torch.Tensor]:
    """Loss, logits and gradients; padded: the second row begins with padding, of which nothing is compared."""
    model.zero_grad()
    torch.manual_seed(2)  # dropout, where a family has it under another name
    if padded:
        real = torch.ones_like(ids)
        real[1, :PADDING] = 0
        labels = ids.clone()
        labels[1, : PADDING + 1] = -100  # the first token is predicted from padding, which sees nothing
        output = model(input_ids=ids, labels=labels, attention_mask=real)
    else:
        output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    logits = (output.logits * 1).detach()
    if padded and logits.shape[:2] == ids.shape:
        logits = logits[real.bool()]
    return {"loss": output.loss.detach(), "logits": logits, **found}


def _sensitivity(model: nn.Module, ids: torch.Tensor, padded: bool) -> float:
    """How much the last bit of every parameter changes what the unpatched model gives: what rounding alone may do."""
    before = [_run(model, ids, padded=with_padding) for with_padding in {False, padded}]
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1.2e-7 * torch.randn_like(p).sign())
    after = [_run(model, ids, padded=with_padding) for with_padding in {False, padded}]
    with torch.no_grad():
        for p, value in zip(model.parameters(), kept):
            p.copy_(value)
    return max(_difference(a, b)[0] for a, b in zip(before, after))


def _difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference relative to its tensor's scale, and where. Gradients far below the largest are noise."""
    if a.keys() != b.keys():
        return float("inf"), f"the set of gradients ({', '.join(sorted(a.keys() ^ b.keys())[:3])})"
    floor = 1e-3 * max(float(t.abs().max()) for n, t in a.items() if n.startswith("gradient"))
    worst, where = 0.0, ""
    for name, t in a.items():
        error = float((t - b[name]).abs().max() / t.abs().max().clamp(min=floor)) if t.numel() else 0.0
        if not error <= worst:
            worst, where = error, name
    return worst, where


def _layers(model: nn.Module, paths: list[str]) -> tuple[int, int]:
    """How many decoder layers there are (the longest ModuleList), and how many hold something patched."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    name, longest = max(lists, key=lambda item: (len(item[1]), -item[0].count(".")), default=("", nn.ModuleList()))
    held = {m.group(1) for p in paths if (m := re.match(rf"{re.escape(name)}\.(\d+)\.", p))}
    return len(longest), len(held)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:140].replace("|", "/")


def sweep(only: str = "*") -> Iterator[Result]:
    for family in sorted(families()):
        if fnmatch.fnmatchcase(family, only):
            with contextlib.redirect_stdout(io.StringIO()):
                result = check(family)
            yield result


def table(results: list[Result]) -> str:
    """The Markdown page docs/families.md."""
    import transformers

    by = {s: [r for r in results if r.status == s] for s in ("matches", "wrong", "nothing to patch", "not built")}
    whole = [r for r in by["matches"] if r.layers_patched == r.layers]
    lines = [
        "# Families",
        "",
        f"Made by `python -m fastllm.patching.sweep --markdown docs/families.md` with transformers {transformers.__version__}, "
        f"torch {torch.__version__}. Each family is built as a tiny random model from its own config, run with labels, patched, and "
        "run again, also with a padded row: logits, loss and every parameter's gradient agree to 1e-4 of their scale in fp32 (or to "
        "twice what the last bit of the parameters changes in them), and after `unpatch` to the last bit.",
        "",
        f"**{len(by['matches'])} of {len(results)} families match**, {len(whole)} of them with something patched in every layer; "
        f"{len(by['wrong'])} are wrong, {len(by['nothing to patch'])} have nothing to patch, {len(by['not built'])} could not be "
        "built or run as a tiny random model, patched or not.",
        "",
        "| family | status | layers patched | rms_norm | layer_norm | rope | glu | attention | loss | worst difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in by["matches"] + by["wrong"]:
        numbers = " | ".join(
            str(r.counts.get(op, "")) for op in ("rms_norm", "layer_norm", "rope", "glu", "attention", "loss")
        )
        lines.append(
            f"| {r.family} | {r.status} {r.reason} | {r.layers_patched}/{r.layers} | {numbers} | {r.error:.1e} |"
        )
    lines += ["", "| family | not covered | why |", "|---|---|---|"]
    lines += [f"| {r.family} | {r.status} | {r.reason} |" for r in by["nothing to patch"] + by["not built"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastllm.patching.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="glob of model types, for example 'qwen*'")
    parser.add_argument("--least", type=int, default=0, help="fail unless so many families match")
    parser.add_argument("--markdown", type=Path, help="write the table of docs/families.md here")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import transformers

    for path in (options.markdown, options.json):
        if path is not None and not path.parent.is_dir():
            parser.error(f"cannot write {path}: there is no folder {path.parent}")
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results = []
    for result in sweep(options.only):
        results.append(result)
        counts = ", ".join(f"{op} {n}" for op, n in sorted(result.counts.items()))
        layers = f" {result.layers_patched}/{result.layers} layers;" if result.layers else ""
        print(f"{result.family:28} {result.status:16}{layers} {counts} {result.reason}", flush=True)
    if not results:
        parser.error(f"no model type of transformers {transformers.__version__} matches {options.only!r}")
    by = {s: sum(r.status == s for r in results) for s in ("matches", "wrong", "nothing to patch", "not built")}
    print(f"{len(results)} families: " + ", ".join(f"{n} {s}" for s, n in by.items()))
    if options.markdown:
        options.markdown.write_text(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1))
    return int(by["wrong"] > 0 or by["matches"] < options.least)


if __name__ == "__main__":
    start = time.perf_counter()
    code = main()
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(code)
