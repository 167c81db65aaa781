"""``python -m bench``: what it says when called wrongly, what its rows carry, and that its cases are what they say."""

import json

import pytest
import torch
import torch.nn.functional as F

from bench import __main__ as command
from bench import attention, device, eager, kernels, loss, measure, ppo, report, rl, suite, train
from bench.case import FORWARD, Case
from bench.results import rows_of

VERSIONS = {
    "device",
    "cpu",
    "gpu",
    "driver",
    "threads",
    "torch",
    "triton",
    "transformers",
    "commit",
    "command",
    "instruction_set",
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    small = device.Cpu(cache_bytes=1 << 20, copied_bytes=1 << 20, matmul_size=64)
    monkeypatch.setattr(device, "find", lambda name: small)


def exit_code(arguments):
    try:
        return command.main(arguments)
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["kernel"], "kernels, attention, loss, rl, train"),
        (["kernels", "--only", "softmax"], "rms_norm"),
        (["kernels", "--only", "swiglu", "--json", "/no/such/folder/rows.json"], "/no/such/folder/rows.json"),
        (["ppo", "--advantage", "rloo"], "'rloo'"),
        (["train", "--json", "/"], "cannot write /"),
        (["loss", "--plot", "/dev/null/plots"], "cannot write /dev/null/plots"),
        (["kernels", "--device", "tpu"], "'tpu'"),
        (["loss", "--fast"], "--fast"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments, named, capsys):
    assert exit_code(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert named in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line_and_exit_code_2(capsys):
    assert exit_code(["kernels", "--device", "cuda"]) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert "--device cuda: torch" in said.err


def test_help_lists_the_suites(capsys):
    assert command.main([]) == 0
    assert set(command.SUITES) | set(command.OTHERS) <= set(capsys.readouterr().out.split())


def small_case(ours):
    def double(x):
        return 2 * x

    def absent():
        raise ImportError("not here")

    return Case("double", "4096", lambda dtype: (torch.randn(4096).to(dtype),), ours, double, double, {"other": absent},
                passes=(FORWARD,))  # fmt: skip


def test_rows_and_tables(quick, tmp_path, capsys):
    path, plots = tmp_path / "rows.json", tmp_path / "plots"
    wanted = ["--quick", "--json", str(path), "--plot", str(plots)]
    assert suite.main("made-up", [small_case(lambda x: 2 * x)], wanted) == 0
    rows = json.loads(path.read_text())
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    assert {plot.name for plot in plots.iterdir()} == {"made-up-limit.png", "made-up-peers-fwd.png"}
    for row in rows:
        assert row["suite"] == "made-up"
        assert set(row["machine"]) >= VERSIONS
        assert row["runs"] == suite.QUICK_RUNS
        assert {found["name"] for found in row["contestants"]} == {"fastllm", "eager", "torch.compile", "other"}
    said = capsys.readouterr().out
    assert "double 4096 bf16 forward" in said
    assert "too few to quote" in said
    assert said.count("other is missing: ImportError: not here") == 1
    assert max(len(line) for line in said.splitlines()) <= 120


def test_the_tables_of_a_training_step_fit_and_compare_with_the_unpatched(capsys):
    def row(kind, seconds, peak, run_peak, mfu=None):
        return {
            "contestant": kind, "median_s": seconds, "quartile_s": (seconds, 2 * seconds), "tokens_per_s": 2048 / seconds,
            "trainable_tokens_per_s": 2047 / seconds, "tflops": 1.7 / seconds, "mfu": mfu, "hfu": mfu, "of_matmul": 0.6,
            "peak_bytes": peak, "peak_over_built_bytes": run_peak, "largest_loss_difference": 1e-4, "first_s": 123.4,
        }  # fmt: skip

    rows = [
        row("unpatched", 4.0, 2_000_000_000, 6_000_000_000),
        row("torch.compile", 8.0, 3_000_000_000, 9_000_000_000),
        row("patched", 2.0, None, 1_500_000_000, mfu=0.625),
    ]
    suite.console().print(train.speeds(rows))
    said = capsys.readouterr().out.splitlines()
    assert max(map(len, said)) <= 120
    compiled, patched = said[2].split(), said[3].split()
    assert compiled[1:] == ["8.00", "8.00–16.00", "0.50×", "256", "256", "0.212", "–", "–", "60%", "123.4"]
    assert patched[3:] == ["2.00×", "1024", "1024", "0.85", "62.5%", "62.5%", "60%", "123.4"]
    suite.console().print(train.memory(rows))
    said = capsys.readouterr().out.splitlines()
    assert said[2].split()[1:] == ["3000", "1.50×", "9000", "1.50×", "1.0e-04"]
    assert said[3].split()[1:] == ["–", "–", "1500", "0.25×", "1.0e-04"]


def test_shapes_have_the_parameters_of_their_names():
    transformers = pytest.importorskip("transformers")
    for shape in train.SHAPES.values():
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape.config))
        assert sum(p.numel() for p in model.parameters()) == shape.parameters


