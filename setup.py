"""Builds fastllm._C, the C++ kernels behind the LibTorch stable ABI (one binary for many torch versions).

Every csrc/cpu/*.cpp is compiled once per instruction set (baseline, AVX2, AVX-512, AVX-512 + bf16 conversions) as
pure kernels and once more as the binding that picks among them at run time; no torch header is read by the kernels.

Environment:
  FASTLLM_BUILD_CUDA=1   compile csrc/cuda/*.cu with nvcc even without a CUDA torch (0 never; default: if both exist)
  FASTLLM_REQUIRE_CPP=1  fail the installation if the extension cannot be built (default: install without it and say so)
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch 2.10's stable ABI: loads in every later torch
CUDA_ARCHITECTURES = ("80", "90", "100")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c"]
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
ISAS = X86_ISAS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}


class BuildKernels(build_ext):
    """Compiles the object files itself (several flags per source are beyond setuptools), then links them."""

    def run(self):
        try:
            super().run()
        except Exception as error:
            if os.environ.get("FASTLLM_REQUIRE_CPP") == "1":
                raise
            print(
                f"fastllm: the C++ kernels were not built ({error}). The package works without them on the other "
                "backends; `fastllm doctor` says what is missing.",
                file=sys.stderr,
            )

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # An editable install hands over a throwaway folder; the usual one keeps the object files for the next build.
        temporary = (
            f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}" if self.editable_mode else self.build_temp
        )
        build_dir = Path(temporary) / ext.name
        build_dir.mkdir(parents=True, exist_ok=True)
        if ext.name.endswith("_cuda"):
            self.build_cuda(target, build_dir)
        else:
            self.build_cpu(target, build_dir)

    def build_cpu(self, target, build_dir):
        import sysconfig

        import torch

        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler.split()[0]) is None:
            raise RuntimeError(f"no C++ compiler: {compiler!r} is not on PATH (set CXX, or install g++ or clang++)")
        torch_dir = Path(torch.__file__).resolve().parent
        common = [
            *compiler.split(),
            "-O3",
            "-std=c++20",
            "-fPIC",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            "-Wno-uninitialized",  # GCC 12 finds undefined-on-purpose values in its own intrinsics headers
            "-Wno-maybe-uninitialized",
            "-fno-math-errno",
        ]
        includes = [f"-I{torch_dir}/include", f"-I{sysconfig.get_paths()['include']}", f"-I{ROOT}/csrc"]
        commands = []
        objects = []
        for source in sorted((ROOT / "csrc").glob("*.cpp")) + sorted((ROOT / "csrc/cpu").glob("*.cpp")):
            variants = [("binding", [*includes, STABLE_ABI, "-DPy_LIMITED_API=0x030a0000", "-DFASTLLM_BINDING"])]
            if source.parent.name == "cpu":
                variants += [(isa, [f"-DFASTLLM_ISA={isa}", *flags]) for isa, flags in ISAS.items()]
            for variant, flags in variants:
                output = build_dir / f"{source.stem}.{variant}.o"
                objects.append(output)
                if self.stale(output):
                    if ISAS is X86_ISAS:
                        flags = [*flags, "-DFASTLLM_X86"]
                    commands.append([*common, *flags, "-c", str(source), "-o", str(output), "-MMD"])
        self.run_all(commands)
        libraries = [f"-L{torch_dir}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
        rpath = [] if sys.platform == "darwin" else ["-Wl,--as-needed"]
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        self.run_all([[*compiler.split(), *shared, *map(str, objects), *rpath, *libraries, "-o", str(target)]])

    def build_cuda(self, target, build_dir):
        import torch

        torch_dir = Path(torch.__file__).resolve().parent
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        flags = [
            "-O3",
            "-std=c++20",
            "-Xcompiler=-fPIC",
            "-DUSE_CUDA",
            STABLE_ABI,
            f"-I{torch_dir}/include",
            f"-I{ROOT}/csrc",
        ]
        objects = []
        commands = []
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            output = build_dir / f"{source.stem}.cu.o"
            objects.append(output)
            commands.append(["nvcc", *codes, *flags, "-c", str(source), "-o", str(output)])
        self.run_all(commands)
        self.run_all(
            [
                [
                    "nvcc",
                    "-shared",
                    *map(str, objects),
                    f"-L{torch_dir}/lib",
                    "-ltorch",
                    "-ltorch_cpu",
                    "-lc10",
                    "-o",
                    str(target),
                ]
            ]
        )

    @staticmethod
    def stale(output):
        """True when an object file is missing or older than anything it was made from (setup.py included)."""
        dependencies = output.with_suffix(".d")
        if not output.exists() or not dependencies.exists():
            return True
        made_from = dependencies.read_text().replace("\\\n", " ").split()[1:]
        made = output.stat().st_mtime
        return any(not Path(f).exists() or Path(f).stat().st_mtime > made for f in [*made_from, __file__])

    @staticmethod
    def run_all(commands):
        def run(command):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            if done.stderr.strip():
                print(done.stderr, file=sys.stderr)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))


def wants_cuda():
    asked = os.environ.get("FASTLLM_BUILD_CUDA")
    if asked is not None:
        return asked == "1"
    if shutil.which("nvcc") is None:
        return False
    try:
        import torch
    except ImportError:
        return False
    return torch.version.cuda is not None


extensions = [Extension("fastllm._C", [], py_limited_api=True)]
if wants_cuda() and list((ROOT / "csrc/cuda").glob("*.cu")):
    extensions.append(Extension("fastllm._C_cuda", [], py_limited_api=True))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
