"""What is wrong with a configuration of stage ppo or conditional is one line, exit code 2, and nothing written."""

import pytest
import yaml

from fastllm import ConfigError, cli
from fastllm.train import config

from . import rewards

pytest.importorskip("transformers")

BASE = {"stage": "ppo", "model": "m", "data": "d", "reward": "a:b", "per_device_train_batch_size": 8}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"reward": None}, "stage ppo needs reward: a reward model, or a Python function written module:function"),
        ({"stage": "conditional", "reward": None}, "stage conditional needs reward"),
        ({"stage": "sft"}, "reward belongs to stages ppo and conditional, not to sft"),
        ({"group_size": 3}, "group_size must divide rollout_batch_size (32), got 3"),
        ({"rollout_batch_size": 12}, "rollout_batch_size must be a multiple of the mini-batch, 8 responses"),
        ({"gradient_accumulation_steps": 3, "rollout_batch_size": 32}, "8 x gradient_accumulation_steps 3), got 32"),
        ({"advantage": "grpo", "group_size": 1}, "group_size must be at least 2, got 1"),
        ({"advantage": "rloo", "lam": 0.9}, "lam belongs to advantage gae, not to rloo"),
        ({"advantage": "grpo", "critic": "c"}, "critic belongs to advantage gae, not to grpo, which has no critic"),
        ({"advantage": "vtrace"}, "advantage must be one of gae, grpo"),
        ({"preset": "ppo_min"}, "preset must be one of ppo_max, got 'ppo_min'"),
        ({"preset": "ppo_max"}, "preset ppo_max mixes in a loss on texts: give pretrain_data, or ptx_coef: 0"),
        ({"pretrain_data": "t"}, "pretrain_data is read in stage ppo only with ptx_coef above 0"),
        ({"max_new_tokens": 2048}, "max_new_tokens (2048) must be below max_length (2048)"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"kl_coef": float("nan")}, "kl_coef must be at least 0, got nan"),
        ({"gamma": 1.5}, "gamma must be at most 1, got 1.5"),
        ({"adaptive_kl": {"target": 6}}, "adaptive_kl needs target and horizon"),
        ({"adaptive_kl": {"target": 6, "horizon": 100}, "kl_coef": 0}, "adaptive_kl scales kl_coef, which is 0"),
        ({"packing": True}, "packing does not belong to stage ppo"),
        ({"fp16": True}, "fp16 does not belong to stage ppo"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor belongs to stages pretrain and sft, not to ppo"),
        ({"lora": {"r": 2, "bias": "all"}}, "lora.bias must be none in stage ppo"),
        ({"eval_data": "v"}, "eval_data needs eval_steps"),
        ({"eval_steps": 5}, "eval_steps needs eval_data"),
        (
            {"eval_data": "v", "eval_steps": 5, "eval_strategy": "epoch"},
            "eval_strategy: epoch does not belong to stage ppo",
        ),
        ({"eval_data": "v", "eval_steps": 5, "eval_reward": "judge"}, "eval_reward must be a Python function"),
        ({"score_levels": 4}, "score_levels belongs to stage conditional, not to ppo"),
        ({"stage": "conditional", "ppo_epochs": 4}, "ppo_epochs belongs to stage ppo, not to conditional"),
        ({"stage": "conditional", "kl_coef": 0.1}, "kl_coef belongs to stage ppo, not to conditional"),
        ({"rollout_batchsize": 4}, "did you mean 'rollout_batch_size'?"),
        ({"temperature": float("inf")}, "temperature must be a finite number, got inf"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha has no effect in stage ppo"),
        ({"save_only_model": True}, "save_only_model has no effect in stage ppo"),
        ({"stage": "conditional", "torch_compile": True}, "torch_compile has no effect in stage conditional"),
        ({"save_strategy": "epoch"}, "save_strategy: epoch does not belong to stage ppo"),
        ({"save_strategy": "best"}, "save_strategy: best does not belong to stage ppo"),
        ({"eval_on_start": True}, "eval_on_start needs eval_data"),
        (
            {"eval_data": "v", "eval_steps": 5, "lr_scheduler_type": "reduce_lr_on_plateau"},
            "lr_scheduler_type: reduce_lr_on_plateau follows a loss",
        ),
        ({"vf_coef": 0.1}, "unknown key 'vf_coef'; here that is value_coef"),
        ({"cliprange": 0.2}, "here that is clip_low and clip_high"),
        ({"num_iterations": 2}, "here that is ppo_epochs"),
        ({"beta": 0.04}, "beta belongs to stage dpo, not to ppo; see kl_loss_coef and kl_coef"),
    ],
)
def test_keys_and_numbers_that_do_not_fit(more, message):
    with pytest.raises(ConfigError) as raised:
        config.parse({key: value for key, value in {**BASE, **more}.items() if value is not None})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"reward": "no_such_module:f"}, "reward: cannot import no_such_module:f"),
        ({"reward": "fastllm.train.examples:no_such"}, "reward: cannot import fastllm.train.examples:no_such"),
        ({"reward": "tests.train.online.rewards:constant"}, "is no function but int"),
        ({"reward": "./nowhere"}, "reward: there is no file or folder ./nowhere"),
        ({"reward": "MODEL"}, "is a LlamaForCausalLM, not a reward model with one score"),
        ({"critic": "./nowhere"}, "critic: there is no file or folder ./nowhere"),
        ({"data": "TEXTS"}, "a text, where the stage takes prompts"),
        ({"critic_warmup_steps": 4}, "critic_warmup_steps (4) leaves no iteration of 4"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}},
            "lr_scheduler_type cosine: get_cosine_schedule_with_warmup() got an unexpected keyword argument 'cycles'",
        ),
        ({"max_new_tokens": 8, "max_length": 512}, "max_length is 512, and the model reads 256 tokens"),
    ],
)
def test_a_wrong_call_is_one_line_exit_code_2_and_nothing_written(capsys, tmp_path, settings, write, more, message):
    texts = str(write("texts.jsonl", [{"text": "abc"}]))
    more = {key: {"MODEL": settings["model"], "TEXTS": texts}.get(str(value), value) for key, value in more.items()}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, **more}))
    assert cli.main(["train", str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("fastllm train: error: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "reward tests.train.online.rewards:too_few returned 1 numbers for 16 responses"),
        ("not_a_number", "returned nan for the response"),
        ("fails", "failed: KeyError: 'answer'"),
    ],
)
def test_a_reward_that_fails_is_named(capsys, tmp_path, settings, name, message):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "reward": f"tests.train.online.rewards:{name}"}))
    assert cli.main(["train", str(path)]) == 1  # the call was right
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_command_trains_and_reports(capsys, tmp_path, settings):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    assert cli.main(["train", str(path), "max_steps=2"]) == 0
    out, err = capsys.readouterr()
    assert "2 iterations, reward 0." in out
    assert "samples per second and device (rollout " in out
    assert "samples_per_s" in err


@pytest.mark.parametrize(("save_steps", "message"), [(1, "goes on from checkpoint-1"), (2, "it has no checkpoint yet")])
def test_an_interrupted_run_says_how_it_goes_on(capsys, monkeypatch, tmp_path, settings, save_steps, message):
    calls = []

    def interrupted(prompts, responses, rows):
        calls.append(len(responses))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return [0.0] * len(responses)

    monkeypatch.setattr(rewards, "echo", interrupted)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "reward": "tests.train.online.rewards:echo", "save_steps": save_steps}))
    assert cli.main(["train", str(path)]) == 130
    (folder,) = (tmp_path / "runs").iterdir()
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("stopped: ")
    assert message in said
    assert (str(folder) in said) == (save_steps == 1)


def test_evaluations_are_told_as_they_come(capsys, tmp_path, settings, write):
    others = str(write("others.jsonl", [{"prompt": "Tell 1"}]))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "eval_data": others, "eval_steps": 1, "eval_on_start": True}))
    assert cli.main(["train", str(path), "max_steps=2"]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "eval_reward" in line]
    assert [line.split()[1] for line in told] == ["0/2", "1/2", "2/2"]
    assert ["left" in line for line in told] == [False, True, True]
