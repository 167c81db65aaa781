"""`fastllm train` from configuration to exported model, and that it goes on after a stop as if there had been none."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import fastllm
from fastllm import CheckpointError, cli
from fastllm.train import PaddingCollator, checkpoint, config, data, encode, mixing
from fastllm.train.run import Run

transformers = pytest.importorskip("transformers")


@pytest.fixture
def settings(folder, chats, tmp_path):
    """A configuration that trains for a second."""
    return {
        "stage": "sft", "model": str(folder), "data": str(chats), "output_dir": str(tmp_path / "runs"), "max_length": 128,
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 3, "seed": 3,
    }  # fmt: skip


@pytest.fixture
def texts(write):
    return write("texts.jsonl", [{"text": f"{n} " + "abc " * (5 + n % 40)} for n in range(30)])


def trained(settings, **more):
    """One run; its Run, its result and its log by step."""
    run = Run(config.parse({**settings, **more}))
    result = run.go()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return run, result, [line for line in lines if "loss" in line]


def losses(log):
    return {line["step"]: line["loss"] for line in log}


# ---- stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_sft_learns_and_leaves_a_model_that_plain_transformers_loads(settings, packing):
    run, result, log = trained(settings, packing=packing, max_steps=30, num_train_epochs=30)
    assert log[-1]["loss"] < 0.6 * log[0]["loss"]
    assert result.steps == 30
    loaded = transformers.AutoModelForCausalLM.from_pretrained(result.final)
    for name, tensor in run.trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.final)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3 times two"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_pretrain_takes_texts(settings, texts):
    _, _, log = trained(settings, stage="pretrain", data=str(texts), packing=True, max_steps=20, num_train_epochs=20)
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]


def test_mixed_puts_both_in_every_batch_and_tells_their_losses_apart(settings, texts):
    run, _, log = trained(settings, stage="mixed", pretrain_data=str(texts), pretrain_share=0.25)
    counts = [sum(kind == "text" for kind, _ in batch) for batch in _batches(run)]
    assert set(counts) == {1}
    for line in log:
        assert (
            min(line["loss_text"], line["loss_conversation"])
            <= line["loss"]
            <= max(line["loss_text"], line["loss_conversation"])
        )
    assert log[0]["loss_text"] != log[0]["loss_conversation"]


def _batches(run):
    loader = run.trainer.get_train_dataloader()
    sampler = loader.batch_sampler
    return [[run.trainer.train_dataset[i] for i in batch] for batch in sampler]


def test_the_two_losses_are_those_of_the_rows_alone(settings, texts, tokenizer):
    run, _, log = trained(
        settings, stage="mixed", pretrain_data=str(texts), pretrain_share=0.5, max_steps=2, gradient_accumulation_steps=3,
        learning_rate=0.0, per_device_train_batch_size=16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"])
    batches = _batches(run)
    assert len(batches) == 5, "the test's own premise: the epoch ends within a step"
    for line, step in zip(log, (batches[:3], batches[3:])):
        for kind in ("text", "conversation"):
            rows = [row for batch in step for one, row in batch if one == kind]
            expected = model(**PaddingCollator()(rows)).loss.item()
            assert line[f"loss_{kind}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("processes", [1, 2])
def test_mixed_batches_of_a_later_epoch_are_the_same_where_a_run_goes_on_within_it(processes):
    """As transformers skips what was trained on, through what accelerate puts around the sampler on each process."""
    from accelerate import skip_first_batches
    from accelerate.data_loader import prepare_data_loader

    def loader():
        rows = mixing.MixedDataset(list(range(20)), list(range(15)))
        sampler = mixing.MixedSampler(rows, 2, 0.5, batches_at_once=processes, seed=3)
        plain = torch.utils.data.DataLoader(rows, batch_size=2, sampler=sampler, collate_fn=list)
        return prepare_data_loader(plain, num_processes=processes, process_index=processes - 1, put_on_device=False)

    whole = loader()
    epochs = []
    for epoch in (0, 1):
        whole.set_epoch(epoch)
        epochs.append(list(whole))
    assert epochs[0] != epochs[1]
    rest = skip_first_batches(loader(), 3)
    rest.set_epoch(1)
    assert list(rest) == epochs[1][3:]


def test_validation_perplexity_weighs_tokens_and_its_best_checkpoint_is_kept(settings, chats):
    run, result, log = trained(
        settings, eval_data=str(chats), eval_steps=2, save_steps=100, save_total_limit=1, max_steps=8, num_train_epochs=8,
        per_device_eval_batch_size=3, learning_rate=0.03, lr_scheduler_type="constant",
    )  # fmt: skip
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line["eval_perplexity"] for line in lines if "eval_perplexity" in line}
    assert set(by_step) == {2, 4, 6, 8}
    best = min(by_step, key=by_step.get)
    assert result.best_perplexity == pytest.approx(by_step[best])
    kept = run.folder / f"checkpoint-{best}"
    assert kept.is_dir()
    assert len(checkpoint.complete(run.folder)) <= 2
    model = transformers.AutoModelForCausalLM.from_pretrained(kept).eval()
    rows = data.prepare(str(chats), encode.Encoder(run.tokenizer, 128), kind="conversation").rows
    batch = PaddingCollator()(list(rows))
    assert math.exp(model(**batch).loss.item()) == pytest.approx(by_step[best], rel=1e-4)
    assert len(log) == 8


@pytest.mark.parametrize("more", [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"patch": False}])
def test_precision_checkpointing_and_patching_are_settings(settings, more):
    _, _, log = trained(settings, max_steps=3, **more)
    _, _, plain = trained(settings, max_steps=3)
    tolerance = 0.05 if "bf16" in more else 1e-4
    assert log[-1]["loss"] == pytest.approx(plain[-1]["loss"], rel=tolerance)


@pytest.mark.parametrize("packing", [False, True])
def test_validation_on_a_text_without_end_is_that_of_a_stream(settings, chats, packing):
    asked = {"eval_data": str(chats), "eval_strategy": "steps", "eval_steps": 3, "packing": packing}
    how = {"sinks": 2, "window": 30, "tokens": 200}
    run, result, log = trained(settings, **asked, streaming=how)
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval_streaming_perplexity"] for line in lines if "eval_streaming_perplexity" in line}
    assert list(found) == [3, 6]
    model = transformers.AutoModelForCausalLM.from_pretrained(result.final).eval()
    rows = [row for one in run.trainer.eval_dataset for row in (one if packing else [one])]
    text = torch.tensor([[token for row in rows for token in row["input_ids"]][:200]])
    cache = fastllm.StreamingCache(model, 2, 30)
    assert fastllm.streaming.perplexity(model, text, cache=cache) == pytest.approx(found[6], rel=1e-4)
    assert cache.evicted > 100
    _, _, plain = trained(settings, **asked)
    assert losses(plain) == losses(log), "looking changes nothing"


def test_rope_reaches_further_and_the_saved_model_knows(settings):
    _, result, _ = trained(settings, max_steps=1, rope={"max_length": 1024, "method": "yarn"}, max_length=512)
    saved = transformers.AutoConfig.from_pretrained(result.final)
    assert saved.rope_parameters["rope_type"] == "yarn"


@pytest.mark.parametrize("export", ["adapter", "merged", "both"])
def test_lora_trains_adapters_alone_and_exports_them_either_way(settings, export):
    peft = pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    run, result, log = trained(
        settings, lora=lora, export=export, max_steps=20, num_train_epochs=20, learning_rate=0.05
    )
    assert log[-1]["loss"] < log[0]["loss"]
    base = transformers.AutoModelForCausalLM.from_pretrained(settings["model"])
    ids = torch.arange(10, 30)[None]
    outputs = []
    if export != "merged":
        adapted = peft.PeftModel.from_pretrained(base, run.folder / "final")
        outputs.append(adapted(input_ids=ids).logits)
    if export != "adapter":
        merged = transformers.AutoModelForCausalLM.from_pretrained(result.final)
        outputs.append(merged(input_ids=ids).logits)
    before = transformers.AutoModelForCausalLM.from_pretrained(settings["model"])(input_ids=ids).logits
    assert (outputs[0] - before).abs().max() > 1e-3
    assert (outputs[0] - outputs[-1]).abs().max() < 1e-4


def test_adapters_learn_the_same_under_gradient_checkpointing(settings):
    pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    logs = [trained(settings, lora=lora, max_steps=4, gradient_checkpointing=on)[2] for on in (False, True)]
    assert [line["loss"] for line in logs[1]] == pytest.approx([line["loss"] for line in logs[0]], rel=1e-5)
    assert logs[1][-1]["loss"] != logs[1][0]["loss"]
    assert logs[1][0]["hardware_tflops"] > 1.1 * logs[1][0]["tflops"]


# ---- resuming ----------------------------------------------------------------------------------------------------

RESUMED = {
    "padded": {},
    "packed": {"packing": True, "per_device_train_batch_size": 1},
    "accumulating in the second epoch": {"gradient_accumulation_steps": 2, "max_steps": 9, "save_steps": 6},
    "at an epoch's end": {"per_device_train_batch_size": 10, "max_steps": 8, "save_steps": 4},
    "dropout": {"lora": {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.3}},
    "mixed in the second epoch": {
        "stage": "mixed", "pretrain_share": 0.5, "per_device_train_batch_size": 8, "max_steps": 15, "save_steps": 12,
    },
    "validated": {"eval_steps": 2, "learning_rate": 0.03},
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(settings, texts, chats, case):
    more = {"num_train_epochs": 10, **RESUMED[case]}
    if more.get("stage") == "mixed":
        more["pretrain_data"] = str(texts)
    if "eval_steps" in more:
        more["eval_data"] = str(chats)
    run, _, whole = trained(settings, **more)
    weights = {name: t.clone() for name, t in run.trainer.model.state_dict().items()}
    best = run.trainer.state.best_metric
    first = run.folder / f"checkpoint-{more.get('save_steps', 3)}"
    shutil.rmtree(run.folder / "final")
    for later in checkpoint.complete(run.folder):
        if int(later.name.split("-")[1]) > int(first.name.split("-")[1]):
            shutil.rmtree(later)
    again, _, resumed = trained(settings, resume_from_checkpoint=str(run.folder), **more)
    assert again.folder == run.folder
    assert losses(resumed) == losses(whole)
    assert again.trainer.state.best_metric == best
    for name, tensor in again.trainer.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_a_run_that_goes_back_leaves_what_came_after(settings, capsys):
    run, _, _ = trained(settings, save_steps=2, num_train_epochs=9)
    back = str(run.folder / "checkpoint-2")
    trained(settings, save_steps=1, save_total_limit=1, num_train_epochs=9, max_steps=3, resume_from_checkpoint=back)
    assert [p.name for p in checkpoint.complete(run.folder)] == ["checkpoint-3"]
    assert (run.folder / "left-checkpoint-6").is_dir()
    said = capsys.readouterr().err
    assert "later checkpoints are now left-checkpoint-4, left-checkpoint-6 (" in said
    assert " MB), which nothing but you deletes" in said
    with pytest.raises(CheckpointError, match="intact; there are also left-checkpoint-4, left-checkpoint-6 "):
        checkpoint.check_space(run.folder, 1 << 60)


def test_the_newest_checkpoint_stays_beside_the_best_where_one_is_to_be_kept(settings, chats):
    run, _, _ = trained(
        settings,
        eval_data=str(chats),
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        learning_rate=0.0,
        num_train_epochs=9,
    )  # nothing is learnt, so that the first is the best
    assert [p.name for p in checkpoint.complete(run.folder)] == ["checkpoint-2", "checkpoint-6"]


def test_latest_finds_the_newest_run_of_this_model_and_stage(settings, capsys):
    run, _, _ = trained(settings)
    again, _, log = trained(settings, resume_from_checkpoint="latest", max_steps=8, learning_rate=1e-3)
    assert again.folder == run.folder
    assert [line["step"] for line in log] == list(range(1, 9))
    assert "resumed with other settings: learning_rate 0.01 -> 0.001" in capsys.readouterr().err
    fresh, _, _ = trained(
        settings, resume_from_checkpoint="latest", max_steps=1, output_dir=settings["output_dir"] + "2"
    )
    assert fresh.resumed is None


# ---- the run's folder --------------------------------------------------------------------------------------------


def test_the_run_folder_tells_what_was_run_and_can_run_again(settings, monkeypatch):
    run, _, _ = trained(settings, max_steps=2)
    about = json.loads((run.folder / "run.json").read_text())
    assert about["packages"]["torch"] == torch.__version__
    assert set(about) >= {"fastllm", "git_commit", "command", "host", "course", "sources", "totals"}
    totals = about["totals"]["data"]
    rows = run.trainer.train_dataset
    assert totals["tokens"] == sum(rows["length"])
    assert totals["rows"] == about["sources"]["data"][settings["data"]]["rows"] == 40
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert written["learning_rate"] == 1e-2
    assert written["on_bad_row"] == "error"
    again = Run(config.load(run.folder / "config.yaml"))
    assert again.folder != run.folder
    assert again.folder.name.startswith("tiny-sft-")
    assert os.uname().nodename in again.folder.name


def test_runs_started_in_the_same_second_get_folders_of_their_own(settings):
    folders = {Run(config.parse(settings)).folder for _ in range(3)}
    assert len(folders) == 3


# ---- the command -------------------------------------------------------------------------------------------------


def command(capsys, tmp_path, settings, *more):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    code = cli.main(["train", str(path), *more])
    return code, *capsys.readouterr()


def test_the_command_trains_and_reports(capsys, tmp_path, settings):
    code, out, err = command(
        capsys, tmp_path, settings, "max_steps=2", "max_length=48", "zero_stage=2", "offload=optimizer"
    )
    assert "data: 40 rows, " in err
    assert " cut to max_length 48" in err
    assert "zero_stage: 2 and offload: optimizer left aside: one process without DeepSpeed" in err
    assert code == 0
    assert "2 steps, mean training loss" in out
    assert "run folder" in err
    assert "fastllm patched LlamaForCausalLM" in err
    code, out, _ = command(capsys, tmp_path, settings, "max_steps=2", "--json")
    assert json.loads(out)["steps"] == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_lenght": 3}, "did you mean 'max_length'?"),
        ({"data": "nowhere.jsonl"}, "data: there is no file or folder nowhere.jsonl"),
        ({"eval_data": "nowhere.jsonl"}, "eval_data: there is no file or folder nowhere.jsonl"),
        ({"model": "./nowhere"}, "model: there is no file or folder ./nowhere"),
        ({"tokenizer": "./nowhere"}, "tokenizer: there is no file or folder ./nowhere"),
        ({"max_length": 4096}, "max_length is 4096, and the model reads 256 tokens"),
        ({"patch": ["glue"]}, "patch: ops must be"),
        ({"rope": {"max_length": 512, "method": "yern"}}, "rope: method must be one of"),
        ({"rope": {"max_length": 512, "no_such": 1}}, "no_such"),
        ({"lora": {"r": 4, "target_modules": ["no_such"]}}, "lora: Target modules"),
        ({"lora": {"r": 4, "lora_alfa": 8}}, "lora: unknown key 'lora_alfa'; did you mean 'lora_alpha'?"),
        ({"lora": {"r": "eight"}}, "lora: r must be a whole number of at least 1, got 'eight'"),
        (
            {"stage": "mixed", "pretrain_data": "TEXTS", "per_device_train_batch_size": 400},
            "40 conversations do not fill a batch",
        ),
        (
            {"stage": "mixed", "pretrain_data": "TEXTS", "per_device_train_batch_size": 1},
            "of 2 or more, a text and a conversation",
        ),
        ({"resume_from_checkpoint": "nowhere"}, "there is no checkpoint or run nowhere"),
        ({"stage": "pretrain"}, "a conversation, where the stage takes texts"),
        ({"stage": "ppo"}, "stage ppo needs reward"),
        ({"chat_template": "no_such"}, "chat_template must be"),
        ({"model": "example:no_such"}, "there is no 'example:no_such'"),
    ],
)
def test_a_wrong_call_is_one_line_exit_code_2_and_nothing_written(capsys, tmp_path, settings, texts, more, message):
    more = {key: str(texts) if value == "TEXTS" else value for key, value in more.items()}
    code, out, err = command(capsys, tmp_path, {**settings, **more})
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert message in lines[-1]
    assert lines[-1].startswith("fastllm train: error: ")
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_of_another_model_is_refused(capsys, tmp_path, settings, tokenizer):
    from fastllm.train.examples import tiny_config

    run, _, _ = trained(settings, max_steps=1, save_steps=1)
    other = tmp_path / "other"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    transformers.LlamaForCausalLM(tiny_config(**small)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    resume = f"resume_from_checkpoint={run.folder}"
    code, _, err = command(capsys, tmp_path, settings, f"model={other}", resume)
    assert code == 2
    assert "is of another model: its model.layers.0.mlp.down_proj.weight is (32, 48)" in err.splitlines()[-1]
    code, _, err = command(capsys, tmp_path, settings, resume, "lora={r: 2, target_modules: [q_proj]}")
    assert code == 2
    assert "holds a whole model, and the configuration asks for lora" in err.splitlines()[-1]


def test_a_checkpoint_of_a_shallower_model_or_another_adapter_is_refused(settings, tmp_path, tokenizer):
    from fastllm.train.examples import tiny_config

    run, _, _ = trained(settings, max_steps=1, save_steps=1)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 256}
    transformers.LlamaForCausalLM(tiny_config(**small)).save_pretrained(tmp_path / "deep")
    tokenizer.save_pretrained(tmp_path / "deep")
    with pytest.raises(
        CheckpointError, match=r"another model: it has no model.layers.2.self_attn.q_proj.weight, which"
    ):
        trained(settings, model=str(tmp_path / "deep"), resume_from_checkpoint=str(run.folder))
    pytest.importorskip("peft")
    lora = {"r": 4, "target_modules": ["q_proj"]}
    run, _, _ = trained(settings, max_steps=1, save_steps=1, lora=lora)
    again = {"resume_from_checkpoint": str(run.folder), "max_steps": 2}
    for wrong, message in (
        ({"r": 8}, r"another adapter: its .*q_proj.lora_A.weight is \(4, 32\), the configuration's \(8, 32\)"),
        ({"target_modules": ["v_proj"]}, r"another adapter: it has .*q_proj.lora_A.weight, and"),
        ({"target_modules": ["q_proj", "v_proj"]}, r"another adapter: it has no .*v_proj.lora_A.weight, which"),
    ):
        with pytest.raises(CheckpointError, match=message):
            trained(settings, lora={**lora, **wrong}, **again)
    assert trained(settings, lora=lora, **again)[1].steps == 2


def test_a_checkpoint_of_tied_weights_and_of_a_trained_head_is_not(settings, tmp_path, tokenizer):
    """Of tied weights one is saved; what peft trains besides adapters is saved with them."""
    from fastllm.train.examples import tiny_config

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "max_position_embeddings": 256}
    transformers.LlamaForCausalLM(tiny_config(**small, tie_word_embeddings=True)).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    pytest.importorskip("peft")
    for lora in (None, {"r": 4, "target_modules": ["q_proj", "lm_head"]}, {"r": 4, "modules_to_save": ["norm"]}):
        more = {**settings, "model": str(tmp_path / "tied"), "lora": lora, "save_steps": 1}
        run, _, _ = trained(more, max_steps=1)
        assert trained(more, max_steps=2, resume_from_checkpoint=str(run.folder))[1].steps == 2


def test_a_checkpoint_of_other_processes_is_refused(settings):
    run, _, _ = trained(settings, max_steps=1, save_steps=1)
    part = run.folder / "checkpoint-1" / "rng_state.pth"
    again = {"resume_from_checkpoint": str(run.folder), "max_steps": 2}
    (sharded := part.with_name("global_step1")).mkdir()
    with pytest.raises(CheckpointError, match="was written under DeepSpeed, and this run is without it"):
        trained(settings, **again)
    sharded.rmdir()
    for rank in range(2):
        shutil.copy(part, part.with_name(f"rng_state_{rank}.pth"))
    part.unlink()
    with pytest.raises(CheckpointError, match="was written by 2 processes, and this run has one process"):
        trained(settings, **again)
    part.with_name("course.pt").touch()
    with pytest.raises(CheckpointError, match="of a stage that samples"):
        trained(settings, **again)


def test_examples_come_with_the_package():
    from fastllm.train.command import CONFIGS

    names = {path.stem for path in Path(CONFIGS).glob("*.yaml")}
    assert names >= set(config.STAGES)
    for name in names:
        options = config.load(CONFIGS / f"{name}.yaml")
        assert options.data.stage in config.STAGES