def test_a_training_step_from_end_to_end(monkeypatch, tmp_path, capsys):
    """A tiny shape in place of the smallest; what is written agrees with itself and with PyTorch's count of operations."""
    pytest.importorskip("transformers")
    config = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 2048,
    }  # fmt: skip
    tiny = train.Shape("tiny", 20_000, config, {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(train, "SHAPES", {"134m": tiny})
    monkeypatch.setattr(train, "KINDS", ("unpatched", "patched"))
    file = tmp_path / "train.json"
    assert exit_code(["train", "--quick", "--checkpointing", "both", "--json", str(file), "--plot", str(tmp_path)]) == 0
    rows = json.loads(file.read_text())
    assert [(row["contestant"], row["checkpointing"]) for row in rows] == [
        ("unpatched", False), ("patched", False), ("unpatched", True), ("patched", True)
    ]  # fmt: skip
    assert {path.name for path in tmp_path.glob("*.png")} == {"train-steps.png", "train-steps-checkpointing.png"}
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32 + 64 * 32
    for row in rows:
        assert row["flops"] == 6 * weights * 2048 + 6 * 2 * 32 * 2048**2
        assert (row["hardware_flops"] > row["flops"]) == row["checkpointing"]
        assert row["tflops"] == pytest.approx(row["flops"] / row["median_s"] / 1e12)
        assert row["tokens_per_s"] == row["real_tokens_per_s"] > row["trainable_tokens_per_s"]
        assert row["largest_loss_difference"] < 0.05
        assert (row["mfu"], row["hfu"]) == (None, None)  # no peak is known for a CPU


def test_a_shape_that_cannot_fit_is_refused_before_anything_is_built(monkeypatch, capsys):
    monkeypatch.setattr(device.Cpu, "memory", lambda self: 24 << 30)
    assert exit_code(["train", "--shape", "7b"]) == 2
    assert "needs more than 81 GB, this cpu has 26" in capsys.readouterr().err
    assert exit_code(["ppo", "--shape", "7b", "--advantage", "grpo"]) == 2
    assert "needs more than 202 GB, this cpu has 26" in capsys.readouterr().err


def test_the_ppo_suite_runs_to_its_end_and_its_contestants_do_the_same(monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    tiny = ppo._shape("tiny", 20_000, (32, 2, 2, 2, 48), 8, 4, 12, 6)
    tiny.config["vocab_size"] = 300
    monkeypatch.setattr(ppo, "SHAPES", {"58m": tiny})
    monkeypatch.setattr(ppo, "KINDS", ("plain", "patched"))
    file = tmp_path / "ppo.json"
    assert exit_code(["ppo", "--quick", "--json", str(file), "--plot", str(tmp_path)]) == 0
    rows = json.loads(file.read_text())
    assert [row["contestant"] for row in rows] == ["plain", "patched"]
    for row in rows:
        assert row["entropy_difference"] < 0.01
        assert row["samples_per_s"] == pytest.approx(8 / row["median_s"])
        assert row["tflops"] * row["median_s"] == pytest.approx(
            sum(row[f"{part}_tflops"] * row[f"{part}_s"] for part in ppo.PARTS), rel=1e-6
        )
    assert "| patched |" in report._iterations(rows)
    assert rows_of(rows)[0]["contestants"][1]["name"] == "fastllm"
    assert (tmp_path / "ppo-steps.png").is_file()


def test_a_wrong_op_fails_the_run_and_shows_no_time(quick, capsys):
    assert suite.main("made-up", [small_case(lambda x: 2 * x + 1)], ["--quick", "--only", "fp32"]) == 1
    said = capsys.readouterr()
    assert "WRONG" in said.out
    assert "double 4096 fp32 forward" in said.err


def test_an_op_that_raises_fails_the_run(quick, capsys):
    def broken(x):
        raise RuntimeError("no kernel")

    assert suite.main("made-up", [small_case(broken)], ["--quick", "--only", "fp32"]) == 1
    assert "fastllm is missing: RuntimeError: no kernel" in capsys.readouterr().out


def test_labels_are_unique_and_the_bar_is_covered():
    cases = {id(case): case for case in (*kernels.CASES, *attention.CASES, *loss.CASES, *rl.CASES)}.values()
    labels = [case.label(dtype, which) for case in cases for dtype in case.dtypes for which in case.passes]
    assert len(labels) == len(set(labels))
    for op in ("rms_norm", "apply_rope", "swiglu", "cross_entropy", "token_logprobs"):
        for dtype in ("fp32", "bf16"):
            assert any(label.startswith(op) and label.endswith(f"{dtype} forward") for label in labels)


def norm(*shapes):
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes)


X, W, TARGET = (16, 64), (64,), torch.randint(64, (16,))
CASES = {
    "rms_norm": (eager.rms_norm, eager.exact_rms_norm, norm(X, W)),
    "rms_norm into": (eager.rms_norm_into, eager.exact_rms_norm, norm(X, W, X)),
    "add_rms_norm": (eager.add_rms_norm, eager.exact_add_rms_norm, norm(X, X, W)),
    "cross_entropy": (eager.cross_entropy, F.cross_entropy, (*norm(X), TARGET)),
    "token_logprobs": (eager.token_logprobs, eager.exact_token_logprobs, (*norm(X), TARGET)),
    "linear_cross_entropy": (eager.linear_cross_entropy, eager.exact_linear_cross_entropy, (*norm(X, (64, 64)), TARGET)),
    "linear_token_logprobs": (
        eager.linear_token_logprobs, eager.exact_linear_token_logprobs, (*norm(X, (64, 64)), TARGET),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_eager_peer_computes_the_exact_formula_in_its_dtype(name):
    function, exact, inputs = CASES[name]
    narrow = [i.float() if i.is_floating_point() else i for i in inputs]
    for got, wanted in zip(measure.outputs_of(function(*narrow)), measure.outputs_of(exact(*inputs))):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=1e-4, atol=1e-4)
