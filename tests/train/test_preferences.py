"""Stages rm and dpo: pairs from file to batch, losses as plain formulas have them, runs that learn, resume and load elsewhere."""

import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from fastllm import cli
from fastllm.train import PackingCollator, PaddingCollator, checkpoint, config, data, encode, step_flops
from fastllm.train.formats import RowError, recognise
from fastllm.train.heads import score_head
from fastllm.train.pairs import PairCollator
from fastllm.train.run import Run
from fastllm.train.throughput import forward_flops

transformers = pytest.importorskip("transformers")
KINDS = ["sigmoid", "robust", "hinge", "ipo", "orpo", "simpo", "kto"]
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def pair(n):
    return {"prompt": f"say {n}", "chosen": f"{n}" + "!" * (n % 7), "rejected": "no " * (1 + n % 5) + f"{n}"}


@pytest.fixture
def pairs(write):
    return write("pairs.jsonl", [pair(n) for n in range(24)])


@pytest.fixture
def settings(folder, pairs, tmp_path):
    return {
        "stage": "dpo", "model": str(folder), "data": str(pairs), "output_dir": str(tmp_path / "runs"), "max_length": 128,
        "max_steps": 6, "num_train_epochs": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 3,
        "seed": 3,
    }  # fmt: skip


def trained(settings, **more):
    run = Run(config.parse({**settings, **more}))
    result = run.go()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return run, result, lines


def of_training(lines):
    return [line for line in lines if "loss" in line]


# ---- data --------------------------------------------------------------------------------------------------------


