"""`fastllm plan`: the rules of thumb fall out, the simulated step is the real one, and memory measured is memory planned."""

import ctypes.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastllm import ConfigError, cli
from fastllm.train import command, config, plan, plan_report, simulate, step_flops
from tests.ranks import ROOT

transformers = pytest.importorskip("transformers")


def llama(**more):
    return transformers.LlamaConfig(**{
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, **more,
    })  # fmt: skip


def shape(hidden, inner, layers, heads):
    return llama(
        vocab_size=32000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads,
    )  # fmt: skip


@pytest.fixture(scope="module")
def seven():
    return plan.memory(shape(4096, 11008, 32, 32), gpus=8, gpu_memory=80e9, batch=4, compare=False)


def test_mixed_precision_training_takes_sixteen_bytes_a_parameter(seven):
    alone = seven.layout(0)
    assert (alone.weights + alone.gradients + alone.optimizer) / seven.parameters == 2 + 2 + 12
    fp32 = plan.memory(llama(), precision="fp32", seq=16, compare=False).layout(0)
    assert fp32.weights == fp32.gradients == fp32.optimizer / 2


def test_llama_7b_in_fp16_is_13_gb_and_needs_sharing_to_train_on_80(seven):
    assert seven.parameters == 6_738_415_616
    assert seven.layout(0).weights / 1e9 == pytest.approx(13.5, abs=0.1)
    assert not seven.layout(0).fits
    assert not seven.layout(0).fits_checkpointed
    assert seven.layout(3).fits
    assert seven.recommended == "ZeRO-1"


def test_65b_does_not_fit_on_four_gpus_of_32_gb():
    found = plan.memory(shape(8192, 22016, 80, 64), gpus=4, gpu_memory=32e9, seq=512, compare=False)
    assert found.parameters / 1e9 == pytest.approx(65.3, abs=0.1)
    assert found.layout(3).weights > 32e9  # not even the weights
    assert not any(one.fits_checkpointed for one in found.layouts if one.offload != "all")
    assert found.kv_tokens == 0


