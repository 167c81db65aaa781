"""What an installation holds: the C++ extension, the wheel, the way without a compiler, the CUDA C++ kernels."""

import ctypes.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import fastllm
from fastllm.kernels import cpp, cuda

ROOT = Path(__file__).resolve().parents[1]
needs_source = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs fastllm's source tree")


def run(command, cwd=ROOT, **environment):
    env = {**os.environ, "PYTHONPATH": "", **environment}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)


def undefined_symbols(library):
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    done = run(["nm", "-D", "--undefined-only", library])
    assert done.returncode == 0, done.stderr
    return [line.split()[-1] for line in done.stdout.splitlines()]


def assert_stable_abi_only(library):
    """Nothing mangled of torch's own: only the C functions that LibTorch keeps from version to version."""
    symbols = undefined_symbols(library)
    assert "torch_library_impl" in symbols or "aoti_torch_library_init_impl" in symbols
    assert not [s for s in symbols if re.match(r"_Z\w*?(3c10|2at|5torch|5caffe)", s)]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the source tree with its object files, which a build there finds up to date."""
    copy = tmp_path_factory.mktemp("source") / "fastllm"
    ignored = shutil.ignore_patterns(".git", ".venv", "dist", "*.so", "lib.*", "bdist.*", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def wheel_from(source, into, **environment):
    done = run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v", "-w", into, "."],
        cwd=source, **environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = Path(into).glob("*.whl")
    return wheel, done.stdout + done.stderr


@pytest.mark.skipif(bool(cpp.unavailable()), reason="the C++ extension is not built")
def test_the_extension_uses_the_stable_abi_alone():
    assert_stable_abi_only(cpp._C.__file__)


@pytest.mark.skipif(bool(cpp.unavailable()), reason="the C++ extension is not built")
@pytest.mark.parametrize("capability", cpp.CAPABILITIES)
def test_each_instruction_set_loads_and_computes(capability):
    code = """
import torch, fastllm
x = torch.randn(3, 100)
with fastllm.use_backend("cpp"):
    torch.testing.assert_close(fastllm.ops.rms_norm(x), torch.nn.functional.rms_norm(x, (100,), eps=1e-6))
print(fastllm.kernels.cpp.capability())
"""
    done = run([sys.executable, "-c", code], FASTLLM_CPU_CAPABILITY=capability, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    found = done.stdout.strip()
    assert cpp.CAPABILITIES.index(found) <= cpp.CAPABILITIES.index(capability)
    # A processor that cannot do what is asked for says so.
    assert ("is more than this processor has" in done.stderr) == (found != capability)


def test_an_unknown_instruction_set_is_an_error():
    done = run([sys.executable, "-c", "import fastllm"], FASTLLM_CPU_CAPABILITY="avx1024", PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "FASTLLM_CPU_CAPABILITY must be one of baseline, avx2, avx512, avx512_bf16, got 'avx1024'" in done.stderr


@needs_source
def test_a_build_does_not_ask_for_another_torch():
    text = (ROOT / "pyproject.toml").read_text()
    (requires,) = re.findall(r"^\[build-system\]\nrequires = \[(.*)\]", text, re.MULTILINE)
    assert "torch" not in requires


@needs_source
@pytest.mark.slow
@pytest.mark.skipif(bool(cpp.unavailable()), reason="the C++ extension is not built")
def test_one_wheel_for_every_python_and_torch(source, tmp_path):
    wheel, _ = wheel_from(source, tmp_path)
    assert re.fullmatch(r"fastllm-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
        (library,) = (n for n in archive.namelist() if n.startswith("fastllm/_C.") and n.endswith(".so"))
    library = tmp_path / "unpacked" / library
    assert_stable_abi_only(library)
    # The linker keeps one copy of an inline function. One compiled for a newer processor must carry that instruction
    # set in its name, or it might be the copy that every processor runs.
    for built in (source / "build").rglob("*.avx*.o"):
        own = f"fastllm::{built.name.split('.')[1]}::"
        weak = [line for line in run(["nm", "-C", built]).stdout.splitlines() if re.search(r" [WVu] ", line)]
        assert not [line for line in weak if own not in line], built.name
    code = "import fastllm; print(fastllm.__file__, fastllm.backends.available(), fastllm.kernels.cpp.capability())"
    done = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(tmp_path / "unpacked"))
    assert str(tmp_path / "unpacked") in done.stdout, done.stderr
    assert "'cpp'" in done.stdout


@needs_source
@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"CXX": "/nowhere/c++"}, {"PATH": "/nowhere"}], ids=["CXX", "PATH"])
def test_without_a_compiler_the_package_installs_and_says_how_to_mend_it(source, tmp_path, environment):
    wheel, log = wheel_from(source, tmp_path, **environment)
    assert "the C++ kernels were not built (no C++ compiler" in log
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.endswith(".so")]
        archive.extractall(tmp_path / "unpacked")
    code = """
