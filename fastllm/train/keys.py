"""Names of keys: what is said of one that does not exist, and of one that transformers has and fastllm decides itself."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fastllm.errors import ConfigError

# Keys that fastllm decides itself, and what to use instead.
TAKEN = {
    "remove_unused_columns": "fastllm's collators take what they need",
    "do_train": "the stage says what is done",
    "do_eval": "give eval_data",
    "do_predict": "the stage says what is done",
    "use_liger_kernel": "fastllm.patch does this; see `patch`",
    "load_best_model_at_end": "the best checkpoint is kept beside the last ones",
    "metric_for_best_model": "the best checkpoint is that of the lowest validation perplexity",
    "group_by_length": "see `packing`",
    "train_sampling_strategy": "see `packing`",
    "logging_nan_inf_filter": "a loss that is not finite stops training",
    "local_rank": "the launcher sets it",
    "push_to_hub": "the run folder's `final` loads with from_pretrained and can be uploaded from there",
}  # fmt: skip

# transformers 5.23 renamed these; either name is taken, whichever version is installed.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

# What other trainers (TRL, axolotl, LLaMA-Factory, scripts of transformers) call a thing.
_ELSEWHERE = {
    "model": (
        "model_name_or_path", "model_name", "model_path", "base_model", "pretrained_model_name_or_path", "sft_model_path",
    ),
    "tokenizer": ("tokenizer_name", "tokenizer_path", "tokenizer_name_or_path"),
    "data": ("dataset", "datasets", "dataset_name", "dataset_path", "train_data", "train_file", "train_files", "train_dataset"),
    "eval_data": ("eval_dataset", "eval_file", "validation_file", "validation_data", "val_data", "test_datasets"),
    "max_length": (
        "max_seq_length", "max_seq_len", "seq_length", "seq_len", "sequence_len", "cutoff_len", "block_size", "context_length",
    ),
    "packing": ("sample_packing", "pack", "pack_sequences"),
    "train_on_prompt": ("train_on_inputs", "train_on_input"),
    "chat_template": ("template",),
    "per_device_train_batch_size": ("batch_size", "micro_batch_size", "train_batch_size", "per_gpu_train_batch_size"),
    "per_device_eval_batch_size": ("eval_batch_size", "per_gpu_eval_batch_size"),
    "gradient_accumulation_steps": ("grad_accum", "accumulate_grad_batches", "gradient_accumulation"),
    "num_train_epochs": ("epochs", "num_epochs", "max_epochs"),
    "max_steps": ("steps", "num_steps", "total_steps", "num_train_steps"),
    "learning_rate": ("lr",),
    "lr_scheduler_type": ("lr_scheduler", "scheduler", "schedule"),
    "warmup_steps": ("warmup", "num_warmup_steps"),
    "optim": ("optimizer",),
    "max_grad_norm": ("gradient_clipping", "grad_clip", "clip_grad_norm"),
    "gradient_checkpointing": ("grad_checkpointing", "use_gradient_checkpointing"),
    "eval_strategy": ("evaluation_strategy",),
    "report_to": ("use_wandb", "wandb_project", "logger"),
    "output_dir": ("output", "output_path", "save_dir"),
    "stage": ("task", "train_type", "training_type", "rl"),
    "dtype": ("torch_dtype", "model_dtype"),
    "lora": ("adapter", "use_lora", "use_peft", "finetuning_type", "peft_config", "peft"),
    "zero_stage": ("zero", "zero3", "deepspeed_stage"),
    "reward": ("reward_model", "reward_funcs", "reward_function", "reward_model_path"),
    "max_new_tokens": ("response_length", "max_completion_length", "max_response_length"),
    "group_size": ("num_generations", "group", "n_samples_per_prompt"),
    "ppo_epochs": ("num_ppo_epochs", "num_iterations"),
    "rollout_chunk_size": ("local_rollout_forward_batch_size",),
    "rollout_batch_size": ("generation_batch_size",),
    "clip_low and clip_high": ("cliprange", "clip_range", "epsilon"),
    "clip_high": ("epsilon_high",),
    "value_clip": ("cliprange_value",),
    "value_coef": ("vf_coef",),
    "kl_coef": ("init_kl_coef",),
    "critic": ("value_model", "value_model_path"),
    "level": ("importance_sampling_level",),
    "ptx_coef": ("pretrain_coef", "ptx_weight"),
}  # fmt: skip
_OTHERWISE = {  # written in another way
    "warmup_steps: 0.03 (below 1 a share of all steps)": ("warmup_ratio",),
    "lora: {r: 16}": ("lora_r", "lora_rank", "rank"),
    "lora: {lora_alpha: 32}": ("lora_alpha",),
    "lora: {lora_dropout: 0.05}": ("lora_dropout",),
    "lora: {target_modules: [q_proj, v_proj]}": ("lora_target", "lora_target_modules", "lora_target_linear"),
    "beta": ("dpo_beta", "pref_beta"),
    "loss_type": ("pref_loss", "dpo_loss"),
    "rope: {max_length: 32768, method: yarn}": ("rope_scaling", "rope_parameters"),
}
_NAMES = {name: key for known in (_ELSEWHERE, _OTHERWISE) for key, names in known.items() for name in names}


def check(key: str, known: Iterable[str], where: str = "") -> None:
    """Raises ConfigError where `key` is none of the `known` ones, with the nearest or what it is called here, and where fastllm
    decides it itself. where: of which mapping it is, for the message; empty for a whole configuration."""
    known = list(known)
    if not where and key in TAKEN:
        raise ConfigError(f"{key} cannot be set: {TAKEN[key]}")
    if key in known:
        return
    if not where and (here := _NAMES.get(key.lower().replace("-", "_"))):
        raise ConfigError(f"unknown key {key!r}; here that is {here}")
    raise ConfigError(f"{where}unknown key {key!r}{did_you_mean(key, known)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message: "; did you mean 'x'?", or nothing where none is near."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