def test_strings_and_messages_are_the_same_preference(tokenizer):
    texts = recognise({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"})
    user = [{"role": "user", "content": "2 + 2?"}]
    as_messages = recognise({
        "prompt": user,
        **{key: [{"role": "assistant", "content": text}] for key, text in (("chosen", "4"), ("rejected", "5"))},
    })  # fmt: skip
    assert texts == as_messages
    (row,) = encode.Encoder(tokenizer, 128).preferences([texts])
    halves = row.input_ids[: row.chosen], row.input_ids[row.chosen :]
    for ids, answer in zip(halves, "45"):
        assert ids == tokenizer.apply_chat_template(
            [*user, {"role": "assistant", "content": answer}], return_dict=False
        )
    marked = [t for t, trained in zip(row.input_ids, row.trained) if trained]
    assert tokenizer.decode(marked) == "4<eos>\n\n5<eos>\n\n"


def test_earlier_answers_of_a_prompt_are_no_part_of_what_is_compared(tokenizer):
    turns = [("user", "a"), ("assistant", "bbbb"), ("user", "c")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    (row,) = encode.Encoder(tokenizer, 256).preferences([recognise({"prompt": prompt, "chosen": "d", "rejected": "e"})])
    assert tokenizer.decode([t for t, trained in zip(row.input_ids, row.trained) if trained]) == "d<eos>\n\ne<eos>\n\n"


def test_what_is_too_long_loses_the_same_of_both_prompts(tokenizer):
    turns = [("user", "one " * 20), ("assistant", "two"), ("user", "three")]
    prompt = [{"role": role, "content": text} for role, text in turns]
    encoder = encode.Encoder(tokenizer, 64)
    (row,) = encoder.preferences([recognise({"prompt": prompt, "chosen": "d", "rejected": "e " * 4})])
    assert row.cut
    text = tokenizer.decode(row.input_ids)
    assert "one" not in text
    assert text.count("three") == 2
    (row,) = encoder.preferences([recognise({"prompt": "x" * 99, "chosen": "d" * 9, "rejected": "e" * 70})])
    chosen, rejected = row.input_ids[: row.chosen], row.input_ids[row.chosen :]
    assert len(rejected) == 64
    prompts = [
        ids[: t.index(True)] for ids, t in ((chosen, row.trained[: row.chosen]), (rejected, row.trained[row.chosen :]))
    ]
    assert prompts[0] == prompts[1]
    assert len(prompts[0]) == 32
    (error,) = encoder.preferences([recognise({"prompt": "x", "chosen": "d" * 80 + "1", "rejected": "d" * 80 + "2"})])
    assert isinstance(error, RowError)
    assert "the same in the 64 tokens" in str(error)


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_has_the_chosen_first_and_reads_scores_where_transformers_does(pairs, tokenizer, packing):
    rows = list(data.prepare(str(pairs), encode.Encoder(tokenizer, 128), kind="preference").rows)[:3]
    collator = PackingCollator() if packing else PaddingCollator(tokenizer.pad_token_id)
    batch = PairCollator(collator, tokenizer.pad_token_id)([rows] if packing else rows)
    flat, at = batch["input_ids"].flatten(), batch["last"]
    if packing:
        assert batch["cu_seqlens"].tolist()[1:] == (at + 1).tolist()
    else:
        assert batch["input_ids"].shape[0] == 6
        assert at.tolist() == [
            n * batch["input_ids"].shape[1] + int(m) - 1 for n, m in enumerate(batch["attention_mask"].sum(1))
        ]
    wanted = [row["input_ids"][: row["chosen"]] for row in rows] + [row["input_ids"][row["chosen"] :] for row in rows]
    assert [flat[end - len(ids) + 1 : end + 1].tolist() for end, ids in zip(at.tolist(), wanted)] == wanted
    ends_with_padding = PairCollator(collator, int(wanted[0][-1]))([rows] if packing else rows)
    assert ends_with_padding["last"][0] == at[0] - 2  # it ends with two line feeds


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "a", "chosen": "b"}, "there is no rejected"),
        ({"prompt": "a", "rejected": "b"}, "there is no chosen"),
        ({"chosen": "a", "rejected": "b"}, "there is no prompt"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen is empty"),
        (
            {"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"},
            "one message of the assistant",
        ),
        (
            {"prompt": [{"role": "assistant", "content": "b"}], "chosen": "b", "rejected": "c"},
            "prompt ends with the assistant",
        ),
        ({"prompt": "a", "response": "b"}, "a conversation, where the stage takes preferences"),
    ],
)
@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_a_bad_row_is_named_with_its_line_and_nothing_is_written(
    settings, write, capsys, tmp_path, stage, row, problem
):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**settings, "stage": stage, "data": str(write("bad.jsonl", [pair(1), row]))}))
    assert cli.main(["train", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("fastllm train: error: ")
    assert "bad.jsonl:2: " in said[0]
    assert problem in said[0]
    assert not (tmp_path / "runs").exists()


# ---- losses ------------------------------------------------------------------------------------------------------


def stirred(run):
    """The policy a little away from its reference."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in run.trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return run.trainer


def plain_logps(model, rows, half):
    """Sums over the answer's tokens and their number, from logits, in float64."""
    sums, lengths = [], []
    for row in rows:
        part = slice(0, row["chosen"]) if half == 0 else slice(row["chosen"], None)
        ids, labels = torch.tensor(row["input_ids"][part]), torch.tensor(row["labels"][part])
        logp = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        sums.append(logp[labels[1:] != -100].sum())
        lengths.append((labels[1:] != -100).sum())
    return torch.stack(sums), torch.stack(lengths)


def plain_loss(kind, options, model, reference, rows):
    (c, n), (r, m) = plain_logps(model, rows, 0), plain_logps(model, rows, 1)
    beta = options.get("beta", 2.0 if kind == "simpo" else 0.1)
    if kind == "orpo":
        odds = [x - torch.log1p(-x.exp()) for x in (c / n, r / m)]
        return (-c / n - beta * F.logsigmoid(odds[0] - odds[1])).mean()
    if kind == "simpo":
        return -F.logsigmoid(beta * (c / n - r / m) - options.get("gamma", 1.0)).mean()
    with torch.no_grad():
        rc, rr = plain_logps(reference, rows, 0)[0], plain_logps(reference, rows, 1)[0]
    if kind == "kto":
        ratios = c - rc, r - rr
        kl = torch.cat(ratios).mean().clamp(min=0).detach()
        return (1 - torch.cat((beta * (ratios[0] - kl), beta * (kl - ratios[1]))).sigmoid()).mean()
    if kind == "ipo":
        return ((((c - rc) / n - (r - rr) / m) - 1 / (2 * beta)) ** 2).mean()
    z, e = beta * ((c - rc) - (r - rr)), options.get("label_smoothing", 0.0)
    if kind == "hinge":
        return F.relu(1 - z).mean()
    if kind == "robust":
        return ((-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)).mean()
    return (-(1 - e) * F.logsigmoid(z) - e * F.logsigmoid(-z)).mean()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_each_loss_and_its_gradient_are_the_plain_formulas(settings, kind, packing):
    options = {"loss_type": kind, **({"beta": 0.3, "label_smoothing": 0.1} if kind in ("sigmoid", "robust") else {})}
    run = Run(config.parse({**settings, **options, "packing": packing, "patch": "auto"}))
    trainer = stirred(run)
    trainer.model.train()
    rows = run.trainer.train_dataset.rows if packing else run.trainer.train_dataset
    rows = [rows[n] for n in range(4)]
    loss, stats = trainer.pair_loss(trainer.model, trainer.data_collator([rows] if packing else rows), None)
    loss.backward()
    found = {name: p.grad for name, p in trainer.model.named_parameters()}
    plain = transformers.AutoModelForCausalLM.from_pretrained(settings["model"])
    reference = transformers.AutoModelForCausalLM.from_pretrained(settings["model"])
    plain.load_state_dict(trainer.model.state_dict())
    wanted = plain_loss(kind, options, plain, reference, rows)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-5 * parameter.grad.abs().max().item()), (
            name
        )
    assert 0 <= stats["accuracy"] <= 1
    assert (trainer.reference is None) == (kind in ("orpo", "simpo"))


@pytest.mark.parametrize("packing", [False, True])
def test_a_reward_models_loss_is_that_of_the_scores_plain_transformers_gives(settings, packing):
    run = Run(
        config.parse({**settings, "stage": "rm", "center_rewards_coefficient": 0.1, "margin": 0.5, "packing": packing})
    )
    trainer = stirred(run)
    trainer.model.train()
    rows = run.trainer.train_dataset.rows if packing else run.trainer.train_dataset
    rows = [rows[n] for n in range(4)]
    loss, _ = trainer.pair_loss(trainer.model, trainer.data_collator([rows] if packing else rows), None)
    loss.backward()
    trainer.save_model(settings["output_dir"])
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(settings["output_dir"])
    c, r = (
        torch.cat([plain(input_ids=torch.tensor([row["input_ids"][part(row)]])).logits[:, 0] for row in rows])
        for part in (lambda row: slice(0, row["chosen"]), lambda row: slice(row["chosen"], None))
    )
    wanted = (-F.logsigmoid(c - r - 0.5) + 0.1 * (c + r) ** 2).mean()
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    grads = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        assert torch.allclose(
            grads[name].grad, parameter.grad, rtol=1e-3, atol=1e-5 * parameter.grad.abs().max().item()
        ), name


@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_accumulated_micro_batches_are_one_batch(settings, stage):
    logs = [
        of_training(
            trained(
                settings, stage=stage, max_steps=3, per_device_train_batch_size=b, gradient_accumulation_steps=8 // b
            )[2]
        )
        for b in (8, 2)
    ]
    for one, other in zip(*logs):
        for key in ("loss", "accuracy", "margin", "grad_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key


# ---- runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigmoid", "orpo", "kto"])
def test_dpo_learns_what_is_preferred(settings, pairs, kind):
    _, result, lines = trained(
        settings, loss_type=kind, max_steps=25, eval_data=str(pairs), eval_steps=25, packing=True,
        per_device_train_batch_size=1, learning_rate=2e-2,
    )  # fmt: skip
    log = of_training(lines)
    if kind == "sigmoid":
        assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)  # the policy is its reference
        assert log[0]["margin"] == 0
    last = [line for line in lines if "eval_accuracy" in line][-1]
    assert last["eval_accuracy"] > 0.9
    assert last["eval_margin"] > 0
    assert result.best_perplexity is None
    assert result.best_eval_loss == last["eval_loss"]
    assert "perplexity" not in log[0]
    assert "eval_perplexity" not in last


def test_a_reward_model_ranks_pairs_and_its_validation_is_what_plain_transformers_finds(settings, pairs):
    run, result, lines = trained(
        settings, stage="rm", max_steps=20, eval_data=str(pairs), eval_steps=20, per_device_eval_batch_size=5,
    )  # fmt: skip
    last = [line for line in lines if "eval_accuracy" in line][-1]
    assert last["eval_accuracy"] > 0.9
    model = transformers.AutoModelForSequenceClassification.from_pretrained(result.final)
    assert model.config.num_labels == 1
    rows = run.trainer.eval_dataset
    ahead = []
    with torch.no_grad():
        for row in rows:
            c, r = (torch.tensor([row["input_ids"][p]]) for p in (slice(0, row["chosen"]), slice(row["chosen"], None)))
            ahead.append((model(input_ids=c).logits - model(input_ids=r).logits).item())
    margins = torch.tensor(ahead)
    assert last["eval_accuracy"] == pytest.approx((margins > 0).float().mean().item())
    assert last["eval_margin"] == pytest.approx(margins.mean().item(), rel=1e-3)
    assert last["eval_loss"] == pytest.approx(-F.logsigmoid(margins).mean().item(), rel=1e-3)


RESUMED = {
    "rm": {"stage": "rm"},
    "dpo packed in the second epoch": {"packing": True, "per_device_train_batch_size": 1, "max_steps": 12, "save_steps": 9},
    "dpo with dropping adapters": {"lora": {**LORA, "lora_dropout": 0.3}, "gradient_accumulation_steps": 2},
    "kto validated": {"loss_type": "kto", "eval_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(settings, pairs, case):
    more = dict(RESUMED[case])
    if "eval_steps" in more:
        more["eval_data"] = str(pairs)
    run, _, whole = trained(settings, **more)
    weights = {name: t.clone() for name, t in run.trainer.model.state_dict().items()}
    first = more.get("save_steps", 3)
    for later in checkpoint.complete(run.folder):
        if int(later.name.split("-")[1]) > first:
            shutil.rmtree(later)
    again, _, resumed = trained(settings, resume_from_checkpoint=str(run.folder), **more)
    keys = ("loss", "accuracy", "margin", "eval_loss", "eval_accuracy")
    steps = [[{k: line[k] for k in ("step", *keys) if k in line} for line in lines] for lines in (whole, resumed)]
    assert [s for s in steps[1] if len(s) > 1] == [s for s in steps[0] if len(s) > 1]
    for name, tensor in again.trainer.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"patch": False},
        {"lora": {**LORA, "target_modules": ["q_proj", "lm_head"]}},
    ],
)
@pytest.mark.parametrize("stage", ["rm", "dpo"])
def test_precision_checkpointing_patching_and_adapters_on_the_head_are_settings(settings, stage, more):
    if stage == "rm" and "lora" in more:
        more = {"lora": LORA}
    log = of_training(trained(settings, stage=stage, max_steps=3, **more)[2])
    plain = of_training(trained(settings, stage=stage, max_steps=3)[2])
    if stage == "dpo":
        assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    if "lora" in more:
        assert log[-1]["loss"] < log[0]["loss"]
    else:
        assert log[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=0.1 if "bf16" in more else 1e-4)


