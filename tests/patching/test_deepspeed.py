"""A patched model under DeepSpeed ZeRO-2 and ZeRO-3 on two CPU ranks trains as the unpatched one does."""

from pathlib import Path

import pytest

from tests.ranks import run_on_two

pytest.importorskip("deepspeed", reason="the ZeRO claim needs DeepSpeed; the dev extra installs it")


@pytest.mark.slow
def test_zero_2_and_3_train_alike_patched_before_and_after_initialize():
    results, said = run_on_two(Path(__file__).parent / "deepspeed_worker.py", launcher="torchrun")
    assert {(r["stage"], r["rank"]) for r in results} == {(2, 0), (2, 1), (3, 0), (3, 1)}, said
    for result in results:
        plain = result["losses"]["plain"]
        for when in ("before", "after"):
            assert result["losses"][when] == pytest.approx(plain, rel=1e-5), (result["stage"], when)
            assert result["counts"][when].get("rms_norm", 0) == 5, result["counts"]