EXAMPLES = [
    (path, line)
    for path in sorted(command.CONFIGS.glob("llama-7b*.yaml"))
    for line in re.findall(r"^#   \d GPUs? of .*$", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(("path", "line"), EXAMPLES, ids=[line[4:20].strip() for _, line in EXAMPLES])
def test_the_examples_for_seven_billion_parameters_fit_where_they_say(path, line):
    """The lines in the head of llama-7b.yaml and llama-7b-lora.yaml."""
    gpus, memory, how = re.fullmatch(r"#   (\d) GPUs? of (\d+) GB +(.*)", line).groups()
    before, name, *overrides = how.partition(path.stem)[0], path.stem, *how.partition(path.stem)[2].split()
    assert before.split()[0] in ("fastllm", "deepspeed", "torchrun")
    options = config.load(command.CONFIGS / f"{name}.yaml", overrides)
    args, zero = options.arguments, options.arguments.zero_stage
    assert (zero is not None) == before.startswith("deepspeed")
    launched = re.search(r"--(?:num_gpus|nproc-per-node) (\d)", before)
    assert int(gpus) == (int(launched[1]) if launched else 1)
    precision = "bf16" if zero else "autocast" if args.bf16 else "pure-bf16"
    assert options.model.dtype == ("bfloat16" if precision == "pure-bf16" else "float32")
    found = plan.memory(
        shape(4096, 11008, 32, 32), gpus=int(gpus), gpu_memory=float(memory) * 1e9, seq=options.data.max_length,
        batch=args.per_device_train_batch_size, accumulation=args.gradient_accumulation_steps, precision=precision,
        lora=options.model.lora, compare=False,
    )  # fmt: skip
    assert found.parameters > 6.7e9
    assert found.layout(zero or 0, args.offload).fits_checkpointed
    assert {*options.values} & {"gradient_checkpointing", "activation_checkpointing"}


def test_the_benchs_step_of_seven_billion_parameters_fits_on_141_gb():
    from bench import train

    of = train.SHAPES["7b"]
    for patch in (True, False):
        found = plan.memory(
            transformers.LlamaConfig(**of.config), gpu_memory=141e9, seq=train.TOKENS, batch=of.rows["cuda"],
            precision="pure-bf16", patch=patch, compare=False,
        )  # fmt: skip
        assert found.parameters == of.parameters
        assert found.layout(0).fits


def test_bf16_without_a_copy_takes_eight_bytes_a_parameter_and_deepspeed_twenty_while_it_steps():
    def alone(precision, **more):
        return plan.memory(llama(num_hidden_layers=12), precision=precision, seq=4, compare=False, **more).layout(0)

    parameters = plan.memory(llama(num_hidden_layers=12), seq=4, compare=False).parameters
    pure = alone("pure-bf16")
    assert (pure.weights, pure.gradients, pure.optimizer) == (2 * parameters, 2 * parameters, 4 * parameters)
    assert alone("pure-bf16", optimizer="adamw8bit").optimizer == 2 * parameters
    # Measured with DeepSpeed 0.19.8, stage 0, bf16, 63 million parameters: 20.7 bytes a parameter.
    assert alone("bf16").total == pytest.approx(20 * parameters, rel=0.01)


def test_stages_share_what_the_paper_says_they_share():
    found = plan.memory(llama(), gpus=8, seq=64, compare=False)
    zero, one, two, three = (found.layout(stage) for stage in range(4))
    assert one.optimizer == pytest.approx(zero.optimizer / 8, rel=1e-3)
    assert (one.weights, one.gradients) == (zero.weights, zero.gradients)
    assert two.gradients == pytest.approx(zero.gradients / 8, rel=1e-3)
    assert (two.weights, two.optimizer) == (zero.weights, one.optimizer)
    assert three.weights == pytest.approx(zero.weights / 8, rel=1e-3)
    assert found.layout(2, "optimizer").optimizer == 0
    assert found.layout(2, "optimizer").host == one.optimizer + two.gradients
    assert found.layout(3, "all").weights == 0


@pytest.mark.parametrize(
    "more",
    [{}, {"lora": 4}, {"precision": "autocast"}, {"precision": "bf16"}, {"kernels": "eager"}, {"checkpointing": True}],
)
def test_one_layer_repeated_is_every_layer_run(more):
    settings = {"precision": "fp32", "lora": None, "kernels": "fused", "checkpointing": False, **more}
    lora, precision = settings.pop("lora"), settings.pop("precision")
    config = llama(num_hidden_layers=7)
    autocast = precision == "autocast"

    def build(count):
        return plan._build(config, lora, precision, count=count, **settings)

    few, whole = (simulate.step(build, 7, alike, 2, 48, autocast=autocast) for alike in (True, False))
    for share in (0.0, 0.25, 1.0):
        assert few.peak(share) == pytest.approx(whole.peak(share), rel=0.01)
    assert few.gradients[-1] == whole.gradients[-1]


def test_the_simulated_step_holds_what_a_real_one_holds():
    config = llama(num_hidden_layers=4)
    found = simulate.step(
        lambda count: plan._build(config, None, "fp32", kernels="fused", checkpointing=False, count=count), 4, True, 2, 96,
        autocast=False,
    )  # fmt: skip
    import fastllm

    model = transformers.LlamaForCausalLM(config)
    fastllm.patch(model)
    ids = torch.zeros(2, 96, dtype=torch.long)
    known = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(input_ids=ids, labels=ids, use_cache=False).loss
    assert sum(saved.values()) < found.saved < 1.5 * sum(saved.values())  # what is passing comes on top of what is kept
    loss.backward()
    assert found.gradients[-1] == sum(p.grad.nbytes for p in model.parameters())


def test_attention_scores_and_logits_are_what_fusing_saves():
    config = llama(num_hidden_layers=3)
    found = plan.memory(config, seq=512, batch=2, precision="fp32")
    scores, logits = 3 * 4 * 2 * 4 * 512**2, 4 * 2 * 512 * 512
    assert found.activations["eager"]["kept"] - found.activations["fused"]["kept"] > scores + logits


def test_the_kv_cache_counts_key_value_heads():
    found = plan.memory(llama(), seq=16, gpu_memory=1e9, compare=False)
    assert found.kv_bytes_per_token == 6 * 2 * 2 * 16 * 2
    assert found.kv_tokens == int((0.94e9 - 2 * found.parameters) // found.kv_bytes_per_token)


def test_step_time_and_traffic_follow_from_flops_and_parameters():
    found = plan.memory(
        llama(), gpus=4, seq=32, batch=2, accumulation=3, device="H100", mfu=0.5, link=1e9, compare=False
    )
    with torch.device("meta"):
        flops = step_flops(transformers.LlamaForCausalLM(llama()), [32] * 6).model
    assert found.speed["step_s"] == pytest.approx(flops / (0.5 * 989e12))
    assert found.speed["tgs"] == pytest.approx(32 * 6 / found.speed["step_s"])
    once = plan.memory(llama(), gpus=4, seq=32, compare=False)
    assert once.speed["zero3_bytes"] == pytest.approx(3 * 2 * once.parameters * 3 / 4)
    assert found.speed["zero3_s"] == pytest.approx(3 * once.speed["zero3_bytes"] / 1e9)


# ---- measured ----------------------------------------------------------------------------------------------------

MEASURE = """
import ctypes, gc, json, sys
import torch, transformers
import fastllm
from fastllm.train import plan

def status(key):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(key))

config = transformers.LlamaConfig(**json.loads(sys.argv[1]))
x = torch.randn(512, 512, requires_grad=True)
(x @ x).sum().backward()
planned = {way: plan.memory(config, seq=512, batch=2, precision="fp32", compare=False) for way in (0,)}[0].layout(0)
for checkpointing in (False, True):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    model = transformers.LlamaForCausalLM(config).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    fastllm.patch(model, verify=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, config.vocab_size, (2, 512))
    for _ in range(3):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    wanted = planned.total_checkpointed if checkpointing else planned.total
    print(json.dumps({"measured": status("VmHWM") - before, "planned": wanted}), flush=True)
    del model, optimizer
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or not ctypes.util.find_library("c"), reason="Linux counts memory so"
)
def test_memory_measured_is_memory_planned():
    import os

    shape = {
        "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }  # fmt: skip
    # Freed memory goes back to the system, as it does to the allocator of a GPU: the heap's holes are not the plan's.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": str(1 << 18),
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(shape)], env=environment, capture_output=True, text=True, timeout=300
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 2, done.stderr
    for one in found:
        assert one["planned"] == pytest.approx(one["measured"], rel=0.1)


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    llama().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_prints_tables_and_json(folder, capsys):
    arguments = ["plan", "--model", folder, "--gpus", "2", "--gpu-memory", "80", "--seq", "32", "--batch", "2"]
    arguments += ["--lora", "4", "--device", "H100", "--mfu", "0.4", "--link", "50"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for said in (
        "ZeRO-3 + offload all",
        "recommended: ZeRO-0",
        "KV cache: ",
        "tokens per second",
        "trained (LoRA)",
        "fits",
    ):
        assert said in out
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    given = {"gpus": 2, "gpu_memory": 80e9, "seq": 32, "lora": 4, "device": "H100", "mfu": 0.4, "link": 50e9}
    assert found["settings"].items() >= given.items()
    assert found["recommended"] in {one.pop("name") for one in found["layouts"]}
    layouts = [plan.Layout(**one) for one in found.pop("layouts")]
    assert plan_report.render(plan.Plan(**found, layouts=layouts)) == out.rstrip("\n"), "both say the same"


def test_the_share_of_the_peak_may_be_a_runs_own(folder, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps({"loss": 1, "mfu": m}) + "\n" for m in (0.1, 0.4, 0.6)))
    arguments = ["plan", "--model", folder, "--seq", "32", "--device", "A100", "--json", "--mfu"]
    assert cli.main([*arguments, str(run)]) == 0
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed["step_s"] == pytest.approx(speed["flops_per_gpu"] / (0.5 * 312e12))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--gpus", "0"], "gpus must be a whole number of at least 1, got 0"),
        (["--seq", "-1"], "seq must be a whole number"),
        (["--gpu-memory", "much"], "--gpu-memory must be a number of gigabytes"),
        (["--mfu", "0.4"], "device and mfu belong together"),
        (["--mfu", "2", "--device", "H100"], "mfu must lie in (0, 1], got 2.0"),
        (["--mfu", "0.4", "--device", "Abacus"], "the peak of 'Abacus' is not known"),
        (["--mfu", "nowhere", "--device", "H100"], "--mfu must be a number or the folder of a run"),
        (["--model", "lama"], "did you mean"),
        (["--model", "vit"], "ViTConfig describes no causal LM"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(folder, capsys, more, message):
    assert cli.main(["plan", "--model", folder, "--seq", "8", *more]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_what_is_no_number_is_refused_in_python_too():
    with pytest.raises(ConfigError, match="precision must be one of"):
        plan.memory(llama(), precision="fp8")
