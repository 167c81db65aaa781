"""The command line as a shell sees it: output, exit codes, errors in one line."""

import json
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


@pytest.mark.parametrize("arguments", [(), ("doctor",)])
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
    ],
)
def test_a_wrong_call_is_one_line_on_stderr_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_failure_is_one_line_and_debug_shows_the_traceback(capsys, monkeypatch):
    def fail(**_):
        raise RuntimeError("the machine is on fire\nand more")

    monkeypatch.setattr(doctor, "collect", fail)
    assert run(capsys, "doctor") == (1, "", "fastllm doctor: error: the machine is on fire\n")
    with pytest.raises(RuntimeError, match="on fire"):
        cli.main(["doctor", "--debug"])


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "fastllm.cli", "doctor", "-x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
