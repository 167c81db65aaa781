"""A head whose weights ZeRO-3 partitions, given as a module, trains by linear_ppo_loss as by its logits."""

from pathlib import Path

import pytest

from tests.ranks import run_on_two

pytest.importorskip("deepspeed", reason="the ZeRO claim needs DeepSpeed; the dev extra installs it")
pytest.importorskip("peft", reason="the claim on adapters needs PEFT; the dev extra installs it")


@pytest.mark.slow
def test_a_partitioned_head_trains_as_by_its_logits_with_and_without_adapters():
    results, said = run_on_two(Path(__file__).parent / "zero3_worker.py", launcher="torchrun")
    cases = {"token plain", "sequence lora"}
    assert {(r["case"], r["rank"]) for r in results} == {(c, r) for c in cases for r in (0, 1)}, said
    for result in results:
        assert len(set(result["logits"])) == 3, "the weights have to move for this to mean anything"
        assert result["linear"] == pytest.approx(result["logits"], rel=1e-5), result["case"]
