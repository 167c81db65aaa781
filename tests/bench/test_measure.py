"""The harness: known times, bytes and memory are reported as they are, a wrong result is never timed."""

import itertools
import time

import pytest
import torch

from bench import device, measure
from bench.case import BOTH, FORWARD, Case, Missing

ROWS = 1 << 21  # 8 MiB of fp32
MS = 1e-3
SMALL = device.Cpu(cache_bytes=1 << 20, copied_bytes=1 << 20, matmul_size=64)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """No compiler, and by SMALL a small copy and a small cache: the harness is tested, not the machine."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def double(x):
    return 2 * x


def slow_double(seconds):
    def run(x):
        time.sleep(seconds)
        return 2 * x

    return run


def case(ours=double, peers=None, **more):
    given = {"passes": (FORWARD,), "eager": double, "exact": double} | more
    return Case("double", str(ROWS), lambda dtype: (torch.randn(ROWS).to(dtype),), ours, peers=peers or {}, **given)


def run(case, which=FORWARD, runs=3, dtype=torch.float32, on=SMALL):
    row = measure.run_case(case, dtype, which, runs, on)
    return row, {found["name"]: found for found in row["contestants"]}


def test_time_rate_and_ratio_of_a_known_sleep():
    row, found = run(case(slow_double(40 * MS), {"slower": lambda: slow_double(160 * MS)}))
    ours, slower = found["fastllm"], found["slower"]
    assert 40 <= ours["median_ms"] < 100
    assert ours["quartile_ms"][0] <= ours["median_ms"] <= ours["quartile_ms"][1]
    assert 1.6 < slower["ratio"] <= 4.2
    assert slower["ratio"] == pytest.approx(slower["median_ms"] / ours["median_ms"])
    assert row["bytes"] == 2 * 4 * ROWS
    assert ours["gb_per_s"] == pytest.approx(row["bytes"] / ours["median_ms"] * 1e-6)
    assert ours["share_of_limit"] == pytest.approx(row["limit_ms"] / ours["median_ms"])
    assert row["limit_ms"] == pytest.approx(row["bytes"] / row["copy_gb_per_s"] * 1e-6)
    assert ours["first_ms"] >= 40


def test_bytes_of_both_passes_and_of_a_reused_output():
    row, _ = run(case(), BOTH, dtype=torch.bfloat16)
    assert row["bytes"] == 5 * 2 * ROWS  # x, y; x, grad_y, grad_x

    def into(x, out):
        return torch.mul(x, 2, out=out)

    reused = Case(
        "double", "", lambda dtype: (torch.randn(ROWS), torch.empty(ROWS)), into, lambda x, out: out.copy_(2 * x),
        lambda x, out: 2 * x, passes=(FORWARD,),
    )  # fmt: skip
    row, found = run(reused)
    assert row["bytes"] == 2 * 4 * ROWS
    if found["fastllm"]["extra_bytes"] is not None:
        assert found["fastllm"]["extra_bytes"] < 2 << 20
        assert found["eager"]["extra_bytes"] > 6 << 20


def test_flops_set_the_limit_where_they_take_longer():
    row, found = run(case(flops=10**12))
    assert row["limited_by"] == "matmul"
    assert row["limit_ms"] == pytest.approx(1e12 / row["matmul_gflop_per_s"] * 1e-6)
    assert found["fastllm"]["gflop_per_s"] == pytest.approx(1e12 / found["fastllm"]["median_ms"] * 1e-6)


@pytest.mark.skipif(device.Cpu().reset_peak() is None, reason="the system tells no peak memory")
def test_peak_memory_counts_what_is_freed_again_and_the_result():
    def hungry(x):
        twice = torch.full((4 * ROWS,), 2.0)  # 32 MiB beside the result's 8
        return x * twice[:ROWS]

    extra = run(case(hungry))[1]["fastllm"]["extra_bytes"]
    assert 38 << 20 < extra < 46 << 20


@pytest.mark.parametrize(
    "ours",
    [
        lambda x: 2 * x + 1e-3,
        lambda x: torch.where(torch.arange(ROWS) == 7, torch.nan, 2 * x),
        lambda x: (2 * x)[:-1],
        lambda x: (2 * x, 2 * x),
    ],
    ids=["off", "nan", "shape", "count"],
)
def test_a_wrong_result_is_wrong_and_has_no_time(ours):
    found = run(case(ours))[1]
    assert found["fastllm"]["wrong"]
    assert "median_ms" not in found["fastllm"]
    assert "ratio" not in found["eager"]
    assert not run(case())[1]["fastllm"]["wrong"]


def test_a_wrong_gradient_is_wrong():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2.001 * grad

    assert run(case(Double.apply), BOTH)[1]["fastllm"]["wrong"]
    assert not run(case(Double.apply), FORWARD)[1]["fastllm"]["wrong"]


def test_a_missing_peer_is_named_with_its_reason():
    def absent():
        import no_such_library  # noqa: F401

    def refuses():
        raise Missing("needs a GPU")

    def breaks():
        def run(x):
            raise RuntimeError("cannot\nreally")

        return run

    found = run(case(peers={"absent": absent, "refuses": refuses, "breaks": breaks}))[1]
    assert found["absent"]["missing"] == "no_such_library is not installed"
    assert found["refuses"]["missing"] == "needs a GPU"
    assert found["breaks"]["missing"] == "RuntimeError: cannot"
    assert "median_ms" in found["fastllm"]


def test_contestants_take_turns_on_inputs_that_change():
    calls = []

    def recording(name):
        def run(x):
            calls.append((name, x.data_ptr()))
            return 2 * x

        return run

    run(case(recording("ours"), {"peer": lambda: recording("peer")}), runs=4)
    turns = [list(turn) for _, turn in itertools.groupby(calls, key=lambda call: call[0])]
    assert [turn[0][0] for turn in turns] == [
        "ours",
        "peer",
    ] * 7  # the first call, the warm-up, four turns, the memory of each
    timed = turns[4:-2]
    assert all(len(turn) > 1 for turn in timed), "what is as quick as this is called several times in a turn"
    ours = [pointer for turn in timed for name, pointer in turn if name == "ours"]
    assert all(a != b for a, b in itertools.pairwise(ours))
