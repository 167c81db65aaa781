"""What `fastllm train` is told: a YAML file and key=value pairs, made into dataclasses by transformers' HfArgumentParser.

Everything TrainingArguments knows (learning_rate, per_device_train_batch_size, bf16, deepspeed, ...) is a key as well, in one
flat list with fastllm's own. Names and types are checked here, because parse_dict takes any value for any field.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from fastllm.errors import ConfigError
from fastllm.train import endless, keys, losses, zero
from fastllm.train.losses import DPOOptions, RewardOptions
from fastllm.train.online import options as online

PREFERENCES = ("rm", "dpo")  # stages on pairs of answers
STAGES = ("pretrain", "sft", "mixed", *PREFERENCES, *online.STAGES)


@dataclass
class ModelOptions:
    """The model: where it comes from and what is done to it before training."""

    model: str = field(metadata={"help": "a folder, a config.json (with from_scratch) or ORGANISATION/NAME on the Hub"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "a folder or a name on the Hub; default: the model's"}
    )
    from_scratch: bool = field(default=False, metadata={"help": "random weights instead of trained ones"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "of the weights; `bf16: true` computes in bf16 with weights in float32"}
    )
    patch: bool | str | list[str] = field(
        default="auto", metadata={"help": "'auto', names of ops as for fastllm.patch, or false"}
    )
    rope: dict[str, Any] | None = field(
        default=None, metadata={"help": "as for fastllm.extend_context: max_length, method and what the method takes"}
    )
    lora: dict[str, Any] | None = field(
        default=None, metadata={"help": "fields of peft.LoraConfig: r, lora_alpha, ..."}
    )
    export: Literal["adapter", "merged", "both"] = field(
        default="adapter", metadata={"help": "what a LoRA run writes at its end, beside its checkpoints"}
    )


@dataclass
class DataOptions:
    """The data: what is read and how rows become batches."""

    stage: str = field(metadata={"help": f"one of {', '.join(STAGES)}"})
    data: str | list[str] = field(metadata={"help": "files or folders of .jsonl, .parquet and .txt"})
    eval_data: None | str | list[str] = field(default=None, metadata={"help": "the same, to validate on"})  # noqa: RUF036
    pretrain_data: None | str | list[str] = field(default=None, metadata={"help": "texts for stage mixed"})  # noqa: RUF036
    pretrain_share: float | None = field(
        default=None, metadata={"help": "stage mixed: share of the rows of a batch that are texts; default 0.5"}
    )
    max_length: int = field(default=2048, metadata={"help": "tokens of a row at most"})
    packing: bool = field(default=False, metadata={"help": "fill rows of max_length with whole examples"})
    train_on_prompt: bool = field(default=False, metadata={"help": "loss on prompts too, not on responses alone"})
    chat_template: str | None = field(
        default=None, metadata={"help": "'plain', 'chatml' or a Jinja file; default: the tokenizer's own"}
    )
    on_bad_row: Literal["error", "skip"] = field(default="error", metadata={"help": "what a malformed row leads to"})
    streaming: dict[str, Any] | None = field(
        default=None, metadata={"help": "validate on a text without end too: {sinks: 4, window: 1020, tokens: 16384}"}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "where tokenised data is kept; default: $FASTLLM_CACHE or ~/.cache/fastllm"}
    )


@dataclass
class Arguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults for language models and two keys that write DeepSpeed's JSON."""

    output_dir: str = field(default="runs", metadata={"help": "folder of runs; each gets a folder of its own in it"})
    learning_rate: float = 2e-5
    num_train_epochs: float = 1.0
    logging_steps: float = 1
    save_total_limit: int | None = 3
    report_to: None | str | list[str] = "none"  # noqa: RUF036
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False
    logging_nan_inf_filter: bool = False  # it would log 0 where a loss is not a number
    zero_stage: int | None = field(
        default=None, metadata={"help": "0 to 3: DeepSpeed ZeRO, where a launcher started several processes"}
    )
    offload: Literal["none", "optimizer", "all"] = field(
        default="none", metadata={"help": "with zero_stage: what lives in CPU memory; 'all' needs ZeRO-3"}
    )
    profile: bool = field(
        default=False, metadata={"help": "record a few steps with torch.profiler and say where their time goes"}
    )