@pytest.mark.parametrize(
    ("stage", "why"),
    [
        ("dpo", "not needed: this stage computes its own from hidden states, without logits"),
        ("rm", "not needed: this stage scores answers, without logits"),
        ("sft", None),
    ],
)
def test_what_is_told_of_the_patch_says_why_the_models_own_loss_is_left(folder, tokenizer, capsys, stage, why):
    from fastllm.train import models

    for patch, told in (("auto", why), (["rms_norm"], None)):
        models.load_model(config.ModelOptions(str(folder), patch=patch), tokenizer, 64, stage=stage)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  loss ")]
        assert [line.endswith(f"left: {told}") for line in lines if "left" in line] == [True] * bool(told), lines


# ---- throughput --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA])
@pytest.mark.parametrize("packing", [False, True])
def test_flops_are_those_of_both_answers_and_of_the_references_forward_pass(settings, lora, packing):
    more = {"lora": lora} if lora else {}
    run, _, lines = trained(settings, max_steps=1, per_device_train_batch_size=24, packing=packing, **more)
    rows = run.trainer.train_dataset.rows if packing else run.trainer.train_dataset
    lengths = [n for row in rows for n in (row["chosen"], row["length"] - row["chosen"])]
    model = run.trainer.model
    base = transformers.AutoModelForCausalLM.from_pretrained(settings["model"])
    line = of_training(lines)[0]
    seconds = line["step_s"]
    wanted = step_flops(model, lengths).model + forward_flops(base, lengths)
    assert line["tflops"] * seconds * 1e12 == pytest.approx(wanted, rel=1e-4)
    assert forward_flops(base, lengths) == pytest.approx(step_flops(base, lengths).model / 3, rel=1e-9)
    assert line["tgs_real"] * seconds == pytest.approx(sum(lengths), rel=1e-4)
    trained_on = sum(label != -100 for row in rows for label in row["labels"])
    assert line["tgs_trainable"] * seconds == pytest.approx(trained_on, rel=1e-4)
    assert line["samples_per_s"] * seconds == pytest.approx(48, rel=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loss_tipe": "ipo"}, "unknown key 'loss_tipe'; did you mean 'loss_type'?"),
        ({"loss_type": "ppo"}, "loss_type must be one of sigmoid, robust, hinge, ipo, orpo, simpo, kto, got 'ppo'"),
        ({"beta": 0}, "beta must be above 0, got 0"),
        ({"beta": float("nan")}, "beta must be above 0, got nan"),
        ({"simpo_gamma": 1.0}, "simpo_gamma belongs to loss_type simpo, not to sigmoid"),
        (
            {"loss_type": "hinge", "label_smoothing": 0.1},
            "label_smoothing belongs to loss_type sigmoid and robust, not to hinge",
        ),
        ({"label_smoothing": 0.5}, "label_smoothing must lie in [0, 0.5), got 0.5"),
        ({"margin": 0.1}, "margin belongs to stage rm, not to dpo"),
        (
            {"stage": "rm", "center_rewards_coefficient": -1},
            "center_rewards_coefficient must be at least 0, got -1",
        ),
        ({"stage": "sft", "beta": 0.1}, "beta belongs to stage dpo, not to sft"),
        ({"train_on_prompt": True}, "train_on_prompt belongs to conversations"),
        ({"label_smoothing_factor": 0.1}, "not to dpo; see label_smoothing"),
        ({"stage": "mixed", "pretrain_data": "t", "label_smoothing_factor": 0.1}, "pretrain and sft, not to mixed"),
    ],
)
def test_what_is_wrong_is_named(settings, more, message):
    with pytest.raises(config.ConfigError) as raised:
        config.parse({**settings, **more})
    assert message in str(raised.value)


def test_scores_come_from_the_one_layer_after_the_last_hidden_states(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    assert score_head(model) is model.score
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **LORA))
    head = score_head(adapted)
    assert head is adapted.get_base_model().score
    assert head is not model.base_model
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    for config_of in (transformers.BertConfig, transformers.RobertaConfig):  # of a pooled state, of the first token's
        judge = transformers.AutoModelForSequenceClassification.from_config(config_of(num_labels=1, **small))
        with pytest.raises(config.ConfigError, match=f"scores every token, which {type(judge).__name__} has not"):
            score_head(judge)
    with pytest.raises(config.ConfigError, match="LlamaForCausalLM has not"):
        score_head(transformers.AutoModelForCausalLM.from_pretrained(folder))
