"""``python -m bench static``: what it reports of kernels, what it finds fault with, what it says when called wrongly.

It runs in a process of its own: this one may have triton in interpreter mode, where nothing is compiled. That all
shipped kernels are without a fault is checked by `.ci/run`.
"""

import collections
import json
import os
import subprocess
import sys

import pytest

from bench import disassembly
from bench.chips import CHIPS, Peak

pytest.importorskip("triton")
from bench import nvcc
from fastllm.kernels.triton import _static

TARGETS = {"sm_80", "sm_90", "sm_100", "gfx942"}
OWN = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
needs_nvcc = pytest.mark.skipif(bool(nvcc.missing("sm_90")), reason=f"{nvcc.missing('sm_90')}")


def run(module, *arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=inherited | environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """What is said of the kernels of static_kernels.py, and {(kernel, target): row}."""
    path = tmp_path_factory.mktemp("static") / "rows.json"
    done = run("tests.bench.static_kernels", "--json", path)
    assert done.returncode == 1, done.stderr
    rows = json.loads(path.read_text())
    return done.stdout, {(row["kernel"], row["target"]): row for row in rows}


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("hoarder", "spills"),
        ("copy as matrix", "is a matrix kernel without {own}"),
        ("large tiles", "bytes of shared memory, a block may have {shared}"),
        ("no power of two", "does not compile: CompilationError: at 2:41: arange's range must be a power of 2"),
    ],
)
@pytest.mark.parametrize("target", sorted(TARGETS))
def test_a_fault_is_found_and_named_in_one_line(made_up, kernel, fault, target):
    said, rows = made_up
    fault = fault.format(own=OWN[target], shared=CHIPS[target].shared_of_block)
    assert fault in "; ".join(rows[kernel, target]["faults"])
    (line,) = [line for line in said.splitlines() if line.startswith(f"FAULT {kernel} on {target}: ")]
    assert fault in line


def test_the_matrix_instructions_of_an_older_chip_are_no_excuse(made_up):
    _, rows = made_up
    faults = {target: rows["small tiles", target]["faults"] for target in TARGETS}
    assert "is a matrix kernel without HGMMA (it has HMMA)" in faults["sm_90"]  # and Triton 3.9 makes it spill
    assert "is a matrix kernel without UTCHMMA (it has HMMA)" in faults["sm_100"]
    assert faults["sm_80"] == faults["gfx942"] == []


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_sound_kernels_have_no_fault_and_tell_what_they_do(made_up, target):
    _, rows = made_up
    matmul, copy = rows["matmul", target], rows["copy", target]
    assert matmul["faults"] == copy["faults"] == []
    assert all(name.startswith(OWN[target]) for name in matmul["matrix_instructions"])
    assert sum(matmul["matrix_instructions"].values()) > 0 == sum(copy["matrix_instructions"].values())
    assert set(matmul["loads"]) == set(copy["loads"]) == set(copy["stores"]) == {"16"}
    assert matmul["shared_bytes"] > copy["shared_bytes"] == 0
    assert 0 < matmul["occupancy"] < copy["occupancy"] == 1.0
    assert copy["threads"] == 128
    assert {"torch", "triton", "commit"} <= set(copy["machine"])


def test_the_table_shows_every_kernel_for_every_chip(made_up):
    said, rows = made_up
    assert {target for _, target in rows} == TARGETS
    for name in ("hoarder", "copy as matrix", "large tiles", "matmul"):
        assert sum(line.startswith(name) for line in said.splitlines()) == len(TARGETS)
    assert "µs H100/H200" in said
    faults = sum(bool(row["faults"]) for row in rows.values())
    assert said.splitlines()[-1] == f"{len(rows)} compiled, {faults} with a fault"
    assert len([line for line in said.splitlines() if line.startswith("FAULT ")]) == faults


def test_the_time_at_the_published_peak_is_bytes_or_flops_whichever_takes_longer(made_up):
    _, rows = made_up
    assert rows["copy", "sm_90"]["us_at_published_peak"] == pytest.approx({"H100": 1e3 / 3.35, "H200": 1e3 / 4.8})
    assert "us_at_published_peak" not in rows["hoarder", "sm_90"]
    assert Peak(2e12, 3e14).seconds(1e9, 1e9) == 0.5e-3
    assert Peak(2e12, 3e14).seconds(1e9, 3e12) == 1e-2


