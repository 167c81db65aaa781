"""Stage ppo on a reward that anyone can check, the share of digits in the answer."""

import math
import random

import pytest
import torch

from fastllm.train import config
from fastllm.train.examples import share_of_digits
from fastllm.train.online import experience, reward
from fastllm.train.online.options import settled
from fastllm.train.online.rollout import ends_of, padded, response_mask, sample
from fastllm.train.online.run import Run
from fastllm.train.run import Run as TrainerRun

from .conftest import trained

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "more",
    [
        {"advantage": "gae"},
        {"advantage": "grpo", "kl_loss_coef": 0.001},
        {"advantage": "reinforce++"},
    ],
    ids=["gae", "grpo", "reinforce++"],
)
def test_the_reward_rises(settings, more):
    settings = {**settings, "rollout_batch_size": 32, "per_device_train_batch_size": 16, "max_steps": 14, **more}
    _, result, log = trained(settings, save_strategy="no")
    rewards = [line["reward"] for line in log]
    assert sum(rewards[-3:]) / 3 > 0.15 + sum(rewards[:3]) / 3
    assert result.last_reward == rewards[-1]
    assert all(math.isfinite(value) for line in log for value in line.values())


def test_critics_learn_alone_while_they_warm_up(settings):
    run = Run(config.parse({**settings, "critic_warmup_steps": 2, "max_steps": 3}))
    models = run.course.engine.models
    first = {name: [p.clone() for p in getattr(models, name).parameters()] for name in ("actor", "critic")}
    run.steps = 2
    run.go()
    assert all(torch.equal(a, b) for a, b in zip(first["actor"], models.actor.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(first["critic"], models.critic.parameters()))
    run.steps = 3
    run.go()
    assert not all(torch.equal(a, b) for a, b in zip(first["actor"], models.actor.parameters()))


# ---- sampling and scoring ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("patch", ["auto", False])
def test_log_probabilities_are_those_that_tokens_were_sampled_with(settings, temperature, patch):
    run = Run(config.parse({**settings, "temperature": temperature, "patch": patch, "rollout_chunk_size": 5}))
    course = run.course
    own = {"min_p": 0.9, "no_repeat_ngram_size": 1, "suppress_tokens": list(range(80)), "top_p": 0.1}
    course.engine.models.actor.generation_config.update(do_sample=True, **own)  # as models come with
    asked = course.prompts.at(0, 12)
    torch.manual_seed(0)
    rollout = sample(course.engine, course.tokenizer, asked, chunk=5, max_new_tokens=8, temperature=temperature)
    found = experience.opinions(course.engine, rollout, 7)
    assert course.engine.models.actor.generation_config.min_p == 0.9
    course.engine.models.actor.generation_config = transformers.GenerationConfig(bos_token_id=None)
    torch.manual_seed(0)
    prompt = rollout.ids.shape[1] - 8
    at = 0
    for begin in (0, 5, 10):
        ids, attention = padded([one.ids for one in asked[begin : begin + 5]], run.tokenizer.pad_token_id, "cpu")
        how = transformers.GenerationConfig(
            do_sample=True, temperature=temperature, top_k=0, max_new_tokens=8, pad_token_id=258, output_logits=True,
            eos_token_id=ends_of(course.engine.models.actor, run.tokenizer), return_dict_in_generate=True,
        )  # fmt: skip
        output = course.engine.models.actor.generate(input_ids=ids, attention_mask=attention, generation_config=how)
        logits = torch.stack(output.logits, 1).float() / temperature
        tokens = output.sequences[:, ids.shape[1] :]
        expected = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        rows = slice(at, at + len(ids))
        mask = rollout.mask[rows, : tokens.shape[1]]
        assert torch.equal(rollout.ids[rows, prompt : prompt + tokens.shape[1]][mask], tokens[mask])
        error = (found.logprobs[rows, : tokens.shape[1]] - expected)[mask].abs().max()
        assert error < 1e-4
        at += len(ids)
    assert torch.equal(found.logprobs[~rollout.mask], torch.zeros(int((~rollout.mask).sum())))


def test_a_response_ends_with_its_first_end_token_and_padding_reaches_nothing(settings):
    tokens = torch.tensor([[5, 257, 6, 257], [1, 2, 3, 4], [257, 258, 258, 258]])
    assert response_mask(tokens, [257]).tolist() == [
        [True, True, False, False],
        [True] * 4,
        [True, False, False, False],
    ]
    run = Run(config.parse(settings))
    course = run.course
    rollout = sample(
        course.engine, course.tokenizer, course.prompts.at(0, 9), chunk=9, max_new_tokens=8, temperature=1.0
    )
    whole = experience.opinions(course.engine, rollout, 9)
    alone = [experience.opinions(course.engine, rollout, 1), experience.opinions(course.engine, rollout, 4)]
    for other in alone:
        assert (whole.logprobs - other.logprobs).abs().max() < 1e-5
        assert torch.equal(whole.values, other.values)  # a fresh head: zeros
    assert not whole.values.any()


def test_rewards_come_from_rows_and_stay_with_their_prompts(settings, write):
    data = write("worth.jsonl", [{"prompt": f"n {n}", "worth": n} for n in range(10)])
    run = Run(
        config.parse({**settings, "data": str(data), "reward": "tests.train.online.rewards:echo", "group_size": 2})
    )
    course = run.course
    asked = [one for one in course.next_prompts() for _ in range(2)]
    rollout = sample(course.engine, course.tokenizer, asked, chunk=16, max_new_tokens=2, temperature=1.0)
    found = experience.judged(course.engine, rollout, course.options, course.reward, course.normaliser, 0.0)
    assert found.scores.tolist() == [one.row["worth"] for one in asked]
    assert len(asked) == 16
    every = course.prompts.at(0, 20)
    assert sorted(one.row["worth"] for one in every[:10]) == list(range(10))
    assert [one.row["worth"] for one in every[:10]] != [one.row["worth"] for one in every[10:]]


def test_a_reward_model_scores_as_it_does_in_transformers_and_the_critic_begins_as_it(
    settings, folder, tmp_path, tokenizer
):
    path = tmp_path / "judge"
    transformers.set_seed(7)
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    judge.save_pretrained(path)
    tokenizer.save_pretrained(path)
    run = Run(config.parse({**settings, "reward": str(path)}))
    course = run.course
    rollout = sample(
        course.engine, course.tokenizer, course.prompts.at(0, 8), chunk=8, max_new_tokens=6, temperature=1.0
    )
    found = experience.judged(course.engine, rollout, course.options, None, course.normaliser, 0.0)
    expected = [
        judge(input_ids=ids[seen.bool()][None]).logits.item() for ids, seen in zip(rollout.ids, rollout.attention)
    ]
    assert found.scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(course.engine.models.critic.score.weight, judge.score.weight)
    assert found.values.abs().max() > 0
    assert not any(p.requires_grad for p in course.engine.models.reward.parameters())


def test_a_critic_may_begin_as_a_configuration(settings):
    own = {"model": settings["model"] + "/config.json", "tokenizer": settings["model"], "from_scratch": True}
    _, result, _ = trained(settings, **own, max_steps=1, save_strategy="no")
    assert result.steps == 1


def test_normalised_scores_have_the_moments_of_all_so_far():
    torch.manual_seed(0)
    normaliser, seen = reward.Normaliser(), []
    for n in (3, 1, 7, 20):
        scores = torch.randn(n) * 3 + 5
        seen += scores.tolist()
        found = normaliser(scores, lambda x: x)
        every = torch.tensor(seen, dtype=torch.float64)
        expected = (scores.double() - every.mean()) / (every.std(unbiased=False) + 1e-8)
        assert (found - expected).abs().max() < 1e-5


# ---- updates ---------------------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_are_one_mini_batch(settings, write):
    texts = str(write("texts.jsonl", [{"text": f"{n} abc" * (1 + n % 5)} for n in range(20)]))
    found = []
    for micro, accumulation in ((8, 1), (2, 4), (1, 8)):
        run, _, log = trained(
            settings, per_device_train_batch_size=micro, gradient_accumulation_steps=accumulation, max_steps=1, seed=1,
            ptx_coef=0.5, pretrain_data=texts, entropy_coef=0.01, kl_loss_coef=0.01, learning_rate=1e-3, ppo_epochs=1,
        )  # fmt: skip
        found.append((log[0], [p.detach().clone() for p in run.course.engine.models.parameters()]))
    for line, weights in found[1:]:
        for key in ("policy_loss", "value_loss", "entropy", "ptx_loss", "grad_norm"):
            assert line[key] == pytest.approx(found[0][0][key], rel=1e-4, abs=1e-6), key
        # Adam divides by the gradient's own size, so that rounding shows where a gradient is next to nothing
        worst = max((a - b).abs().max().item() for a, b in zip(found[0][1], weights))
        assert worst < 2.1e-3


def test_updates_stop_once_the_policy_has_moved_too_far(settings):
    far = trained(settings, target_kl=1e-4, learning_rate=0.02, ppo_epochs=4)[2]
    assert all(line["stopped"] == 1.0 for line in far)
    assert all(1 <= line["updates"] < 8 for line in far)  # the first mini-batch is on the policy that sampled
    free = trained(settings, target_kl=1e4, learning_rate=0.02, ppo_epochs=4)[2]
    assert all(line["stopped"] == 0.0 and line["updates"] == 8 for line in free)
    assert max(line["kl"] for line in far) < max(line["kl"] for line in free)


def test_the_kl_coefficient_follows_the_kl(settings):
    more = {"kl_coef": 0.05, "learning_rate": 0.02, "max_steps": 6, "ppo_epochs": 4}
    log = trained(settings, adaptive_kl={"target": 0.05, "horizon": 64}, **more)[2]
    coefficients = [line["kl_coef"] for line in log]
    assert coefficients[0] == 0.05
    for before, line, after in zip(coefficients, log, coefficients[1:]):
        error = min(max(line["kl"] / 0.05 - 1, -0.2), 0.2)
        assert after == pytest.approx(before * (1 + error * 16 / 64))
    assert coefficients[1] < coefficients[0] < coefficients[-1]  # first no distance at all, then too much


@pytest.mark.parametrize("family", ["bloom", "opt", "gpt2"])
def test_a_policy_with_dropout_begins_to_learn_as_the_one_that_sampled(settings, family, tmp_path, tokenizer):
    made = {
        "bloom": transformers.BloomConfig(
            vocab_size=259, hidden_size=32, n_layer=1, n_head=2, hidden_dropout=0.5, attention_dropout=0.5
        ),
        "opt": transformers.OPTConfig(
            vocab_size=259, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=64, dropout=0.5, attention_dropout=0.5, layerdrop=0.5, pad_token_id=258,
        ),
        "gpt2": transformers.GPT2Config(
            vocab_size=259, n_embd=32, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5
        ),
    }[family]  # fmt: skip
    path = tmp_path / family
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(path)
    tokenizer.save_pretrained(path)
    more = {
        "model": str(path),
        "rollout_batch_size": 8,
        "ppo_epochs": 1,
        "max_steps": 1,
        "save_strategy": "no",
        "patch": False,
    }
    log = trained(settings, **more)[2]
    assert log[0]["ratio_max"] == pytest.approx(1.0, abs=1e-4)
    assert log[0]["approx_kl"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("more", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_precision_and_checkpointing_are_settings(settings, more):
    _, _, log = trained(settings, max_steps=2, **more)
    plain = trained(settings, max_steps=2)[2]
    assert log[1]["policy_loss"] == pytest.approx(plain[1]["policy_loss"], abs=0.05 if "bf16" in more else 1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"advantage": "rloo", "group_size": 2},
        {"advantage": "dr_grpo", "aggregation": "token-sum-norm"},
        {"advantage": "reinforce++-baseline", "level": "sequence", "aggregation": "seq-mean-token-mean"},
    ],
    ids=lambda more: more["advantage"],
)
def test_other_comparisons_and_aggregations_move_the_policy(settings, more):
    run, _, log = trained(settings, max_steps=2, save_strategy="no", **more)
    assert run.course.engine.models.critic is None
    assert log[1]["kl"] > 1e-4
    assert log[0]["grad_norm"] > 0


def test_adapters_learn_and_the_model_without_them_is_the_reference(settings):
    peft = pytest.importorskip("peft")
    more = {
        "lora": {"r": 16, "lora_alpha": 64, "target_modules": "all-linear"},
        "learning_rate": 0.03,
        "export": "both",
    }
    run, result, log = trained(settings, max_steps=12, rollout_batch_size=32, kl_loss_coef=0.001, **more)
    assert log[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert log[-1]["kl"] > 0.01
    assert log[-1]["reward"] > log[0]["reward"]
    assert run.course.engine.models.reference is None
    base = transformers.AutoModelForCausalLM.from_pretrained(settings["model"])
    ids = torch.arange(10, 30)[None]
    before = base(input_ids=ids).logits
    adapted = peft.PeftModel.from_pretrained(base, run.folder / "final")(input_ids=ids).logits
    merged = transformers.AutoModelForCausalLM.from_pretrained(result.final)(input_ids=ids).logits
    assert (adapted - before).abs().max() > 1e-3
    assert (adapted - merged).abs().max() < 1e-3


def test_defaults_depend_on_the_advantage():
    given = {"stage": "ppo", "model": "m", "data": "d", "reward": "a:b", "max_length": 512}
    for kind, group, kl, in_loss in (("gae", 1, 0.05, 0.0), ("grpo", 4, 0.0, 0.04), ("rloo", 4, 0.05, 0.0)):
        found = settled(config.parse({**given, "advantage": kind}).online, 8)
        assert (found.group_size, found.kl_coef, found.kl_loss_coef) == (group, kl, in_loss)
        assert found.rollout_batch_size == found.rollout_chunk_size == 32
    preset = config.parse({**given, "preset": "ppo_max", "pretrain_data": "t", "reward_clip": 2.0})
    assert (preset.online.normalize_rewards, preset.online.reward_clip, preset.online.ptx_coef) == (True, 2.0, 0.1)
    assert preset.arguments.max_grad_norm == 1.0


# ---- the whole road --------------------------------------------------------------------------------------------------


def test_a_reward_model_that_saw_pairs_alone_teaches_what_they_prefer(settings, write):
    """Digits are preferred to any other bytes; that they become more frequent is checked by counting them."""
    chance = random.Random(0)
    answer = lambda letters: "".join(chance.choices(letters, k=chance.randint(1, 8)))  # noqa: E731
    every = "".join(chr(n) for n in range(33, 127))
    pairs = [{"prompt": f"Say {n}", "chosen": answer("0123456789"), "rejected": answer(every)} for n in range(200)]
    learnt = {
        "stage": "rm", "data": str(write("pairs.jsonl", pairs)), "max_length": 64, "max_steps": 40, "num_train_epochs": 10,
        "per_device_train_batch_size": 16, "learning_rate": 1e-2, "lr_scheduler_type": "linear", "save_strategy": "no",
    }  # fmt: skip
    judge = TrainerRun(config.parse({**learnt, **{key: settings[key] for key in ("model", "output_dir", "seed")}})).go()
    shares = {}
    for name, more in {
        "ppo": {},
        "ppo_max": {"preset": "ppo_max", "critic_warmup_steps": 2, "ptx_coef": 0, "max_steps": 16},
    }.items():
        sampled = {"rollout_batch_size": 32, "per_device_train_batch_size": 16, "max_steps": 14, "save_strategy": "no"}
        run = Run(config.parse({**settings, "reward": judge.final, **sampled, "kl_coef": 0.002, **more}))
        models = run.course.engine.models
        assert torch.equal(models.critic.score.weight, models.reward.score.weight)
        before = _digits(run)
        run.go()
        shares[name] = (before, _digits(run))
        assert shares[name][1] > 0.15 + before, shares


def _digits(run):
    """The share of digits in 64 answers."""
    torch.manual_seed(0)
    course = run.course
    found = sample(
        course.engine, course.tokenizer, course.prompts.at(0, 64), chunk=64, max_new_tokens=8, temperature=1.0
    )
    return sum(share_of_digits([], found.texts, [])) / 64
