"""Evaluation in stages ppo and conditional: greedy answers to other prompts; and the FLOPs of an iteration, counted by hand."""

import json
import math

import pytest
import torch

from fastllm.train import checkpoint, config
from fastllm.train.online.evaluation import evaluate
from fastllm.train.online.run import Run
from fastllm.train.throughput import forward_flops, step_flops

from .conftest import timeless, trained
from .rewards import printable

transformers = pytest.importorskip("transformers")


@pytest.fixture
def settings(settings, write):
    others = str(write("others.jsonl", [{"prompt": f"Tell {n}"} for n in range(7)]))
    return {**settings, "eval_data": others, "eval_steps": 1, "reward": "tests.train.online.rewards:printable"}


def test_the_best_checkpoint_by_greedy_reward_is_kept_and_a_resumed_run_knows_it(settings):
    more = {"save_total_limit": 1, "save_steps": 100, "eval_on_start": True, "learning_rate": 0.02, "max_steps": 5}
    run, result, log = trained(settings, **more)
    told = {line["step"]: line["eval_reward"] for line in log if "eval_reward" in line}
    assert list(told) == [0, 1, 2, 3, 4, 5]
    best = max(list(told)[1:], key=lambda step: (told[step], -step))
    assert result.best_eval_reward == told[best]
    kept = {int(path.name.removeprefix(checkpoint.NAME)) for path in checkpoint.complete(run.folder)}
    assert kept == {best, 5}
    state = json.loads((run.folder / f"{checkpoint.NAME}{best}" / checkpoint.STATE).read_text())
    assert (state["best_metric"], state["best_global_step"]) == (told[best], best)
    model = transformers.AutoModelForCausalLM.from_pretrained(run.folder / f"{checkpoint.NAME}{best}").eval()
    rewards = []
    for one in run.eval_prompts.rows:  # one after the other, without padding
        ids = torch.tensor([one.ids])
        answer = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=258
        )[0, ids.shape[1] :]
        rewards += printable([], [run.tokenizer.decode(answer, skip_special_tokens=True)], [])
    assert sum(rewards) / 7 == pytest.approx(told[best], abs=1e-6)
    longer = {**more, "max_steps": 6}
    whole = trained(settings, **longer)[2]
    resumed = trained(settings, **longer, resume_from_checkpoint=str(run.folder))[2]
    assert timeless(resumed) == timeless(whole)


def test_an_evaluation_takes_nothing_from_what_training_draws_and_is_told(settings, capsys):
    more = {"save_strategy": "no", "max_steps": 3}
    logs = [trained(settings, **more, eval_steps=n, eval_reward="tests.train.online.rewards:draws")[2] for n in (1, 3)]
    assert capsys.readouterr().err.count("eval_reward ") == 3 + 1
    often, once = ([line for line in timeless(log) if "reward" in line] for log in logs)
    assert often == once


def test_a_reward_model_is_checked_by_a_function_and_conditional_asks_for_the_highest_score(
    settings, folder, tmp_path, tokenizer
):
    path = tmp_path / "judge"
    transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(path)
    tokenizer.save_pretrained(path)
    for more in ({}, {"stage": "conditional", "kl_coef": None}):
        values = {k: v for k, v in {**settings, "reward": str(path), **more}.items() if v is not None}
        run = Run(config.parse({**values, "eval_reward": "tests.train.online.rewards:printable"}))
        found = evaluate(run.course, run.eval_prompts, *run.judge)
        assert 0 <= found["eval_reward"] <= 1
        assert 1 <= found["eval_response_tokens"] <= 8
        state = torch.get_rng_state()
        by_model = evaluate(run.course, run.eval_prompts, None, str(path))
        assert torch.equal(state, torch.get_rng_state())
        assert by_model["eval_reward"] != found["eval_reward"]
        assert by_model["eval_response_tokens"] == found["eval_response_tokens"]


@pytest.mark.parametrize("lora", [False, True])
def test_flops_are_those_of_every_pass_and_logits_are_of_answers_alone(settings, lora):
    more = {"lora": {"r": 4, "target_modules": ["q_proj"]}} if lora else {}
    run = Run(config.parse({**settings, **more, "ppo_epochs": 3, "max_steps": 1}))
    course, models = run.course, run.course.engine.models
    figures = {}
    from fastllm.train.online import ppo

    told = course.told

    def seen(rollout, scores):
        figures["lengths"] = rollout.lengths
        return told(rollout, scores)

    course.told = seen
    found = ppo.iterate(course)
    lengths, answered = [n for n, _ in figures["lengths"]], sum(n for _, n in figures["lengths"])
    table = models.actor.get_output_embeddings().weight.numel()
    spared = sum(lengths) - answered  # prompt tokens, of which no logits are made
    fed = [n - 1 for n in lengths]
    assert found["rollout_flops"] == pytest.approx(forward_flops(models.actor, fed) - 2 * table * (sum(fed) - answered))
    plain = forward_flops(models.actor, lengths, adapters=False) - 2 * table * spared
    critic = forward_flops(models.critic, lengths)
    assert found["score_flops"] == pytest.approx(
        forward_flops(models.actor, lengths) - 2 * table * spared + plain + critic
    )
    backward = 4 if lora else 6  # a frozen head takes no gradient of its own
    actor = step_flops(models.actor, lengths).model - backward * table * spared
    assert found["train_flops"] == pytest.approx(3 * (actor + step_flops(models.critic, lengths).model))
    assert found["hardware_flops"] == pytest.approx(sum(found[f"{p}_flops"] for p in ("rollout", "score", "train")))


def test_tflops_are_flops_over_seconds(settings):
    _, result, log = trained(settings, max_steps=3)
    for line in (line for line in log if "step_s" in line):
        parts = sum(line[f"{name}_tflops"] * line[f"{name}_s"] for name in ("rollout", "score", "train"))
        assert line["tflops"] * line["step_s"] == pytest.approx(parts, rel=1e-4)
        assert "mfu" not in line, "a CPU has no published peak"
    assert math.isfinite(result.throughput["tflops"])


def test_flops_of_texts_are_of_those_learnt_from_and_a_pass_of_those_only_looked_at(settings, write, monkeypatch):
    from fastllm.train.online import ppo

    texts = str(write("texts.jsonl", [{"text": f"{n} abc" * (n + 1)} for n in range(9)]))
    more = {"pretrain_data": texts, "ptx_coef": 0.1, "target_kl": 1e-9, "max_steps": 1}
    run = Run(config.parse({**settings, **more}))
    course, drawn = run.course, []
    following = course._next_texts

    def next_texts():
        ids, attention, mask = following()
        drawn.append(attention.sum(-1).tolist())
        return ids, attention, mask

    monkeypatch.setattr(course, "_next_texts", next_texts)
    monkeypatch.setattr(course.work, "learnt", lambda *_, **__: None)  # of responses
    monkeypatch.setattr(course.work, "looked", lambda *_: None)
    found = ppo.iterate(course)
    assert (found["updates"], found["stopped"], len(drawn)) == (1, 1, 2)
    actor = course.engine.models.actor
    assert found["train_flops"] == pytest.approx(step_flops(actor, drawn[0]).model + forward_flops(actor, drawn[1]))


def test_the_least_rate_of_a_schedule_is_a_rate(settings):
    more = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}, "save_strategy": "no"}
    log = trained(settings, **more, max_steps=3)[2]
    assert [line["learning_rate"] for line in log if "learning_rate" in line][-1] == pytest.approx(1e-3)
