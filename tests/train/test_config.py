"""Configurations: what is accepted, and one clear error for what is not."""

import pytest

from fastllm import ConfigError
from fastllm.train import config

BASE = {"stage": "sft", "model": "somewhere", "data": "chats.jsonl"}


def test_a_file_and_overrides_make_dataclasses(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "stage: pretrain\nmodel: m\ndata: [a.txt, b.jsonl]\nlearning_rate: 1e-4\nrope: {max_length: 64}\nbf16: false\n"
    )
    options = config.load(path, ["max_steps=7", "rope.method=ntk", "learning_rate=3e-4", "data=c.txt", "seed=5"])
    assert (options.data.stage, options.data.data, options.model.model) == ("pretrain", "c.txt", "m")
    assert options.model.rope == {"max_length": 64, "method": "ntk"}
    args = options.arguments
    assert (args.max_steps, args.learning_rate, args.seed) == (7, 3e-4, 5)
    assert options.values["learning_rate"] == 3e-4


def test_defaults_are_those_of_a_language_model_run():
    args = config.parse(BASE).arguments
    assert (args.save_total_limit, args.report_to, args.num_train_epochs, args.remove_unused_columns) == (
        3,
        [],
        1.0,
        False,
    )
    validated = config.parse({**BASE, "eval_data": "v.jsonl"}).arguments
    assert (validated.eval_strategy, validated.metric_for_best_model, validated.greater_is_better) == (
        "epoch",
        "loss",
        False,
    )
    assert config.parse({**BASE, "eval_data": "v.jsonl", "eval_steps": 5}).arguments.eval_strategy == "steps"


def test_true_resumes_the_latest_run():
    assert config.parse({**BASE, "resume_from_checkpoint": True}).arguments.resume_from_checkpoint == "latest"
    assert config.parse({**BASE, "resume_from_checkpoint": False}).arguments.resume_from_checkpoint is None


def test_no_is_a_strategy_and_not_false():
    assert config.parse({**BASE, "save_strategy": False}).arguments.save_strategy == "no"


def test_gradient_checkpointing_has_both_of_its_names():
    for name in ("gradient_checkpointing", "activation_checkpointing"):
        args = config.parse({**BASE, name: True}).arguments
        assert getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"learnig_rate": 1}, "unknown key 'learnig_rate'; did you mean 'learning_rate'?"),
        ({"max_lenght": 1}, "unknown key 'max_lenght'; did you mean 'max_length'?"),
        ({"xyzzy": 1}, "unknown key 'xyzzy'"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": -1}, "learning_rate must not be negative, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must not be negative, got nan"),
        ({"max_length": 3.5}, "max_length must be a whole number, got 3.5"),
        ({"max_length": True}, "max_length must be a whole number, got True"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"packing": "yes"}, "packing must be true or false, got 'yes'"),
        ({"data": 3}, "data must be a text or a list, got 3"),
        ({"rope": "yarn"}, "rope must be a mapping, got 'yarn'"),
        ({"rope": {"method": "yarn"}}, "rope needs max_length"),
        ({"streaming": {"sinks": 4}}, "streaming needs eval_data"),
        (
            {"streaming": {"windw": 4}},
            "streaming has no 'windw', it takes sinks, window, tokens; did you mean 'window'?",
        ),
        ({"streaming": {"window": 0}}, "streaming.window must be a whole number, at least 1, got 0"),
        ({"streaming": {}, "stage": "dpo"}, "streaming belongs to stages pretrain, sft and mixed, not to dpo"),
        ({"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, got 'float8'"),
        ({"on_bad_row": "ignore"}, "on_bad_row must be one of error, skip, got 'ignore'"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"stage": "stf"}, "got 'stf'; did you mean 'sft'?"),
        ({"stage": "mixed"}, "stage mixed needs pretrain_data"),
        ({"pretrain_data": "x"}, "pretrain_data belongs to stage mixed, not to sft"),
        ({"remove_unused_columns": True}, "remove_unused_columns cannot be set"),
        ({"zero_stage": 4}, "zero_stage must be 0, 1, 2 or 3, got 4"),
        ({"offload": "optimizer"}, "offload needs zero_stage"),
        ({"offload": "all", "zero_stage": 2}, "offload: all needs zero_stage 3"),
        ({"zero_stage": 2, "deepspeed": {"zero_optimization": {}}}, "not both"),
        ({"deepspeed": "no.json"}, "deepspeed: there is no file no.json"),
        ({"export": "merged"}, "export belongs to runs with lora"),
        ({"eval_strategy": "steps"}, "eval_strategy needs eval_data"),
        ({"eval_steps": 5}, "eval_steps needs eval_data"),
        ({"eval_on_start": True}, "eval_on_start needs eval_data"),
        ({"max_steps": 0, "num_train_epochs": 0}, "nothing to train"),
        ({"optim": "adamw_torchy"}, "got 'adamw_torchy'; did you mean 'adamw_torch'?"),
        ({"lr_scheduler_type": "cosin"}, "got 'cosin'; did you mean 'cosine'?"),
        ({"lr": 1}, "unknown key 'lr'; here that is learning_rate"),
        ({"per_device_batch_size": 1}, "did you mean 'per_device_"),
        ({"max_seq_length": 1}, "here that is max_length"),
        ({"sample_packing": True}, "here that is packing"),
        ({"model_name_or_path": "m"}, "here that is model"),
        ({"lora-rank": 8}, "here that is lora: {r: 16}"),
        ({"warmup_ratio": 0.1}, "warmup_"),
        ({"lora": {}}, "lora is empty: give r"),
        ({"patch": []}, "patch is empty"),
        ({"data": []}, "data is empty: give a file"),
        ({"data": ""}, "data is empty: give a file"),
        ({"model": ""}, "model is empty"),
        ({"resume_from_checkpoint": ""}, "resume_from_checkpoint is empty"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite, got inf"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"save_steps": 0}, "save_steps must be above 0, got 0; save_strategy: 'no' leaves checkpoints out"),
        ({"eval_data": "v", "eval_steps": 0}, "eval_steps must be above 0"),
        ({"logging_steps": -1}, "logging_steps must be above 0"),
        ({"logging_nan_inf_filter": True}, "a loss that is not finite stops training"),
    ],
)
def test_what_is_wrong_is_named_with_its_value(more, message):
    with pytest.raises(ConfigError) as raised:
        config.parse({**BASE, **more})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_keys_are_named():
    with pytest.raises(ConfigError, match="lacks model and data"):
        config.parse({"stage": "sft"})
    with pytest.raises(ConfigError, match="lacks stage"):
        config.parse({"model": "m", "data": "d"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: [1", "line 1"),
        ("a: 1\n\tb: 2", "line 2"),
        ("- stage", "must hold keys and values"),
        ("stage: sft\nmodel: m\nstage: dpo", "line 3: stage stands there twice"),
        ("stage: sft\nrope: {method: ntk, method: yarn}", "line 2: method stands there twice"),
        ("", "must hold keys and values, got None"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        config.load(path)


def test_a_file_that_is_not_there_and_an_override_that_is_none(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file"):
        config.load(tmp_path / "no.yaml")
    path = tmp_path / "run.yaml"
    path.write_text("stage: sft\nmodel: m\ndata: d")
    with pytest.raises(ConfigError, match="an override is written key=value, got 'max_steps'"):
        config.load(path, ["max_steps"])
