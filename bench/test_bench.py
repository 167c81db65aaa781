"""The cases of every suite under pytest-benchmark: ``pytest bench/ --benchmark-only``; -k chooses, as in
``-k "rms_norm and bf16 and cpu"``. `make test` leaves this file out.

Where there is a GPU, its times are those of the host until the GPU is done, with the launches that
``python -m bench kernels --device cuda`` leaves out.
"""

from __future__ import annotations

import pytest
import torch

from bench import attention, device, kernels, loss, machine, measure, rl, suite
from bench.case import Missing

CASES = list({id(case): case for case in (*kernels.CASES, *attention.CASES, *loss.CASES, *rl.CASES)}.values())
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ROWS = [
    pytest.param((case, dtype, which, on), id=f"{case.label(dtype, which)} {on}")
    for on in DEVICES
    for case in CASES
    for dtype in case.dtypes
    for which in case.passes
]
NAMES = list(dict.fromkeys(name for case in CASES for name in case.contestants()))


@pytest.fixture(scope="module")
def row(request):
    """The row and its inputs, made once for all its contestants."""
    case, dtype, which, name = request.param
    on = device.find(name)
    return case, dtype, which, on, measure.input_sets(case, dtype, which, on)


@pytest.mark.parametrize("row", ROWS, indirect=True)
@pytest.mark.parametrize("name", NAMES)
def test_case(row, name, benchmark):
    case, dtype, which, on, sets = row
    build = case.contestants().get(name)
    if build is None:
        pytest.skip("no contestant of this case")
    torch._dynamo.reset()
    try:
        function = build()
        result = measure.tensors(measure.call(function, *sets[0]))
    except (Missing, ImportError) as error:
        pytest.skip(measure.reason(error))
    if name == "fastllm":
        results = {name: result, "eager": measure.tensors(measure.call(case.eager, *sets[0]))}
        found: dict[str, measure.Row] = {"fastllm": {}, "eager": {}}
        measure.check(case, sets[0], dtype, results, found)
        assert not found[name]["wrong"], f"error {found[name]['error']:.1e}, allowed {found[name]['allowed']:.1e}"
    run = measure.bound(function, sets)

    def timed():
        run()
        on.wait()

    benchmark.group = f"{case.label(dtype, which)} {on.name}"
    benchmark.extra_info |= machine.describe(on)
    benchmark.pedantic(timed, rounds=suite.RUNS, warmup_rounds=1)
