"""Keys of the stages that sample: what they mean, what they default to, and which combinations make no sense."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from fastllm.errors import ConfigError

STAGES = ("ppo", "conditional")
# Of TrainingArguments; the others are of transformers' Trainer, which does not run these stages.
HEARD = frozenset({
    "output_dir", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "optim", "optim_args", "optim_target_modules",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "tf32", "activation_checkpointing",
    "gradient_checkpointing", "logging_steps", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint", "seed",
    "data_seed", "use_cpu", "profile", "deepspeed", "zero_stage", "offload", "ddp_backend", "ddp_timeout", "eval_steps", "eval_strategy",
    "eval_on_start", "save_on_each_node",
})  # fmt: skip


@dataclass
class OnlineOptions:
    """Sampling, rewards and losses of stages ppo and conditional."""

    reward: str | None = field(
        default=None, metadata={"help": "a reward model (folder or Hub name), or a Python function, module:function"}
    )
    eval_reward: str | None = field(
        default=None, metadata={"help": "what scores answers to eval_data, module:function; default: reward"}
    )
    preset: Literal["ppo_max"] | None = field(default=None, metadata={"help": "stage ppo: defaults of a recipe"})
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "responses per iteration and process; default: four mini-batches"}
    )
    rollout_chunk_size: int | None = field(
        default=None, metadata={"help": "of them, how many are generated and scored at once; default: all"}
    )
    max_new_tokens: int = field(default=128, metadata={"help": "tokens of a response at most"})
    temperature: float = field(default=1.0, metadata={"help": "of sampling, and of all log-probabilities"})
    # ---- stage ppo
    advantage: Literal["gae", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++-baseline"] = field(
        default="gae", metadata={"help": "gae trains a critic; the others compare the samples of a prompt or batch"}
    )
    group_size: int | None = field(
        default=None, metadata={"help": "samples of a prompt; default 1 with gae and reinforce++, else 4"}
    )
    critic: str | None = field(
        default=None, metadata={"help": "what the critic begins as; default: the reward model, or else the model"}
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "default: learning_rate"})
    critic_warmup_steps: int = field(default=0, metadata={"help": "iterations at first that train the critic alone"})
    ppo_epochs: int = field(default=2, metadata={"help": "passes over the responses of an iteration"})
    kl_coef: float | None = field(
        default=None, metadata={"help": "of the KL penalty in the rewards; default 0.05, grpo and dr_grpo 0"}
    )
    kl_estimator: Literal["k1", "k2", "k3"] = field(default="k1", metadata={"help": "of that penalty"})
    adaptive_kl: dict[str, Any] | None = field(
        default=None, metadata={"help": "target (nats a response) and horizon (responses): kl_coef follows the KL"}
    )
    kl_loss_coef: float | None = field(
        default=None, metadata={"help": "of the k3 KL in the loss; default 0, grpo 0.04"}
    )
    target_kl: float | None = field(
        default=None, metadata={"help": "an iteration's updates end once the policy has moved 1.5 times as far"}
    )
    gamma: float = 1.0
    lam: float = field(default=0.95, metadata={"help": "lambda of generalised advantage estimation"})
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    entropy_coef: float = 0.0
    level: Literal["token", "sequence"] = field(default="token", metadata={"help": "of the ratio; sequence is GSPO"})
    aggregation: Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "token-sum-norm"] = "token-mean"
    whiten_advantages: bool = field(default=True, metadata={"help": "with gae: over the responses of all processes"})
    normalize_rewards: bool = field(
        default=False, metadata={"help": "by the mean and deviation of all scores so far, of all processes"}
    )
    reward_clip: float | None = field(default=None, metadata={"help": "scores are clipped to plus and minus this"})
    ptx_coef: float | None = field(
        default=None, metadata={"help": "of the loss on pretrain_data that is added; default 0, ppo_max 0.1"}
    )
    # ---- stage conditional
    score_levels: int = field(default=5, metadata={"help": "levels that scores are told in"})
    pool_iterations: int = field(default=4, metadata={"help": "responses of so many iterations are learnt from"})


# Secrets of RLHF I (arXiv 2307.04964): section 5's PPO-max.
PRESETS: dict[str, dict[str, Any]] = {
    "ppo_max": {
        "normalize_rewards": True, "reward_clip": 5.0, "whiten_advantages": True, "value_clip": 0.2, "kl_coef": 0.05,
        "kl_estimator": "k1", "critic_warmup_steps": 10, "ptx_coef": 0.1, "ppo_epochs": 2, "max_grad_norm": 1.0,
    },
}  # fmt: skip

KEYS = frozenset(f.name for f in fields(OnlineOptions))
_SHARED = {
    "reward",
    "eval_reward",
    "rollout_batch_size",
    "rollout_chunk_size",
    "max_new_tokens",
    "temperature",
}  # by both stages
_OF_CONDITIONAL = {"score_levels", "pool_iterations"}
_OF_GAE = {
    "critic",
    "critic_learning_rate",
    "critic_warmup_steps",
    "lam",
    "gamma",
    "value_clip",
    "value_coef",
    "whiten_advantages",
}
_COMPARE = {"grpo", "dr_grpo", "rloo", "reinforce++-baseline"}  # with the other samples of a prompt


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """The values given, over those of their preset."""
    preset = PRESETS.get(str(values.get("preset")), {})
    if values.get("advantage", "gae") != "gae":
        preset = {key: value for key, value in preset.items() if key not in _OF_GAE}
    return {**preset, **values}


def settled(options: OnlineOptions, mini_batch: int) -> OnlineOptions:
    """With a number in place of every default that depends on others; mini_batch is per process."""
    kind = options.advantage
    filled: dict[str, Any] = {
        "group_size": 4 if kind in _COMPARE else 1,
        "kl_coef": 0.0 if kind in ("grpo", "dr_grpo") else 0.05,
        "kl_loss_coef": 0.04 if kind == "grpo" else 0.0,
        "ptx_coef": 0.0,
        "rollout_batch_size": 4 * mini_batch,
    }
    options = replace(options, **{key: v for key, v in filled.items() if getattr(options, key) is None})
    return replace(options, rollout_chunk_size=options.rollout_chunk_size or options.rollout_batch_size)


def check(values: dict[str, Any]) -> None:
    """What can be said of a configuration without a model or data; called for every stage.

    Raises:
        ConfigError: keys of another stage, numbers out of range or that do not go together.
    """
    stage = values["stage"]
    given = {key for key in KEYS if values.get(key) is not None}
    if stage not in STAGES:
        if given:
            raise ConfigError(f"{min(given)} belongs to stages ppo and conditional, not to {stage}")
        return
    if not values.get("reward"):
        raise ConfigError(f"stage {stage} needs reward: a reward model, or a Python function written module:function")
    for key in ("packing", "train_on_prompt"):
        if values.get(key):
            raise ConfigError(f"{key} does not belong to stage {stage}, whose data are prompts")
    if values.get("fp16"):
        raise ConfigError(f"fp16 does not belong to stage {stage}, which scales no loss: give bf16")
    if (strategy := values.get("save_strategy", "steps")) not in ("steps", "no"):
        raise ConfigError(f"save_strategy: {strategy} does not belong to stage {stage}; give save_steps")
    if (schedule := values.get("lr_scheduler_type")) in ("reduce_lr_on_plateau", "greedy"):
        raise ConfigError(f"lr_scheduler_type: {schedule} follows a loss, which stage {stage} does not give it")
    _check_evaluation(values)
    kind = values.get("advantage", "gae")
    if stage == "conditional" and (wrong := given - _SHARED - _OF_CONDITIONAL):
        raise ConfigError(f"{min(wrong)} belongs to stage ppo, not to conditional")
    if stage == "ppo" and (wrong := given & _OF_CONDITIONAL):
        raise ConfigError(f"{min(wrong)} belongs to stage conditional, not to ppo")
    if kind != "gae" and (wrong := given & _OF_GAE):
        raise ConfigError(f"{min(wrong)} belongs to advantage gae, not to {kind}, which has no critic")
    _check_ranges(values)
    _check_ptx(values)
    adaptive = values.get("adaptive_kl")
    if adaptive is not None:
        if set(adaptive) != {"target", "horizon"} or not all(_positive(v) for v in adaptive.values()):
            raise ConfigError(f"adaptive_kl needs target and horizon, two numbers above 0, got {adaptive}")
        if values.get("kl_coef", 0.0 if kind in ("grpo", "dr_grpo") else 0.05) == 0:
            raise ConfigError("adaptive_kl scales kl_coef, which is 0: give kl_coef a first value")
    _check_batches(values)


def _check_ranges(values: dict[str, Any]) -> None:
    for key, least in (
        ("rollout_batch_size", 1), ("rollout_chunk_size", 1), ("max_new_tokens", 1), ("group_size", 1), ("ppo_epochs", 1),
        ("critic_warmup_steps", 0), ("critic_learning_rate", 0), ("kl_coef", 0), ("kl_loss_coef", 0), ("gamma", 0), ("lam", 0),
        ("clip_low", 0), ("clip_high", 0), ("value_clip", 0), ("value_coef", 0), ("ptx_coef", 0), ("score_levels", 2),
        ("pool_iterations", 1),
    ):  # fmt: skip
        if values.get(key) is not None and not values[key] >= least:
            raise ConfigError(f"{key} must be at least {least}, got {values[key]}")
    for key in KEYS:
        if isinstance(value := values.get(key), float) and not math.isfinite(value):
            raise ConfigError(f"{key} must be a finite number, got {value}")
    for key, above in (("temperature", 0), ("target_kl", 0), ("reward_clip", 0), ("dual_clip", 1)):
        if values.get(key) is not None and not values[key] > above:
            raise ConfigError(f"{key} must be above {above}, got {values[key]}")
    for key in ("gamma", "lam"):
        if values.get(key) is not None and not values[key] <= 1:
            raise ConfigError(f"{key} must be at most 1, got {values[key]}")
    room = values.get("max_length", 2048)
    if values.get("max_new_tokens", 128) >= room:
        raise ConfigError(
            f"max_new_tokens ({values.get('max_new_tokens', 128)}) must be below max_length ({room}), which holds prompt and response"
        )


def _check_evaluation(values: dict[str, Any]) -> None:
    evaluates = values.get("eval_data") is not None
    if evaluates and not (values.get("eval_steps") or 0) > 0:
        raise ConfigError("eval_data needs eval_steps: after how many iterations the prompts in it are answered")
    for key in ("eval_steps", "eval_reward", "eval_on_start"):
        if values.get(key) and not evaluates:
            raise ConfigError(f"{key} needs eval_data, prompts that are not trained on")
    if values.get("eval_strategy", "steps") != "steps" and evaluates:
        raise ConfigError(
            f"eval_strategy: {values['eval_strategy']} does not belong to stage {values['stage']}; give eval_steps"
        )
    if ":" not in (values.get("eval_reward") or ":"):
        raise ConfigError(
            f"eval_reward must be a Python function written module:function, got {values['eval_reward']!r}"
        )


def _check_ptx(values: dict[str, Any]) -> None:
    coefficient = values.get("ptx_coef") or 0
    if coefficient and not values.get("pretrain_data"):
        why = "preset ppo_max mixes in" if values.get("preset") else "ptx_coef asks for"
        raise ConfigError(f"{why} a loss on texts: give pretrain_data, or ptx_coef: 0")
    if values.get("pretrain_data") and not coefficient:
        raise ConfigError("pretrain_data is read in stage ppo only with ptx_coef above 0, the weight of its loss")


def _check_batches(values: dict[str, Any]) -> None:
    micro, accumulated = (
        values.get(k, d) for k, d in (("per_device_train_batch_size", 8), ("gradient_accumulation_steps", 1))
    )
    options = settled(OnlineOptions(**{k: v for k, v in values.items() if k in KEYS}), micro * accumulated)
    batch, group = options.rollout_batch_size or 0, options.group_size or 0
    if options.advantage in _COMPARE and group < 2:
        raise ConfigError(
            f"advantage {options.advantage} compares the samples of a prompt: group_size must be at least 2, got {group}"
        )
    if batch % group:
        raise ConfigError(f"group_size must divide rollout_batch_size ({batch}), got {group}")
    if batch % (micro * accumulated):
        raise ConfigError(
            f"rollout_batch_size must be a multiple of the mini-batch, {micro * accumulated} responses (per_device_train_batch_size "
            f"{micro} x gradient_accumulation_steps {accumulated}), got {batch}"
        )


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