# Each expectation was worked out by hand from the chip's limits.
@pytest.mark.parametrize(
    ("target", "block", "share"),
    [
        ("sm_80", {"threads": 256, "registers": 32}, 1),  # 512 / 32 = 16 warps a scheduler
        ("sm_80", {"threads": 128, "registers": 64}, 32 / 64),  # 8 warps a scheduler
        ("sm_80", {"threads": 256, "registers": 65}, 24 / 64),  # 72 taken: 7 a scheduler, 28, three blocks of 8
        ("sm_80", {"threads": 1024, "registers": 33}, 32 / 64),  # 40 taken: 12 a scheduler, 48, one block of 32
        ("sm_80", {"threads": 1024, "registers": 65}, 0),  # 8 warps a scheduler needed, 7 fit
        ("sm_80", {"threads": 32, "registers": 16}, 32 / 64),  # 32 blocks
        ("sm_80", {"threads": 128, "registers": 32, "shared": 48 << 10}, 12 / 64),  # 49 kB taken, three times in 164
        ("sm_90", {"threads": 128, "registers": 32, "shared": 48 << 10}, 16 / 64),  # four times in 228
        ("sm_80", {"threads": 128, "registers": 32, "shared": 163 << 10}, 4 / 64),
        ("sm_80", {"threads": 128, "registers": 32, "shared": (163 << 10) + 1}, 0),
        ("sm_90", {"threads": 384, "registers": 168}, 12 / 64),  # 3 warps a scheduler: one block of 12
        ("sm_100", {"threads": 128, "registers": 32, "tensor_columns": 256}, 8 / 64),  # two of 256 in 512
        ("gfx942", {"threads": 256, "registers": 128}, 16 / 32),  # 4 wavefronts a scheduler
        ("gfx942", {"threads": 256, "registers": 129}, 12 / 32),  # 136 taken: 3
        ("gfx942", {"threads": 128, "registers": 24}, 1),  # 16 blocks of two wavefronts
        ("gfx942", {"threads": 64, "registers": 24}, 1),  # a single wavefront needs no barrier
        ("gfx942", {"threads": 128, "registers": 24, "shared": 32 << 10}, 4 / 32),  # two blocks
    ],
)
def test_occupancy(target, block, share):
    assert CHIPS[target].occupancy(**block) == share


def test_instructions_are_read_from_sass():
    found = disassembly.read("""
        /*0080*/                   LDG.E.128 R8, desc[UR6][R2.64] ;
        /*0090*/               @P0 LDG.E.U16.CONSTANT R4, desc[UR6][R2.64] ;
        /*00a0*/              @!P1 LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR6][R2.64] ;
        /*00b0*/                   LDG.E.ENL2.256 R8, R12, desc[UR6][R2.64] ;
        /*00c0*/              @UP2 UTMALDG.2D [UR8], [UR4] ;
        /*00d0*/                   LDGDEPBAR ;
        /*00e0*/                   STG.E desc[UR6][R2.64], R8 ;
        /*00f0*/                   UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR4, UR8 ;
        /*10d70*/                  UTCHMMA gdesc[UR4], gdesc[UR16], tmem[UR8], tmem[UR34], idesc[UR35], !UPT ;
        /*10e70*/                  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
""")
    assert found.loads == collections.Counter({16: 2, 2: 1, 32: 1, "TMA": 1})
    assert found.stores == {4: 1}
    assert found.matrix == {"UTCHMMA": 1, "HMMA": 1}