import sys
# an editable install of this checkout would lend its extension to the unpacked package
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import torch, fastllm
assert fastllm.backends.available()[0] == "torch" and "cpp" not in fastllm.backends.available()
print(fastllm.kernels.cpp.unavailable())
x = torch.ones(2, 4, requires_grad=True)
fastllm.ops.rms_norm(x).sum().backward()
"""
    done = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(tmp_path / "unpacked"))
    assert done.returncode == 0, done.stderr
    assert "with a C++ compiler (g++ or clang++) on PATH" in done.stdout
    assert "pip install" in done.stdout


# ---- CUDA C++ --------------------------------------------------------------------------------------------------


def test_the_cuda_backend_says_what_it_lacks(monkeypatch):
    from fastllm.ops.rms_norm import _rms_norm

    assert "cuda" in _rms_norm.kernels
    monkeypatch.setattr(cuda, "extension", lambda: None)
    assert "not built" in cuda.unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.unavailable().startswith("no CUDA device that torch can use")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "FASTLLM_BUILD_CUDA=1" in cuda.unavailable()
    with fastllm.use_backend("cuda"), pytest.raises(fastllm.BackendError, match=r"rms_norm: .*FASTLLM_BUILD_CUDA=1"):
        fastllm.ops.rms_norm(torch.ones(2, 4))


def test_the_cuda_op_knows_its_shapes_and_its_gradient():
    op = torch.ops.fastllm.rms_norm_cuda.default
    with torch._subclasses.FakeTensorMode():
        y, rstd = op(torch.empty(3, 5, 8, dtype=torch.bfloat16), torch.empty(8, dtype=torch.bfloat16), 1e-6, 0.0)
    assert (y.shape, y.dtype, rstd.shape, rstd.dtype) == ((3, 5, 8), torch.bfloat16, (3, 5), torch.float32)
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fastllm::rms_norm_cuda", "Autograd")
    assert "CUDA" not in torch._C._dispatch_dump("fastllm::rms_norm_cuda") or not cuda.unavailable()


@needs_source
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernels_compile_without_spills_and_register(source):
    done = run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source, FASTLLM_BUILD_CUDA="1", FASTLLM_CUDA_ARCHITECTURES="90",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    library = source / "fastllm/_C_cuda.abi3.so"
    assert_stable_abi_only(library)
    assert "aoti_torch_get_current_cuda_stream" in undefined_symbols(library)

    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    usage = run([tools / "cuobjdump", "--dump-resource-usage", library]).stdout
    frames = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert frames
    assert set(frames) == {"0"}, usage
    run([tools / "cuobjdump", "-xelf", "all", library], cwd=source)
    (cubin,) = source.glob("*.sm_90.cubin")
    sass = run([tools / "nvdisasm", "-c", cubin]).stdout
    assert re.search(r"LDG\.E\.128", sass)
    assert re.search(r"STG\.E\.128", sass)

    if ctypes.util.find_library("torch_cuda") or torch.version.cuda:
        return
    # Here torch has no CUDA: the library that stood in for it at link time lets the kernels be loaded and listed.
    (stand_in,) = (source / "build").rglob("libtorch_cuda.so")
    code = f"""
import ctypes, os, torch, fastllm
ctypes.CDLL({str(library)!r}, mode=os.RTLD_LAZY)
for op in ("rms_norm", "rms_norm_backward"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastllm::{{op}}_cuda", "CUDA"), op
"""
    done = run([sys.executable, "-c", code], PYTHONPATH=str(source), LD_LIBRARY_PATH=str(stand_in.parent))
    assert done.returncode == 0, done.stderr
