"""ThroughputCallback in a Trainer of transformers' own: counts by hand, times that add up, logs that arrive."""

import json
import time

import pytest
import torch

from fastllm.train import PackingCollator, PaddingCollator, ThroughputCallback, callback, step_flops

transformers = pytest.importorskip("transformers")
LENGTHS = [5, 9, 3, 12, 7, 8, 4, 10]


class Rows(torch.utils.data.Dataset):
    def __init__(self, delay=0.0):
        self.delay = delay

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        time.sleep(self.delay)
        ids = list(range(10, 10 + LENGTHS[index]))
        return {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trained(llama, folder, callback, *, collator=None, first=False, delay=0.0, **more):
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "save_strategy": "no", "remove_unused_columns": False, **more,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=folder, **settings)
    trainer = InOrder(
        model=llama, args=arguments, train_dataset=Rows(delay), data_collator=collator or PaddingCollator(),
        callbacks=None if first else [callback],
    )  # fmt: skip
    if first:
        callback.put_first(trainer)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def test_tokens_are_counted_three_ways_and_flops_follow_the_lengths(tmp_path, llama):
    callback = ThroughputCallback()
    trainer = trained(llama, tmp_path, callback)
    first, second = [log for log in trainer.state.log_history if "tgs" in log]
    for log, lengths, positions in ((first, LENGTHS[:4], 2 * 9 + 2 * 12), (second, LENGTHS[4:], 2 * 8 + 2 * 10)):
        seconds = log["step_s"]
        assert log["tgs"] * seconds == pytest.approx(positions, rel=1e-4)
        assert log["tgs_real"] * seconds == pytest.approx(sum(lengths), rel=1e-4)
        assert log["tgs_trainable"] * seconds == pytest.approx(sum(n - 2 for n in lengths), rel=1e-4)
        assert log["samples_per_s"] * seconds == pytest.approx(4, rel=1e-4)
        assert log["tflops"] * seconds * 1e12 == pytest.approx(step_flops(llama, lengths).model, rel=1e-4)
        assert log["hardware_tflops"] == log["tflops"]
        assert seconds == pytest.approx(log["data_s"] + log["forward_backward_s"] + log["optimizer_s"], rel=1e-3)
        assert "mfu" not in log
    assert callback.average["tgs_real"] == pytest.approx(second["tgs_real"], rel=1e-3)  # the first step warms up


def test_packed_rows_are_counted_one_by_one(tmp_path, llama):
    trainer = trained(llama, tmp_path, ThroughputCallback(), collator=PackingCollator())
    log = next(log for log in trainer.state.log_history if "tgs" in log)
    assert log["tgs"] == log["tgs_real"]
    assert log["samples_per_s"] * log["step_s"] == pytest.approx(4, rel=1e-4)
    wanted = step_flops(llama, LENGTHS[:4]).model
    assert log["tflops"] * log["step_s"] * 1e12 == pytest.approx(wanted, rel=1e-4)


def test_a_slow_data_set_shows_in_the_data_part(tmp_path, llama):
    trainer = trained(llama, tmp_path, ThroughputCallback(), delay=0.05)
    logs = [log for log in trainer.state.log_history if "tgs" in log]
    assert sum(log["data_s"] for log in logs) > 0.05 * len(LENGTHS)  # accelerate reads a batch ahead, so in sum only
    assert sum(log["data_s"] for log in logs) > 10 * sum(log["optimizer_s"] for log in logs)


def test_evaluation_and_logging_are_no_part_of_a_step(tmp_path, llama):
    class Slow(transformers.TrainerCallback):
        def on_log(self, *_, **__):
            time.sleep(0.5)

    callback = ThroughputCallback()
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=3, per_device_train_batch_size=2, logging_steps=1, report_to="none",
        disable_tqdm=True, use_cpu=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=llama, args=arguments, train_dataset=Rows(), data_collator=PaddingCollator(), callbacks=[Slow(), callback]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    assert all(log["data_s"] < 0.4 for log in trainer.state.log_history if "tgs" in log)


def test_metrics_go_to_a_file_and_to_callbacks_after_it(tmp_path, llama):
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            seen.append(dict(logs))

    callback = ThroughputCallback(tmp_path / "m.jsonl")
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path, max_steps=2, per_device_train_batch_size=2, logging_steps=1, report_to="none",
        disable_tqdm=True, use_cpu=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=llama, args=arguments, train_dataset=Rows(), data_collator=PaddingCollator(), callbacks=[Reporter()]
    )
    callback.put_first(trainer)
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert lines[0]["tgs"] == seen[0]["tgs"]
    assert lines[0]["loss"] == seen[0]["loss"]


def test_training_twice_leaves_no_hook_behind(tmp_path, llama):
    callback = ThroughputCallback()
    for _ in range(2):
        trained(llama, tmp_path, callback)
    assert not llama._forward_pre_hooks


def test_an_unknown_convention_is_an_error():
    with pytest.raises(ValueError, match="convention must be one of causal, palm, got 'x'"):
        ThroughputCallback(convention="x")


def test_figures_on_the_screen_have_no_exponent_below_a_billion():
    shown = {0.0: "0", 1.23456: "1.235", 999.96: "1000", 1234.5: "1,234", 10642.7: "10,643", 1.5e12: "1.5e+12"}
    assert {value: callback._number(value) for value in shown} == shown