def test_instructions_are_read_from_amd_assembly():
    found = disassembly.read("""
	global_load_dwordx4 v[2:5], v1, s[2:3]
	buffer_load_ushort v1, v2, s[4:7], 0 offen
	global_load_lds_dwordx4 v1, s[2:3]
	global_store_short_d16_hi v1, v2, s[2:3]
	s_load_dwordx8 s[4:11], s[0:1], 0x8
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	; global_load_dword
""")
    assert found.loads == {16: 2, 2: 1}
    assert found.stores == {2: 1}
    assert found.matrix == {"v_mfma_f32_32x32x8_bf16": 1}


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) hoarder(float* x) {
  float held[64], sum = 0.f;
  for (int i = 0; i < 64; ++i) sum += held[i] = x[threadIdx.x + i * 1024];
  sum = __shfl_xor_sync(0xffffffffu, sum, 1);
  for (int i = 0; i < 64; ++i) x[threadIdx.x + i * 1024] = held[i] * sum;
}
__global__ void __launch_bounds__(64) doubled(float4* x) {
  float4 v = x[threadIdx.x];
  __shared__ float last[25];
  last[threadIdx.x % 25] = v.w;
  __syncthreads();
  x[threadIdx.x] = make_float4(2 * v.x, 2 * v.y, 2 * v.z, last[threadIdx.x % 7]);
}
"""


@needs_nvcc
def test_nvcc_s_kernels_are_read_one_by_one(tmp_path):
    source = tmp_path / "two.cu"
    source.write_text(SPILLING)
    hoarder, doubled = sorted(nvcc.compile_for(source, "sm_90"), key=lambda kernel: -kernel.threads)
    assert hoarder.spilled_bytes > 0 == doubled.spilled_bytes
    assert (hoarder.name, hoarder.threads, hoarder.registers) == ("hoarder", 1024, 32)
    assert (doubled.name, doubled.threads, doubled.shared_bytes) == ("doubled", 64, 100)
    assert disassembly.read(doubled.assembly).loads == {16: 1}
    source.write_text("__global__ void broken() { nonsense(); }\n")
    with pytest.raises(RuntimeError, match="nonsense"):
        list(nvcc.compile_for(source, "sm_90"))


@needs_nvcc
def test_the_cuda_kernels_are_compiled_as_they_ship(tmp_path):
    path = tmp_path / "rows.json"
    done = run("bench", "static", "--target", "sm_90", "--match", "rms_norm.cu forward_kernel", "--json", path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["kernel"]: row for row in json.loads(path.read_text())}
    row = rows["rms_norm.cu forward_kernel<bf16, 8, 2>"]
    assert row["compiler"] == f"nvcc {nvcc.version()}"
    assert row["threads"] == 512
    assert 0 < row["registers"] <= 128
    assert row["loads"]["16"] > 0
    assert all(0 < row["occupancy"] <= 1 for row in rows.values())


def test_a_missing_nvcc_is_said_and_no_fault(tmp_path):
    arguments = ("--target", "sm_90", "--match", "rms_norm forward bf16", "--quiet")
    done = run("bench", "static", *arguments, PATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rms_norm.cu on sm_90: not compiled: nvcc missing" in done.stdout.splitlines()


def test_an_nvcc_that_is_too_old_for_a_chip_is_said_and_no_fault(tmp_path):
    old = tmp_path / "nvcc"
    old.write_text("""#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 12.4, V12.4.99"; else echo "sm_90"; fi
""")
    old.chmod(0o755)
    arguments = ("--target", "sm_100", "--match", "rms_norm forward bf16", "--quiet")
    done = run("bench", "static", *arguments, PATH=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rms_norm.cu on sm_100: not compiled: nvcc 12.4.99 does not know sm_100" in done.stdout.splitlines()


def test_no_two_shipped_configurations_share_a_label():
    labels = [configuration.label for configuration in _static.shipped()]
    assert len(labels) == len(set(labels)) > 50
    assert all(labels)


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--target", "sm_70"], {}, "sm_70"),
        (["--match", "no such kernel", "--target", "gfx942"], {}, "no kernel's label contains 'no such kernel'"),
        (["--json", "/no/such/folder/rows.json"], {}, "cannot write /no/such/folder/rows.json"),
        ([], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ],
)
def test_a_wrong_call_is_one_line_and_exit_code_2(arguments, environment, said):
    done = run("bench", "static", *arguments, **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_kernel_on_which_the_compiler_crashes_is_a_fault_of_that_kernel_alone():
    done = run("tests.bench.static_kernels", "--crash", "--target", "sm_90", "--match", "copy")
    lines = done.stdout.splitlines()
    assert "FAULT copy on sm_90: does not compile: the compiler crashed" in lines, done.stderr
    assert done.returncode == 1
    assert lines[-1] == "2 compiled, 2 with a fault"  # the other one is "copy as matrix"
