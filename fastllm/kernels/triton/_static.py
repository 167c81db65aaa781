"""Compiles the shipped configurations for a chip that need not be present, and reads what the compiler made of them."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import fastllm.kernels.triton as kernels
from fastllm.kernels.triton._launch import Configuration

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Compiled:
    """What one block of a kernel takes: threads, registers and spilled bytes of each, bytes of shared memory, columns
    of tensor memory. code is PTX or AMD assembly.
    """

    threads: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int
    code: str = field(repr=False)
    cubin: bytes = field(repr=False, default=b"")

    @cached_property
    def assembly(self) -> str:
        """What the chip executes: SASS or AMD assembly."""
        if not self.cubin:
            return self.code
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            return tool("nvdisasm", "-c", "-ndf", file.name)  # without its analysis of the data flow: faster


def shipped() -> Iterator[Configuration]:
    """Every configuration of every kernel file."""
    for info in pkgutil.iter_modules(kernels.__path__):
        if not info.name.startswith("_"):
            yield from importlib.import_module(f"fastllm.kernels.triton.{info.name}").configurations()


def compile_for(configuration: Configuration, target: str) -> Compiled:
    """Builds one configuration for one of TARGETS.

    Pointers are taken as 16-byte aligned, as torch's allocators give them, so that loads may be vectorised.
    """
    names = list(configuration.kernel.arg_names)
    types = {n: "constexpr" if n in configuration.constants else configuration.signature[n] for n in names}
    signature = {n: t.removesuffix(":16") for n, t in types.items()}
    aligned = [t.startswith("*") or t.endswith(":16") for t in types.values()]
    attributes = {(i,): [["tt.divisibility", 16]] for i, is_aligned in enumerate(aligned) if is_aligned}
    source = ASTSource(
        fn=configuration.kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in configuration.constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": configuration.num_warps, "num_stages": configuration.num_stages}
    if target.startswith("gfx"):
        options["num_warps"] = max(1, configuration.num_warps // 2)  # a wavefront is two warps wide
    built = triton.compile(source, target=TARGETS[target], options=options)
    if target.startswith("gfx"):
        text = built.asm["amdgcn"]
        return Compiled(
            threads=_number(r"\.max_flat_workgroup_size:\s+(\d+)", text),
            registers=_number(r"\.vgpr_count:\s+(\d+)", text),
            # Scalar registers that are kept in lanes of vector registers, as the compiler does first, cost no memory.
            spilled_bytes=max(
                4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text),
                _number(r"\.private_segment_fixed_size:\s+(\d+)", text),
            ),
            shared_bytes=built.metadata.shared,
            tensor_columns=0,
            code=text,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "--dump-resource-usage", file.name)
    # Local memory beyond the arrays that the kernel declares is spill. Sine and cosine of large angles declare one.
    arrays = sum(map(int, re.findall(r"\.local .*\[(\d+)\];", built.asm["ptx"])))
    local = _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)
    return Compiled(
        threads=_number(r"\.reqntid (\d+)", built.asm["ptx"]),
        registers=_number(r"REG:(\d+)", usage),
        spilled_bytes=max(0, local - (arrays + 15) // 16 * 16),
        shared_bytes=built.metadata.shared,
        tensor_columns=getattr(built.metadata, "tmem_size", None) or 0,
        code=built.asm["ptx"],
        cubin=built.asm["cubin"],
    )


def tool(name: str, *arguments: str) -> str:
    """What one of the CUDA programs that come with triton prints."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([str(path), *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}")
    return int(found.group(1))