@dataclass(frozen=True)
class Options:
    """A whole, checked configuration; `values` is what was given for it, by key."""

    model: ModelOptions
    data: DataOptions
    arguments: Arguments
    dpo: DPOOptions
    rm: RewardOptions
    online: online.OnlineOptions
    values: dict[str, Any]


def load(path: str | Path, overrides: list[str] | None = None) -> Options:
    """Reads a configuration file and puts `key=value` pairs over it; a dot reaches into a mapping (``rope.method=yarn``).

    Raises:
        ConfigError: no such file, no YAML, an unknown or missing key, a value of the wrong type or without meaning.
    """
    values = read(path)
    for pair in overrides or []:
        _override(values, pair)
    return parse(values)


class _EveryKeyOnce(yaml.SafeLoader):
    """YAML forbids a key that stands twice in a mapping; PyYAML takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for name, _ in node.value:
            if name.tag != "tag:yaml.org,2002:merge" and name.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{name.value} stands there twice", problem_mark=name.start_mark)
            seen.add(str(name.value))
        return super().construct_mapping(node, deep)


def read(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        values = yaml.load(text, _EveryKeyOnce)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: {getattr(error, 'problem', None) or 'not YAML'}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, got {_shown(values)}")
    return {str(key): value for key, value in values.items()}


def parse(values: dict[str, Any]) -> Options:
    """Checks names, types and meaning; the same errors as `load`."""
    if isinstance(resume := values.get("resume_from_checkpoint"), bool):  # as transformers' own scripts write it
        values = {**values, "resume_from_checkpoint": "latest" if resume else None}
    types_of = {name: hint for cls in _CLASSES for name, hint in _hints(cls).items()}
    types_of |= {name: hint for name, hint in _old_names(types_of).items() if name not in types_of}
    for key in values:
        keys.check(key, types_of)
    missing = [
        f.name for cls in (ModelOptions, DataOptions) for f in fields(cls) if _required(f) and f.name not in values
    ]
    if missing:
        raise ConfigError(f"the configuration lacks {' and '.join(missing)}")
    checked = {key: _coerced(key, value, types_of[key]) for key, value in values.items()}
    checked = online.completed(checked)
    _check_alone(checked)
    if checked.get("eval_data") and "eval_strategy" not in checked:
        checked["eval_strategy"] = "steps" if "eval_steps" in checked else "epoch"
    settled = dict(checked)
    known = {f.name for f in fields(Arguments)}
    for old, new in keys.RENAMED.items():
        here, there = (old, new) if new in known else (new, old)
        if here in settled:
            settled.setdefault(there, settled.pop(here))
    if settled.get("eval_data"):
        settled |= {"metric_for_best_model": "loss", "greater_is_better": False}
    if not torch.accelerator.is_available():
        settled["use_cpu"] = True  # said so, transformers trusts it with bf16
    if settled.get("zero_stage") is not None and zero.launched():
        settled["deepspeed"] = zero.settings(settled["zero_stage"], settled.get("offload", "none"))
    try:
        if settled.get("deepspeed") is not None:
            zero.join()
        model, data, dpo, rm, arguments, sampling = HfArgumentParser(_CLASSES).parse_dict(settled)  # type: ignore[arg-type]
    except ConfigError:
        raise
    except Exception as error:  # TrainingArguments checks its fields in many ways, each with its own type of error
        raise ConfigError(" ".join(str(error).split())) from error
    _check_loggers(arguments.report_to)
    return Options(model, data, arguments, dpo, rm, sampling, checked)


_CLASSES = (
    ModelOptions,
    DataOptions,
    DPOOptions,
    RewardOptions,
    Arguments,
    online.OnlineOptions,
)  # of unions with str, HfArgumentParser wants str second, hence the noqa


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}


def _old_names(types_of: dict[str, Any]) -> dict[str, Any]:
    pairs = [*keys.RENAMED.items(), *((new, old) for old, new in keys.RENAMED.items())]
    return {one: types_of[other] for one, other in pairs if other in types_of}


def _required(option: Any) -> bool:
    return option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING


def _override(values: dict[str, Any], pair: str) -> None:
    key, equals, text = pair.partition("=")
    if not equals or not key:
        raise ConfigError(f"an override is written key=value, got {pair!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *outer, last = key.split(".")
    for name in outer:
        inside = values.setdefault(name, {})
        if inside is None or not isinstance(inside, dict):
            inside = values[name] = {}
        values = inside
    values[last] = value


# ---- values ------------------------------------------------------------------------------------------------------


_NEVER = {
    "logging_steps": "logging_strategy: 'no' leaves metrics out",
    "eval_steps": "eval_strategy: 'no' leaves validation out",
    "save_steps": "save_strategy: 'no' leaves checkpoints out",
}
_FILES = "a file or folder of .jsonl, .parquet or .txt, or a list of them"
_WANTED = {
    "lora": "r and what else peft.LoraConfig takes, or leave it out to train all weights",
    "patch": "auto, names of ops, or false",
    "model": "a folder or ORGANISATION/NAME on the Hub",
    "tokenizer": "a folder or ORGANISATION/NAME on the Hub",
    "resume_from_checkpoint": "the folder of a run, or latest",
    **dict.fromkeys(("data", "eval_data", "pretrain_data"), _FILES),
}


def _check_alone(values: dict[str, Any]) -> None:
    """What can be said of the values without a model or data."""
    stage = values["stage"]
    if stage not in STAGES:
        raise ConfigError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}{keys.did_you_mean(stage, STAGES)}")
    if stage == "mixed" and not values.get("pretrain_data"):
        raise ConfigError("stage mixed needs pretrain_data, the texts that are mixed with the conversations in data")
    if stage != "mixed":
        for key in ("pretrain_data", "pretrain_share"):
            if values.get(key) is not None and (stage, key) != ("ppo", "pretrain_data"):
                raise ConfigError(f"{key} belongs to stage mixed, not to {stage}")
    if values.get("label_smoothing_factor") and stage not in ("pretrain", "sft"):
        hint = "; see label_smoothing" if stage == "dpo" else ""
        raise ConfigError(f"label_smoothing_factor belongs to stages pretrain and sft, not to {stage}{hint}")
    losses.check(values)
    if stage in PREFERENCES and values.get("train_on_prompt"):
        raise ConfigError(f"train_on_prompt belongs to conversations; stage {stage} compares answers alone")
    online.check(values)
    if values.get("streaming") is not None:
        endless.checked(values["streaming"], stage)
    if (values.get("lora") or {}).get("bias", "none") != "none" and stage in ("dpo", "ppo"):
        raise ConfigError(f"lora.bias must be none in stage {stage}, whose reference is the model without its adapters")
    if stage in online.STAGES:
        for option in fields(Arguments):
            if option.name in values and option.name not in online.HEARD and values[option.name] != option.default:
                raise ConfigError(f"{option.name} has no effect in stage {stage}: leave it out")
    if (share := values.get("pretrain_share")) is not None and not 0 < share < 1:
        raise ConfigError(f"pretrain_share must lie between 0 and 1, got {share}")
    for key, least in (
        ("max_length", 2), ("per_device_train_batch_size", 1), ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1), ("save_total_limit", 1),
    ):  # fmt: skip
        if values.get(key) is not None and values[key] < least:
            raise ConfigError(f"{key} must be at least {least}, got {values[key]}")
    for key in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "seed", "data_seed"):
        if values.get(key) is not None and not values[key] >= 0:
            raise ConfigError(f"{key} must not be negative, got {values[key]}")
    for key in ("learning_rate", "weight_decay"):
        if values.get(key) == float("inf"):
            raise ConfigError(f"{key} must be finite, got {values[key]}")
    for key in ("logging_steps", "eval_steps", "save_steps"):
        if values.get(key) is not None and not values[key] > 0:
            raise ConfigError(f"{key} must be above 0, got {values[key]}; {_NEVER[key]}")
    for key in ("lora", "patch", "data", "eval_data", "pretrain_data", "model", "tokenizer", "resume_from_checkpoint"):
        if values.get(key) in ({}, [], ""):
            raise ConfigError(f"{key} is empty: give {_WANTED[key]}")
    if not values.get("max_steps", -1) > 0 and not values.get("num_train_epochs", 1.0) > 0:
        raise ConfigError("nothing to train: max_steps or num_train_epochs must be above 0")
    stage = values.get("zero_stage")
    if stage is not None and stage not in (0, 1, 2, 3):
        raise ConfigError(f"zero_stage must be 0, 1, 2 or 3, got {stage}")
    if isinstance(values.get("deepspeed"), str) and not Path(values["deepspeed"]).is_file():
        raise ConfigError(f"deepspeed: there is no file {values['deepspeed']}")
    if values.get("deepspeed") is not None and stage is not None:
        raise ConfigError("give either deepspeed (a JSON file) or zero_stage (fastllm writes the JSON), not both")
    if values.get("offload", "none") != "none" and not stage:
        raise ConfigError("offload needs zero_stage 1, 2 or 3")
    if values.get("offload") == "all" and stage != 3:
        raise ConfigError("offload: all needs zero_stage 3; below it only the optimizer can live in CPU memory")
    if (rope := values.get("rope")) is not None and "max_length" not in rope:
        raise ConfigError("rope needs max_length, the tokens to read, as fastllm.extend_context does")
    if values.get("export", "adapter") != "adapter" and not values.get("lora"):
        raise ConfigError("export belongs to runs with lora; others write the whole model")
    if values.get("export", "adapter") != "adapter" and stage == 3:
        raise ConfigError(
            "export: merged cannot be written under ZeRO-3; merge the run's final adapter with peft afterwards"
        )
    for key in ("eval_strategy", "eval_steps", "eval_on_start", "streaming"):
        if values.get(key) not in (None, False, "no") and not values.get("eval_data"):
            raise ConfigError(f"{key} needs eval_data, the files to validate on")


def _check_loggers(asked: Any) -> None:
    """That what report_to names is installed; transformers would find out when data and model are loaded."""
    if not asked:
        return
    from transformers.integrations import integration_utils as integrations

    try:
        there = integrations.get_available_reporting_integrations()
    except Exception as error:  # of a package that is there and does not import
        raise ConfigError(f"report_to: {' '.join(str(error).split())}") from error
    packages = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}  # where the name is another
    for name in asked:
        if name not in integrations.INTEGRATION_TO_CALLBACK:
            raise ConfigError(
                f"report_to: unknown {name!r}{keys.did_you_mean(name, integrations.INTEGRATION_TO_CALLBACK)}"
            )
        package = packages.get(name, name)
        if name not in there and (name != "flyte" or importlib.util.find_spec(package) is None):
            raise ConfigError(
                f"report_to: {name} needs the package {package}, which is not installed: pip install {package}"
            )


def _coerced(key: str, value: Any, hint: Any) -> Any:
    """`value` as its type, or a ConfigError that says which was expected."""
    kinds = _alternatives(hint)
    if any(
        _members(kind) for kind in kinds
    ):  # optim: OptimizerNames | str, of which transformers takes the former alone
        kinds = [kind for kind in kinds if kind is not str]
    for kind in kinds:
        fitted = _fitted(value, kind)
        if fitted is not _NO:
            return fitted
    if isinstance(value, str) and (members := [m.value for kind in _alternatives(hint) for m in _members(kind)]):
        raise ConfigError(
            f"{key} must be one of {', '.join(members)}, got {_shown(value)}{keys.did_you_mean(value, members)}"
        )
    wanted = " or ".join(dict.fromkeys(_named(kind) for kind in _alternatives(hint) if kind is not type(None)))
    raise ConfigError(f"{key} must be {wanted}, got {_shown(value)}")


_NO = object()


def _alternatives(hint: Any) -> list[Any]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for one in typing.get_args(hint) for kind in _alternatives(one)]
    return [hint]


def _fitted(value: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return value
    if kind is type(None):
        return None if value is None else _NO
    if origin is Literal:
        return value if value in typing.get_args(kind) else _NO
    if origin is list or kind is list:
        inner = (typing.get_args(kind) or (Any,))[0]
        return value if isinstance(value, list) and all(_fitted(v, inner) is not _NO for v in value) else _NO
    if origin is dict or kind is dict:
        return value if isinstance(value, dict) else _NO
    if kind is bool:
        return value if isinstance(value, bool) else _NO
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO
    if kind is float:
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as a string
            try:
                return float(value)
            except ValueError:
                return _NO
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else _NO
    if kind is str:
        return value if isinstance(value, str) else _NO
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        value = "no" if value is False else value  # YAML 1.1 reads no as false
        return value if value in [member.value for member in kind] else _NO
    return value if isinstance(kind, type) and isinstance(value, kind) else _NO


def _members(kind: Any) -> list[enum.Enum]:
    return list(kind) if isinstance(kind, type) and issubclass(kind, enum.Enum) else []


def _named(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(str(member.value) for member in kind)
    plain = typing.get_origin(kind) or kind
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    return {**names, dict: "a mapping"}.get(plain, getattr(plain, "__name__", str(plain)))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
