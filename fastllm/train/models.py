"""The tokenizer and the model of a run: loaded or drawn at random, rescaled, adapted, patched."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import fastllm
from fastllm.errors import ConfigError
from fastllm.train import keys
from fastllm.train.config import ModelOptions
from fastllm.train.heads import bare_model

_OF_HIDDEN = "not needed: this stage computes its own from hidden states, without logits"
# Why stages do without the model's own loss; "conditional" loads its models as "ppo" does.
_LOSS_LEFT = {"rm": "not needed: this stage scores answers, without logits", "dpo": _OF_HIDDEN, "ppo": _OF_HIDDEN}


def load_tokenizer(options: ModelOptions) -> Any:
    """The tokenizer of a run; where it has no padding token, its end-of-sequence token pads.

    Raises:
        ConfigError: none at the place named.
    """
    name = options.tokenizer or options.model
    if options.tokenizer is None and Path(name).suffix == ".json":
        raise ConfigError(
            f"{name} is a configuration without a tokenizer: give tokenizer, a folder or a name on the Hub"
        )
    _exists(name, "tokenizer" if options.tokenizer else "model")
    if options.tokenizer is None:
        _holds_a_model(Path(name))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many libraries
        why = _first_line(error)
        if Path(name).is_dir() and not any(Path(name).glob("*token*")):
            why = "it holds none of a tokenizer's files; give tokenizer, a folder or a name on the Hub"
        raise ConfigError(f"no tokenizer in {name}: {why}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def load_model(
    options: ModelOptions, tokenizer: Any, max_length: int, *, stage: str = "sft", reference: bool = False
) -> Any:
    """The model of a run, ready to train: in its dtype, with RoPE rescaled, adapters added and kernels patched in.

    Args:
        stage: "rm" has a head with one score instead of one for tokens; "dpo" and "ppo" take their losses from hidden states, so that the
            model's own stays unpatched.
        reference: without adapters, and without a word about what was done.

    Raises:
        ConfigError: no model at the place named, one that is not causal, a tokenizer with more tokens than the model, or options that
            do not fit it.
    """
    config = _config(options)
    if not hasattr(config, "vocab_size") and not hasattr(config.get_text_config(), "vocab_size"):
        raise ConfigError(f"{options.model} is no language model")
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{options.model} is an encoder-decoder ({type(config).__name__}), and what is trained here are causal language models"
        )
    vocabulary = config.get_text_config().vocab_size
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {vocabulary}: they do not belong together"
        )
    kind: Any = transformers.AutoModelForCausalLM
    if stage == "rm":
        kind = transformers.AutoModelForSequenceClassification
        config.num_labels = 1
        config.get_text_config().pad_token_id = tokenizer.pad_token_id  # the score is read at the last other token
    more: dict[str, Any] = {"dtype": getattr(torch, options.dtype)}
    tell = _silent if reference else say
    if options.from_scratch:
        try:
            model = kind.from_config(config, **more)
        except Exception as error:
            raise ConfigError(f"cannot build {options.model}: {_first_line(error)}") from error
    else:
        hint = "; from_scratch: true would begin with random weights"
        model = load_whole(kind, options.model, new_head=stage == "rm", hint=hint, config=config, **more)
    if kind is transformers.AutoModelForCausalLM and not reference and not sharded(model):
        check_causal(model)
    if options.rope:
        try:
            extension = fastllm.extend_context(model, **_rope(options.rope))
        except (ConfigError, ValueError, TypeError) as error:
            raise ConfigError(f"rope: {_first_line(error)}") from error
        tell(str(extension))
        known: int | None = extension.length  # a config with "dynamic" keeps the length of the training
    else:
        known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if known and max_length > known:
        raise ConfigError(
            f"max_length is {max_length}, and the model reads {known} tokens: lower it, or give rope with max_length: {max_length}"
        )
    if options.lora and not reference:
        model = _with_adapters(model, options.lora, "SEQ_CLS" if stage == "rm" else "CAUSAL_LM")
    if options.patch is not False:
        ops = "auto" if options.patch is True else options.patch
        why = _LOSS_LEFT.get(stage)
        try:
            report = fastllm.patch(model, ops, exclude=("loss",) if why else ())
        except ValueError as error:
            raise ConfigError(f"patch: {error}") from None
        report.skipped = [dataclasses.replace(s, reason=why) if why and s.op == "loss" else s for s in report.skipped]
        tell(str(report))
    return model


def load_whole(kind: Any, name: str, *, new_head: bool = False, hint: str = "", **more: Any) -> Any:
    """``kind.from_pretrained`` that puts nothing random in the place of what is not there.

    Args:
        kind: an Auto class. more: for from_pretrained.
        new_head: what lies above the base model may be new. hint: what to say besides where nothing can be loaded.

    Raises:
        ConfigError: nothing that can be loaded, or weights that are not there or have another shape, named by the first.
    """
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **more)
    except Exception as error:  # of many libraries
        why = _first_line(error).rstrip(".")
        raise ConfigError(f"cannot load {name}: {why}{hint}") from error
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in found["missing_keys"] if key.startswith(body) or not new_head)
    if missing:
        more_of_them = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"cannot load {name}: {missing[0]}{more_of_them} of {type(model).__name__} is not in it and would be random"
        )
    for key, theirs, ours in sorted(found["mismatched_keys"]):
        raise ConfigError(f"cannot load {name}: its {key} is {tuple(theirs)}, and the configuration's {tuple(ours)}")
    return model


def sharded(model: Any) -> bool:
    """Whether ZeRO-3 has taken its weights apart: nothing runs before training begins."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def check_causal(model: Any) -> None:
    """Proves on the model itself that what it says of a token does not depend on those after it.

    Raises:
        ConfigError: it does, and would learn to copy the token it is to predict.
    """
    parameter = next(model.parameters())
    tokens = torch.randint(
        0, model.config.get_text_config().vocab_size, (10,), generator=torch.Generator().manual_seed(0)
    )
    rows = torch.stack((tokens[:9], torch.cat((tokens[:8], tokens[9:])))).to(parameter.device)  # alike but for the last
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
    except Exception:  # of models that want other inputs besides: training will tell
        return
    finally:
        model.train(training)
    apart = (logits[0] - logits[1]).abs().max() / logits.abs().max().clamp_min(1e-6)
    if apart > (1e-3 if parameter.dtype == torch.float32 else 1e-2):
        raise ConfigError(f"{type(model).__name__} lets a token see those after it: it is no causal language model")


