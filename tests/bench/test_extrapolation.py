"""The experiment on reading further: its rows, its models, its expectations, its page."""

import json

import pytest
import torch

from bench import evidence, extrapolation, report, tiny_llama

transformers = pytest.importorskip("transformers")


def found(zero_shot, tuned, recall=(1.0, 1.0, 0.5, 0.0, 0.0), cached=1e-6):
    def of(last):
        return {"buckets": [3.0, 3.5, 4.0, last], "curve": [3.0] * 24}

    return {"zero_shot": of(zero_shot), "tuned": of(tuned), "recall": list(recall), "cached_differs_by": cached}


def record(steps=extrapolation.STEPS, **changes):
    last = {
        "none": (16.0, 5.0),
        "linear": (28.0, 9.0),
        "ntk": (10.0, 4.2),
        "dynamic": (8.0, 4.1),
        "yarn": (5.0, 3.8),
    } | changes
    run = {"seed": 0, "steps": steps, "recall_steps": 9, "methods": {name: found(*of) for name, of in last.items()}}
    machine = {"cpu": "A CPU", "threads": 2, "instruction_set": "avx2", "forced_backend": None, "commit": "0" * 40,
               "command": "python -m bench extrapolation", "date": "2026-01-02", "torch": "2.13.0", "triton": None,
               "transformers": "5.0", "liger-kernel": None}  # fmt: skip
    return {
        "suite": "extrapolation", "context": 128, "length": 1024, "buckets": extrapolation.BUCKETS,
        "distances": extrapolation.DISTANCES, "rows": 64, "recall_rows": 64, "tuning_steps": 40, "seeds": [run],
        "gates": extrapolation.gates([run]), "seconds": 600.0, "machine": machine,
    }  # fmt: skip


def test_rows_hold_what_they_say():
    rows = tiny_llama.asked(5, 100)
    assert rows.shape == (5, 8 + 100 + 4)
    assert (rows[:, 0] == tiny_llama.BOS).all()
    assert torch.equal(rows[:, 8:12], rows[:, -4:])  # the fact, and the question with its answer
    others = torch.cat((rows[:, 8 + 33 : 8 + 37], rows[:, 8 + 66 : 8 + 70]), 1)
    assert (others[:, [2, 6]] != rows[:, 10:11]).all()  # of other keys
    ids, labels = tiny_llama.facts(0, 6, 128)()
    asked = labels != -100
    assert asked.any(1).all()
    for row, at in asked.nonzero().tolist():
        key, value = ids[row, at - 1], ids[row, at]
        told = [n for n in range(3, at - 3) if ids[row, n - 2] == ord("@") and ids[row, n - 1] == key]
        assert any(ids[row, n] == value for n in told)
        assert labels[row, at] == value
    ids, labels = tiny_llama.texts(0, 4, 64)()
    assert torch.equal(ids, labels)
    assert torch.equal(tiny_llama.held_out(3, 50), tiny_llama.held_out(3, 50))


def test_a_model_learns_and_its_losses_are_those_of_its_logits():
    model = tiny_llama.build(0, hidden=32, layers=1)
    rows = tiny_llama.held_out(4, 64)
    before = tiny_llama.losses(model, rows)
    with torch.no_grad():
        logits = model(input_ids=rows).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
    torch.testing.assert_close(before.double(), expected, rtol=1e-4, atol=1e-4)
    assert tiny_llama.tune(model, 20, tiny_llama.texts(0, 8, 64), 3e-3) == 20
    assert tiny_llama.losses(model, rows).mean() < before.mean() - 0.5
    assert "forward" not in model.model.layers[0].self_attn.__dict__  # patched while it learned, and no longer


def test_tuning_ends_when_the_loss_is_low_enough():
    model = tiny_llama.build(0, hidden=32, layers=1)
    assert tiny_llama.tune(model, 200, tiny_llama.texts(0, 1, 16), 1e-3, until=100.0) == 50


@pytest.mark.parametrize("name", extrapolation.METHODS)
def test_every_method_extends_and_its_cache_agrees(name):
    model = extrapolation.extended(tiny_llama.build(0, hidden=64, layers=2).eval(), name)
    rows = tiny_llama.held_out(1, 160)
    assert extrapolation.cached_differs_by(model, rows, prompt=120, every=10) < 1e-4
    losses = extrapolation.by_position(model, name, tiny_llama.held_out(1, extrapolation.LENGTH))
    assert losses.shape == (1, extrapolation.LENGTH - 1)
    assert losses.isfinite().all()


def test_expectations_that_are_not_met_fail():
    assert all(gate["holds"] for gate in record()["gates"])
    for changed, which in (({"none": (8.5, 5.0)}, 0), ({"yarn": (8.1, 3.8)}, 1), ({"ntk": (10.0, 5.1)}, 2),
                           ({"none": (16.0, 5.0, (1.0, 0.5, 0, 0, 0))}, 4), ({"ntk": (10.0, 4.2, (1.0,) * 5, 1e-3)}, 3)):  # fmt: skip
        assert [gate["holds"] for gate in record(**changed)["gates"]][which] is False
    for perplexity, holds in ((8.5, True), (4.0, False)):  # a quick training is lost less far
        gates = record(extrapolation.QUICK_STEPS, none=(perplexity, 5.0))["gates"]
        assert gates[0]["holds"] is holds


def test_the_page_says_what_the_record_says(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    (results / "a").mkdir(parents=True)
    docs.mkdir()
    (results / "a" / "extrapolation.json").write_text(json.dumps(record()))
    report.write(results, docs)
    said = (docs / "extrapolation.md").read_text()
    for wanted in ("| yarn | 3.00 | 3.50 | 4.00 | 5.00 |", "| linear | 3.00 | 3.50 | 4.00 | 9.00 |", "- holds: as they are", "50%",
                   "A CPU", "images/evidence/extrapolation-positions.svg"):  # fmt: skip
        assert wanted in said
    assert report.check(results, docs) == []
    (docs / "extrapolation.md").write_text(said.replace("5.00", "4.00"))
    assert report.check(results, docs) == ["docs/extrapolation.md"]
    (results / "a" / "extrapolation.json").write_text("[]")
    with pytest.raises(report.Unreadable):
        evidence.files(results)
