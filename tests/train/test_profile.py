"""`profile: true`: a trace of a few steps and its summary, the third view of utilisation, which agrees with the other two."""

import gzip
import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastllm.train import PackingCollator, config, profile, trace
from fastllm.train.run import Run

transformers = pytest.importorskip("transformers")
LENGTH = 32


@pytest.fixture
def settings(tmp_path, tokenizer, write):
    """A Llama whose matrix products outweigh its norms and its attention, on texts without a prompt."""
    from fastllm.train.examples import tiny_config

    transformers.set_seed(0)
    model = transformers.LlamaForCausalLM(tiny_config(hidden_size=128, intermediate_size=256, num_hidden_layers=2))
    folder = tmp_path / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {
        "stage": "pretrain", "model": str(folder), "data": str(write("t.jsonl", [{"text": "abc " * 400}] * 4)), "packing": True,
        "output_dir": str(tmp_path / "runs"), "max_length": LENGTH, "max_steps": 7, "per_device_train_batch_size": 16,
        "learning_rate": 1e-2, "save_strategy": "no",
    }  # fmt: skip


def trained(settings, **more):
    run = Run(config.parse({**settings, **more}))
    run.go()
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    return run, [line for line in lines if "loss" in line]


def reference(settings):
    """Tokens per second and TFLOPS of a bare loop over the same model and batches, whose FLOPs PyTorch's own counter counts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["model"], attn_implementation="eager").train()
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(16 * LENGTH).view(16, LENGTH) % 250

    def step():
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counter:
        step()
    begun = time.perf_counter()
    step()
    seconds = time.perf_counter() - begun
    return ids.numel() / seconds, counter.get_total_flops() / seconds / 1e12


def test_three_views_of_utilisation_agree_and_a_profile_changes_no_loss(settings, capsys):
    run, log = trained(settings, profile=True)
    said = capsys.readouterr().err
    profiled = [line for line in log if 3 <= line["step"] <= 5]
    seconds = sum(line["step_s"] for line in profiled)
    summary = json.loads((run.folder / "profile" / "rank-0.json").read_text())

    counted = sum(line["tflops"] * line["step_s"] for line in profiled) / seconds
    tgs = sum(line["tgs_real"] * line["step_s"] for line in profiled) / seconds
    reference_tgs, reference_tflops = reference(settings)
    by_reference = tgs / reference_tgs * reference_tflops
    print(f"TFLOPS: counted {counted:.4g}, by the reference {by_reference:.4g}, by the profile {summary['tflops']:.4g}")
    assert by_reference == pytest.approx(counted, rel=0.1)
    assert summary["tflops"] == pytest.approx(counted, rel=0.1)

    assert (summary["first_step"], summary["last_step"], summary["steps"], summary["device"]) == (3, 5, 3, "cpu")
    assert summary["seconds"] == pytest.approx(seconds, rel=0.1)
    assert summary["mfu"] is None
    shares = summary["shares"]
    assert tuple(shares) == trace.KINDS
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["matmul"] == max(shares.values())
    assert min(shares[kind] for kind in ("attention", "element-wise", "optimizer", "data wait", "idle")) > 0
    assert shares["communication"] == 0
    kinds = {one["name"]: one["kind"] for one in summary["operations"]}
    assert kinds["fastllm::attention"] == kinds["fastllm::attention_backward"] == "attention"
    assert kinds["fastllm::rms_norm_backward"] == "element-wise"
    assert said.count("profile of steps 3 to 5") == 1
    assert "TFLOPS by the shapes" in said
    assert (run.folder / "profile" / summary["trace"]).is_file()

    _, plain = trained(settings)
    assert [line["loss"] for line in log] == [line["loss"] for line in plain]
    assert [line["grad_norm"] for line in log] == [line["grad_norm"] for line in plain]
    # To write the trace takes a second, and is no part of the step that follows.
    assert log[5]["step_s"] < 5 * min(line["step_s"] for line in log)


def test_a_run_without_a_profile_has_no_profiler(settings):
    run, _ = trained(settings, max_steps=1)
    assert not (run.folder / "profile").exists()


def test_flops_by_shapes_are_those_that_are_counted(llama, tmp_path):
    """On packed rows to a percent, though neither knows of the other; padding that is multiplied counts by shapes alone."""
    import fastllm
    from fastllm.train import step_flops

    fastllm.patch(llama)
    lengths = [60, 41, 27]
    rows = [{"input_ids": torch.randint(4, 250, (n,))} for n in lengths]
    batch = PackingCollator()(rows)
    found = of_steps(tmp_path, lambda: llama(**batch, use_cache=False).loss.backward(), documents=[lengths])
    norms = 6 * sum(p.numel() for p in llama.parameters() if p.dim() == 1) * sum(lengths)
    first = 6 * llama.lm_head.weight.numel() * len(lengths)  # nothing predicts a row's first token
    attention = step_flops(llama, lengths).model - step_flops(llama, [1] * sum(lengths)).model
    assert found.matmul_flops == pytest.approx(
        step_flops(llama, lengths).model - norms - first - found.attention_flops, rel=1e-6
    )
    assert found.attention_flops == pytest.approx(attention, rel=0.05)
    assert found.uncounted == []


def test_rows_that_a_mask_keeps_apart_are_counted_apart(tmp_path):
    lengths, tokens, forward = [20, 12], 32, 4 * 2 * 8  # of a pair
    q = torch.randn(1, 2, tokens, 8)
    rows = torch.arange(tokens) >= lengths[0]
    mask = (rows[:, None] == rows) & torch.ones(tokens, tokens).tril().bool()

    def step():
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask[None, None])

    found = of_steps(tmp_path, step, documents=[lengths])
    assert found.attention_flops == forward * (20 * 20 + 12 * 12) / 2
    padded = of_steps(tmp_path, step)
    assert padded.attention_flops == forward * tokens * tokens / 2


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_attention_of_transformers_is_counted_too(llama, tmp_path, implementation):
    llama.set_attn_implementation(implementation)
    ids = torch.randint(4, 250, (2, 64))
    found = of_steps(tmp_path, lambda: llama(ids, labels=ids, use_cache=False).loss.backward())
    with FlopCounterMode(display=False) as counter:
        llama.set_attn_implementation("eager")
        llama(ids, labels=ids, use_cache=False).loss.backward()
    square = 12 * 2 * 32 * 2 * 64 * 64  # 12 · layers · width · rows · length²
    kind = {"sdpa": square / 2, "eager": 0}[implementation]  # eager attention is matrix products and a softmax
    assert found.attention_flops == kind
    assert found.matmul_flops == pytest.approx(counter.get_total_flops() - (square if kind else 0), rel=0.02)


def of_steps(folder, step, count=1, documents=()):
    told = []
    profiler = profile.StepProfiler(folder, torch.device("cpu"), left=count, steps=count, warmup=0, tell=told.append)
    for _ in range(count):
        profiler.working()
        step()
        profiler.stepped(lambda: list(documents))
    assert profiler.profile is not None, told
    return profiler.profile


@pytest.mark.parametrize(("left", "steps"), [(1, (1, 1)), (3, (1, 3)), (4, (2, 4)), (9, (3, 5))])
def test_of_few_steps_the_last_are_recorded(tmp_path, left, steps):
    told = []
    profiler = profile.StepProfiler(tmp_path / "p", torch.device("cpu"), left=left, tell=told.append)
    for _ in range(left):
        profiler.working()
        torch.ones(3) @ torch.ones(3)
        profiler.stepped()
        profiler.waiting()  # as after a log
    summary = json.loads((tmp_path / "p" / "rank-0.json").read_text())
    assert (summary["first_step"], summary["last_step"]) == steps
    assert len(told) == 1


def test_an_evaluation_between_steps_is_not_recorded(tmp_path):
    profiler = profile.StepProfiler(tmp_path, torch.device("cpu"), left=2, steps=2, warmup=0, tell=lambda text: None)
    for _ in range(2):
        profiler.working()
        torch.ones(3).mul(2)
        profiler.stepped()
        profiler.pause()
        profiler.pause()
        torch.ones(3).neg()
        profiler.waiting()
    with gzip.open(next(tmp_path.glob("*.gz")), "rt") as file:
        names = [event["name"] for event in json.load(file)["traceEvents"]]
    assert names.count("aten::mul") == 2
    assert "aten::neg" not in names
    assert profiler.profile.steps == 2


def test_training_that_stops_early_leaves_what_was_recorded(tmp_path):
    profiler = profile.StepProfiler(tmp_path, torch.device("cpu"), left=100, first=11, tell=lambda text: None)
    for _ in range(3):
        profiler.working()
        torch.ones(3).add(1)
        profiler.stepped()
    profiler.working()
    profiler.close()
    profiler.close()
    summary = json.loads((tmp_path / "rank-0.json").read_text())
    assert (summary["first_step"], summary["last_step"], summary["steps"]) == (13, 13, 1)


def test_a_trace_that_cannot_be_written_does_not_stop_training(tmp_path):
    told = []
    (tmp_path / "taken").write_text("")
    profiler = profile.StepProfiler(tmp_path / "taken" / "p", torch.device("cpu"), left=1, tell=told.append)
    profiler.working()
    profiler.stepped()
    assert told[0].startswith("warning: no profile: ")


def test_an_iteration_of_ppo_is_a_step_too(folder, write, tmp_path, capsys):
    from fastllm.train.online.run import Run as OnlineRun

    settings = {
        "stage": "ppo", "model": str(folder), "data": str(write("prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(8)])),
        "reward": "fastllm.train.examples:share_of_digits", "output_dir": str(tmp_path / "runs"), "max_length": 64,
        "max_new_tokens": 4, "rollout_batch_size": 8, "per_device_train_batch_size": 4, "max_steps": 3, "save_strategy": "no",
    }  # fmt: skip
    logs = []
    for on in (True, False):
        run = OnlineRun(config.parse({**settings, "profile": on}))
        run.go()
        lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        logs.append([(line["reward"], line["policy_loss"], line["grad_norm"]) for line in lines])
        assert (run.folder / "profile").exists() == on
        if on:
            summary = json.loads((run.folder / "profile" / "rank-0.json").read_text())
            assert summary["first_step"] == summary["last_step"] == 2
            assert summary["step_s"] == pytest.approx(lines[1]["step_s"], rel=0.5)
            assert min(summary["shares"][kind] for kind in ("matmul", "attention", "optimizer")) > 0
    assert logs[0] == logs[1]
    assert capsys.readouterr().err.count("profile of step 2,") == 1


def test_of_an_evaluation_between_iterations_of_ppo_nothing_is_recorded(folder, write, tmp_path):
    from fastllm.train.online.run import Run as OnlineRun

    prompts = str(write("prompts.jsonl", [{"prompt": f"Say {n}"} for n in range(8)]))
    settings = {
        "stage": "ppo", "model": str(folder), "data": prompts, "eval_data": prompts, "eval_steps": 1, "eval_on_start": True,
        "reward": "fastllm.train.examples:share_of_digits", "output_dir": str(tmp_path / "runs"), "max_length": 64,
        "max_new_tokens": 4, "rollout_batch_size": 8, "per_device_train_batch_size": 4, "save_strategy": "no", "profile": True,
    }  # fmt: skip
    for steps in (1, 3):
        run = OnlineRun(config.parse({**settings, "max_steps": steps}))
        run.go()
        with gzip.open(next((run.folder / "profile").glob("*.gz")), "rt") as file:
            events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
        (step,) = (e for e in events if e["name"] == trace.STEP and e["cat"] == "user_annotation")
        before = [e["name"] for e in events if e["name"].startswith("aten::") and e["ts"] < step["ts"]]
        assert not [name for name in before if name in ("aten::mm", "aten::addmm", "aten::embedding")], steps