def export(model: Any, tokenizer: Any, folder: Path, kind: str) -> None:
    """Writes a trained model so that plain transformers, or peft for an adapter alone, loads it.

    kind: "adapter" or "merged" for a model with adapters; others are written whole either way.
    """
    if kind == "merged":
        fastllm.unpatch(model)
        model = model.merge_and_unload()
    with saved_here(model):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def saved_here(model: Any) -> Iterator[None]:
    """A block in which save_pretrained writes on the process that calls it: transformers 5.23's does so on the first of all alone,
    and machines without a shared file system would have no weights to go on from."""
    plain = bare_model(model)
    plain.__dict__["should_save_on_this_rank"] = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del plain.__dict__["should_save_on_this_rank"]


def _config(options: ModelOptions) -> Any:
    _exists(options.model, "model")
    path = Path(options.model)
    if path.is_file() and not options.from_scratch:
        raise ConfigError(f"{path} is a configuration without weights: from_scratch: true begins with random ones")
    _holds_a_model(path)
    try:
        return transformers.AutoConfig.from_pretrained(options.model)
    except Exception as error:
        raise ConfigError(f"no model configuration in {options.model}: {_first_line(error)}") from error


def _holds_a_model(path: Path) -> None:
    """A folder must have a config.json; what is no folder may be a name on the Hub."""
    if not path.is_dir() or (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise ConfigError(
            f"{path} is an adapter, not a model: export: merged, or peft's merge_and_unload, makes it one"
        )
    raise ConfigError(f"the folder {path} has no config.json")


def _exists(name: str, key: str) -> None:
    """A path must be there; a name on the Hub has one slash and no leading dot."""
    path = Path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.suffix == ".json"
    if not path.exists() and looks_like_path:
        raise ConfigError(f"{key}: there is no file or folder {name}")


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    return {"method": "yarn", **rope}


def _with_adapters(model: Any, settings: dict[str, Any], task: str) -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("lora needs peft: pip install peft") from None
    known = [f.name for f in dataclasses.fields(peft.LoraConfig)]
    for key in settings:
        keys.check(key, known, "lora: ")
    rank = settings.get("r", 8)
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"lora: r must be a whole number of at least 1, got {rank!r}")
    try:
        config = peft.LoraConfig(**{"task_type": task, **settings})
        adapted = peft.get_peft_model(model, config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora: {_first_line(error)}") from error
    trained, whole = adapted.get_nb_trainable_parameters()
    say(f"LoRA: {trained:,} of {whole:,} parameters are trained")
    return adapted


def _silent(text: str) -> None:
    pass


def say(text: str) -> None:
    """On the first process alone."""
    import os

    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
