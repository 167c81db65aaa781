"""The command line as a shell sees it: output, exit codes, errors in one line."""

import json
import os
import subprocess
import sys

import pytest

import fastllm
from fastllm import cli, doctor
from fastllm.kernels import cpp


def run(capsys, *arguments):
    """Exit code, stdout and stderr of `fastllm <arguments>` in this process."""
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_doctor_names_versions_backends_and_two_measured_numbers(capsys):
    code, out, err = run(capsys, "doctor")
    assert (code, err) == (0, "")
    for text in ("fastllm", "torch ", "triton", "transformers", "flash-attn", "backend cpp", "backend cuda", "CPU"):
        assert text in out
    assert "GB/s read and written" in out
    assert "GFLOP/s in bf16" in out


def test_doctor_json_holds_the_same_and_parses(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["fastllm"] == fastllm.__version__
    assert set(report["backends"]) == {"torch", "cpp", "triton", "cuda"}
    assert report["backends"]["torch"] == {"available": True, "reason": None, "mend": None}
    assert report["measured"][0]["device"] == "cpu"
    assert report["measured"][0]["copy_gb_per_s"] > 0
    assert report["measured"][0]["matmul_bf16_gflop_per_s"] > 0
    for backend in report["backends"].values():
        assert backend["available"] or (backend["reason"] and backend["mend"])


def test_doctor_says_how_to_mend_a_missing_extension(capsys, monkeypatch):
    monkeypatch.setattr(cpp, "_reason", "the C++ extension is not built")
    monkeypatch.setattr(cpp, "_capability", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    code, out, _ = run(capsys, "doctor", "--no-measure")
    assert code == 0
    assert "missing: the C++ extension is not built" in out
    assert "no C++ compiler 'no-such-compiler' on PATH; install g++" in out
    assert "pip install --no-build-isolation" in out
    assert "GB/s" not in out


def test_the_package_works_without_the_extension():
    code = (
        "import sys; sys.modules['fastllm._C'] = None\n"
        "import torch, fastllm\n"
        "assert 'cpp' not in fastllm.backends.available()\n"
        "x = torch.randn(2, 8, requires_grad=True)\n"
        "fastllm.ops.rms_norm(x).sum().backward()\n"
        "from fastllm import cli; sys.exit(cli.main(['doctor', '--no-measure']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "missing: the C++ extension is not built" in done.stdout


TINY = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_patch_dry_run_prints_the_report_of_a_folder_a_file_and_a_model_type(capsys, folder):
    for model in (folder, folder / "config.json", "llama"):
        code, out, err = run(capsys, "patch", str(model), "--dry-run")
        assert (code, err) == (0, "")
        assert out.startswith("LlamaForCausalLM, ")
        assert "model.layers.{0-" in out
        for op in ("rms_norm", "rope", "glu", "loss"):
            assert op in out


def test_patch_dry_run_in_json(capsys, folder):
    code, out, _ = run(capsys, "patch", str(folder), "--dry-run", "--json", "--exclude", "model.layers.0.*")
    found = json.loads(out)
    assert code == 0
    assert found["model"] == "LlamaForCausalLM"
    assert found["counts"]["rms_norm"] == 5
    assert ("model.norm", "rms_norm") in [(p["path"], p["op"]) for p in found["patched"]]
    assert any(s["path"].startswith("model.layers.0.") and s["reason"] == "excluded" for s in found["skipped"])


def test_patch_dry_run_with_nothing_to_patch_fails(capsys, folder):
    code, out, err = run(capsys, "patch", str(folder), "--dry-run", "--ops", "layer_norm")
    assert code == 1
    assert "layer_norm" in out
    assert err == "fastllm patch: error: nothing in LlamaForCausalLM was patched\n"


def test_patch_without_dry_run_points_to_python(capsys):
    code, out, err = run(capsys, "patch", "llama")
    assert (code, out) == (2, "")
    assert "fastllm.patch(model)" in err
    assert "--dry-run" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ("{not json", "is not JSON"),
        ("[]", "names no model_type"),
        ('{"model_type": "llama", "hidden_size": "abc"}', "config.json: Validation error for field 'hidden_size'"),
        ('{"model_type": "no_such_model"}', "has no model_type 'no_such_model'"),
    ],
)
def test_a_bad_model_folder_is_one_line(capsys, tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, out, err = run(capsys, "patch", str(tmp_path), "--dry-run")
    assert (code, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_an_unknown_model_type_gets_a_suggestion(capsys):
    code, _, err = run(capsys, "patch", "lama", "--dry-run")
    assert code == 1
    assert "did you mean llama" in err


def test_an_unknown_op_is_named(capsys, folder):
    code, _, err = run(capsys, "patch", "--dry-run", "--ops", "rope,nothing", str(folder))
    assert code == 2
    assert "'nothing'" in err


def test_ops_and_exclude_take_lists_and_tell_what_matches_nothing(capsys, folder):
    code, out, err = run(
        capsys, "patch", "--dry-run", "--json", "--ops", "rope,glu", "--exclude", "glu,mdoel.*", str(folder)
    )
    assert code == 0
    assert list(json.loads(out)["counts"]) == ["rope"]
    assert "'mdoel.*' is no op" in err
    assert err.count("\n") == 1


def test_an_unknown_backend_in_the_environment_is_told_and_forced_on_nothing():
    for command, told in (
        ("doctor --no-measure", "no backend, and every op will fail"),
        ("patch llama --dry-run", "got 'foo'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fastllm", *command.split()], capture_output=True, text=True,
            env={**os.environ, "FASTLLM_BACKEND": "foo"},
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        assert told in (done.stdout + done.stderr)


@pytest.mark.parametrize("arguments", [(), ("doctor",), ("patch",)])
def test_help_is_there_for_every_command(capsys, arguments):
    code, out, _ = run(capsys, *arguments, "-h")
    assert code == 0
    assert out.startswith("usage: fastllm")
    assert len(out.splitlines()) > 5


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"fastllm {fastllm.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "fastllm: error: the following arguments are required: COMMAND"),
        (("nothing",), "invalid choice: 'nothing'"),
        (("doctor", "--wrong"), "unrecognized arguments: --wrong"),
        (("patch", "--dry-run"), "fastllm patch: error: the following arguments are required: MODEL"),
    ],
)
def test_a_wrong_call_is_one_line_on_stderr_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_failure_is_one_line_and_debug_shows_the_traceback(capsys, monkeypatch):
    def fail(**_):
        raise error("the machine is on fire\nand more")

    monkeypatch.setattr(doctor, "collect", fail)
    error = fastllm.ConfigError
    assert run(capsys, "doctor") == (1, "", "fastllm doctor: error: the machine is on fire\n")
    error = RuntimeError
    unexpected = "fastllm doctor: error: RuntimeError: the machine is on fire (--debug shows where)\n"
    assert run(capsys, "doctor") == (1, "", unexpected)
    with pytest.raises(RuntimeError, match="on fire"):
        cli.main(["doctor", "--debug"])


def test_a_reader_that_stops_early_is_no_error_to_speak_of():
    doctor = [sys.executable, "-m", "fastllm.cli", "doctor", "--no-measure"]
    writer = subprocess.Popen(doctor, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    writer.stdout.close()
    assert writer.stderr.read() == ""
    assert writer.wait() == 1


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "fastllm.cli", "doctor", "-x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
