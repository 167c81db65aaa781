"""Devices: the GPU's clock and memory by the calls they are read with, inputs where they belong."""

import pytest
import torch
import torch.nn.functional as F

from bench import attention, device, kernels, loss, measure, rl
from bench.case import BOTH, FORWARD, Case

SMALL = {"cache_bytes": 1 << 20, "copied_bytes": 1 << 20, "matmul_size": 64}


@pytest.fixture
def calls(monkeypatch):
    """torch.cuda without a GPU: notes what is asked of it."""
    noted = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            noted.append("record")

        def elapsed_time(self, end):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: noted.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: noted.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: noted.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: noted.append("peak") or 350)
    return noted


def test_a_gpu_is_timed_by_events_around_the_call_with_the_host_ahead(calls):
    assert device.Cuda(**SMALL).seconds(lambda: calls.append("run")) == 7e-3
    assert calls == ["sleep", "record", "run", "record", "wait"]


def test_memory_of_a_gpu_is_the_growth_of_its_peak_once_it_is_done(calls):
    assert device.Cuda(**SMALL).peak_extra(lambda: calls.append("run")) == 250
    assert calls == ["wait", "reset", "run", "wait", "peak"]


@pytest.mark.parametrize(
    "case",
    {id(case): case for case in (*kernels.CASES, *attention.CASES, *loss.CASES, *rl.CASES)}.values(),
    ids=lambda c: c.op + " " + c.shape,
)
def test_every_case_makes_its_inputs_on_the_device_asked_for(case):
    """The meta device stands for any other than the CPU."""
    (first, *_), *others = measure.input_sets(case, torch.bfloat16, FORWARD, device.Cpu(cache_bytes=1, name="meta"))
    assert others
    assert all(value.device.type == "meta" for value in first if isinstance(value, torch.Tensor))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_case_on_a_gpu():
    on = device.find("cuda")
    case = Case("silu", "", lambda dtype: (torch.randn(1 << 24).to(dtype),), F.silu, F.silu, F.silu)
    row = measure.run_case(case, torch.bfloat16, BOTH, 5, on)
    ours = row["contestants"][0]
    assert 0.2 < ours["share_of_limit"] < 1.5
    assert ours["extra_bytes"] >= 2 * (2 << 24)
    assert on.describe()["gpu"]
    assert on.describe()["driver"]
