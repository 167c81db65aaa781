"""Builds fastllm._C, the C++ kernels behind the LibTorch stable ABI (one binary for many torch versions).

Every csrc/cpu/*.cpp is compiled once per instruction set (baseline, AVX2, AVX-512, AVX-512 + bf16 conversions) as
pure kernels and once more as the binding that picks among them at run time; no torch header is read by the kernels.

torch itself is not a build requirement (an isolated build would fetch a second one, gigabytes of it): its headers are
taken from the environment that the package is being installed into, in isolated builds too.

Environment:
  CXX                    the C++ compiler (default: c++)
  FASTLLM_BUILD_CUDA=1   compile csrc/cuda/*.cu with nvcc even without a CUDA torch (0 never; default: if both exist)
  FASTLLM_CUDA_ARCHITECTURES=90,100   the chips to compile them for (default: 80,90,100)
  FASTLLM_REQUIRE_CPP=1  fail the installation if the extension cannot be built (default: install without it and say so)
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path(
    "csrc"
)  # relative to this file, where setuptools runs it: a copy of the tree finds its objects up to date
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


def find_torch():
    """torch's folder, without importing it: headers, libraries and version.py are all a build needs."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in (Path(place, "torch") for place in places):
        if (folder / "version.py").is_file():
            version = runpy.run_path(str(folder / "version.py"))
            if tuple(map(int, re.findall(r"\d+", version["__version__"])[:2])) < (2, 10):
                raise RuntimeError(f"torch {version['__version__']} in {folder} is too old, 2.10 or newer is needed")
            return folder.resolve(), version
    raise RuntimeError(
        f"torch is not installed for {sys.executable}; install it first, then fastllm with --no-build-isolation"
    )


class BuildKernels(build_ext):
    """Compiles the object files itself (several flags per source are beyond setuptools), then links them."""

    def build_extensions(self):
        built = []
        for ext in self.extensions:
            try:
                self.build_extension(ext)
                built.append(ext)
            except Exception as error:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # nothing stale may be installed
                is_cuda = ext.name.endswith("_cuda")
                if os.environ.get("FASTLLM_BUILD_CUDA" if is_cuda else "FASTLLM_REQUIRE_CPP") == "1":
                    raise
                print(
                    f"fastllm: the {'CUDA' if is_cuda else 'C++'} kernels were not built ({error}). The package works "
                    "without them on the other backends; `fastllm doctor` says what is missing.",
                    file=sys.stderr,
                )
        self.extensions = built

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
        compiler = os.environ.get("CXX") or "c++"
        if shutil.which(compiler.split()[0]) is None:
            raise RuntimeError(f"no C++ compiler: {compiler!r} is not on PATH (set CXX, or install g++ or clang++)")
        torch_dir, _ = find_torch()
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
        includes = [f"-I{torch_dir}/include", f"-I{sysconfig.get_paths()['include']}", f"-I{SOURCES}"]
        commands = {}
        for source in sorted(SOURCES.glob("*.cpp")) + sorted(SOURCES.glob("cpu/*.cpp")):
            variants = [("binding", [*includes, STABLE_ABI, "-DPy_LIMITED_API=0x030a0000", "-DFASTLLM_BINDING"])]
            if source.parent.name == "cpu":
                variants += [(isa, [f"-DFASTLLM_ISA={isa}", *flags]) for isa, flags in ISAS.items()]
            for variant, flags in variants:
                output = build_dir / f"{source.stem}.{variant}.o"
                if ISAS is X86_ISAS:
                    flags = [*flags, "-DFASTLLM_X86"]
                commands[output] = [*common, *flags, "-c", str(source), "-o", str(output), "-MMD"]
        objects = self.compile(commands)
        libraries = [f"-L{torch_dir}/lib", "-ltorch_cpu"]
        as_needed = [] if sys.platform == "darwin" else ["-Wl,--as-needed"]
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        self.run_all([[*compiler.split(), *shared, *objects, *as_needed, *libraries, "-o", str(target)]])

    def build_cuda(self, target, build_dir):
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise RuntimeError("nvcc is not on PATH")
        torch_dir, _ = find_torch()
        # The default three cover every NVIDIA chip from A100 on: each runs the code of an older minor version, and the
        # intermediate code of the last serves what is newer.
        chips = os.environ.get("FASTLLM_CUDA_ARCHITECTURES", ",".join(CUDA_ARCHITECTURES)).split(",")
        codes = [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
        codes.append(f"-gencode=arch=compute_{chips[-1]},code=compute_{chips[-1]}")
        flags = nvcc_flags(torch_dir)
        commands = {}
        for source in sorted(SOURCES.glob("cuda/*.cu")):
            output = build_dir / f"{source.stem}.cu.o"
            dependencies = ["-MMD", "-MF", str(output.with_suffix(".d"))]
            commands[output] = [nvcc, *codes, *flags, "-c", str(source), "-o", str(output), *dependencies]
        objects = self.compile(commands)
        # The current stream comes from libtorch_cuda.so. Where torch is a CPU build, a library of that name
        # stands in for it at link time, so that a machine without a GPU can make the wheel for one that has it.
        libraries = [f"-L{torch_dir}/lib", "-ltorch_cpu", "-ltorch_cuda"]
        if not (torch_dir / "lib/libtorch_cuda.so").exists():
            stand_in, stub = build_dir / "libtorch_cuda.so", build_dir / "libtorch_cuda.cpp"
            stub.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n')
            soname = "-Xlinker=-soname=libtorch_cuda.so"
            self.run_all([[nvcc, "-shared", "-Xcompiler=-fPIC", soname, str(stub), "-o", str(stand_in)]])
            libraries.insert(0, f"-L{build_dir}")
        # The CUDA runtime is linked statically: one binary for torch builds of any CUDA version.
        self.run_all([[nvcc, "-shared", "-cudart=static", "--no-device-link", *objects, *libraries, "-o", str(target)]])

    def compile(self, commands):
        """Runs those of {object file: command} whose result is not there already; returns all the object files."""
        if not commands:
            raise RuntimeError(f"no sources in {SOURCES.resolve()}")
        stale = {output: command for output, command in commands.items() if self.stale(output, command)}
        self.run_all(stale.values())
        for output, command in stale.items():
            output.with_suffix(".command").write_text(" ".join(command))
        return [str(output) for output in commands]

    @staticmethod
    def stale(output, command):
        """True when an object file is missing, older than anything it was made from, or made by another command."""
        dependencies, made_by = output.with_suffix(".d"), output.with_suffix(".command")
        if not output.exists() or not dependencies.exists() or not made_by.exists():
            return True
        if made_by.read_text() != " ".join(command):
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


def nvcc_flags(torch_dir):
    """All but the chips; `python -m bench static` reads them too, so that it looks at the very code that ships."""
    return [
        *("-O3", "-std=c++20", "-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", STABLE_ABI),
        *(f"-I{torch_dir}/include", f"-I{SOURCES}"),
    ]


def wants_cuda():
    asked = os.environ.get("FASTLLM_BUILD_CUDA")
    if asked is not None:
        return asked == "1"
    if shutil.which("nvcc") is None:
        return False
    try:
        return find_torch()[1].get("cuda") is not None
    except RuntimeError:
        return False


if __name__ == "__main__":
    extensions = [Extension("fastllm._C", [], py_limited_api=True)]
    if wants_cuda() and list(SOURCES.glob("cuda/*.cu")):
        extensions.append(Extension("fastllm._C_cuda", [], py_limited_api=True))
    setup(
        ext_modules=extensions,
        cmdclass={"build_ext": BuildKernels},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
