"""The stream suite, and the ways to read a long text that the evidence compares."""

import json

import pytest
import torch

from bench import __main__ as command
from bench import device, evidence, report, results, stream_cost, stream_quality, tiny_llama
from bench.streaming_nll import WAYS
from fastllm.streaming import StreamingCache
from tests.patching.models import llama, tokens
from tests.streaming import reference


@pytest.fixture
def small(monkeypatch):
    """The suite in seconds: nothing it finds means anything."""
    cpu = device.Cpu(cache_bytes=1 << 20, copied_bytes=1 << 20, matmul_size=64)
    monkeypatch.setattr(device, "find", lambda name: cpu)
    build = tiny_llama.build
    monkeypatch.setattr(tiny_llama, "build", lambda seed, hidden=0, layers=0: build(seed, hidden=32, layers=1))
    for name, value in {
        "STEPS": 4, "QUICK_STEPS": 4, "EVERY": 2, "LENGTH": 160, "ROWS": 1, "QUICK_ROWS": 1, "WATCHED_ROWS": 1, "FACTS_STEPS": 4,
        "FACTS_ROWS": 4, "BUCKETS": ((16, 128), (128, 160)), "DISTANCES": (48, 200),
    }.items():  # fmt: skip
        monkeypatch.setattr(stream_quality, name, value)
    monkeypatch.setattr(stream_cost, "QUICK_STREAM", 1100)


def test_the_suite_writes_a_record_that_pages_and_plots_read(tmp_path, capsys, small):
    file = tmp_path / "results" / "a" / "stream.json"
    file.parent.mkdir(parents=True)
    assert command.main(["stream", "--quick", "--json", str(file), "--plot", str(tmp_path)]) == 0
    record = json.loads(file.read_text())
    rows = record["cost"]["rows"]
    assert [row["length"] for row in rows] == [1024, 2048]
    assert results.read(file) == rows
    assert all(row["contestants"][0]["error"] < 1e-3 for row in rows)
    sizes = [{found["name"]: found["extra_bytes"] for found in row["contestants"]} for row in rows]
    assert sizes[0]["fastllm"] == sizes[1]["fastllm"]
    assert sizes[1]["eager"] > 1.9 * sizes[0]["eager"]
    streamed = record["cost"]["stream"]
    assert streamed["evicted"] == 1100 - 1024
    assert streamed["error"] < 1e-4
    run = record["quality"]["seeds"][0]
    assert [at["steps"] for at in run["bos"]["emergence"]] == [2, 4]
    assert set(run["bos"]["ways"]) - set(run["control"]["ways"]) == {"recomputed with BOS"}
    facts = record["facts"]["seeds"]
    assert [[len(run["found"][way]) for way in ("dense", "window", "sinks")] for run in facts] == [[2, 2, 2]]
    said = capsys.readouterr().out
    assert "sinks within 15 % of recomputing" in said
    assert "at least 20 times as fast" in said
    assert all((tmp_path / f"stream-{name}.png").stat().st_size for name in ("positions", "cost"))
    (docs := tmp_path / "docs").mkdir()
    report.write(tmp_path / "results", docs)
    page = (docs / "streaming-measured.md").read_text()
    for wanted in (
        "| sinks, not re-rotated |",
        "| window recomputed |",
        "| 1,000 |",
        "images/evidence/stream-cost.svg",
        "| sinks | ",
    ):
        assert wanted in page
    assert "stream" not in (docs / "benchmarks.md").read_text()
    assert report.check(tmp_path / "results", docs) == []


def test_one_part_leaves_the_other_as_it_was(tmp_path, small):
    file = tmp_path / "stream.json"
    file.write_text(json.dumps({"suite": "stream", "machine": {"date": "2026-01-02"}, "cost": {"as": "it was"}}))
    assert command.main(["stream", "--only", "quality", "--json", str(file)]) in (0, 1)
    record = json.loads(file.read_text())
    assert record["cost"] == {"as": "it was"}
    assert len(record["quality"]["seeds"]) == 3
    assert "facts" not in record
    del record["cost"]
    file.write_text(json.dumps(record))
    assert "positions" in evidence.page(file)
    file.write_text("[1]")
    with pytest.raises(SystemExit):
        command.main(["stream", "--only", "cost", "--json", str(file)])


def of_seed(**changes):
    """What a model might show: perplexities (16-128, then one past the context) by way."""
    bos = {
        "dense": (4.0, 16.0), "window": (4.0, 6.0), "sinks": (4.0, 5.0), "sinks, not re-rotated": (4.0, 6.0), "recomputed": (4.0, 6.0),
        "recomputed with BOS": (4.0, 5.1), "sinks, int8": (4.0, 5.0), "sinks, fp8": (4.0, 5.05),
    } | changes  # fmt: skip
    control = {"window": (4.0, 5.0), "sinks": (4.0, changes.get("control", 5.0))}
    bos.pop("control", None)
    return {
        kind: {"mass": {"mean": 0.1, "largest": 0.5}, "ways": {name: {"buckets": of} for name, of in ways.items()}}
        for kind, ways in (("bos", bos), ("control", control))
    }


def test_expectations_that_are_not_met_fail(monkeypatch):
    monkeypatch.setattr(stream_quality, "BUCKETS", ((16, 128), (512, 1024)))

    def held(facts=(1.0, 1.0, 0.1), **changes):
        found = {"dense": [facts[3] if len(facts) > 3 else 1.0, 1.0, 0.6], "sinks": list(facts[:3])}
        asked = {"distances": (48, 100, 400), "seeds": [{"found": found}]}
        checked = stream_quality.gates({"seeds": [of_seed(), of_seed(**changes)]}) + stream_quality.facts_gates(asked)
        return [gate["holds"] for gate in checked]

    assert all(held())
    for which, changes in enumerate((
        {"dense": (4.0, 11.0)}, {"recomputed with BOS": (4.0, 4.2)}, {"window": (4.0, 4.9)}, {"window": (4.0, 5.1)},
        {"sinks, not re-rotated": (4.0, 4.9)}, {"sinks, int8": (4.0, 5.1)}, {"sinks, fp8": (4.0, 5.2)}, {"control": 4.8},
        {"facts": (0.8, 1.0, 0.1, 0.8)}, {"facts": (1.0, 0.8, 0.1)}, {"facts": (1.0, 1.0, 0.6)},
    )):  # fmt: skip
        assert held(**changes)[which] is False


def test_a_stream_that_grows_or_lags_fails():
    def row(length, time, size=10, beside=1.0, again=30.0):
        times = {"fastllm": time, "StreamingCache, unpatched": time, "dense cache, as many keys, patched": time / beside,
                 "dense cache, as many keys": time / beside, "recomputed window": again * time}  # fmt: skip
        contestants = [{"name": n, "median_ms": t, "extra_bytes": size} for n, t in times.items()]
        return {"length": length, "contestants": contestants}

    def held(*rows, sizes=(10, 10), error=1e-6):
        stream = {"by_tokens": [{"tokens": 2000, "bytes": b} for b in sizes], "tokens": 5000, "error": error}
        return [gate["holds"] for gate in stream_cost.gates(rows, stream)]

    assert all(held(row(1, 1.0), row(9, 1.1)))
    assert held(row(1, 1.0), row(9, 1.3, beside=1.3))[0] is False
    assert held(row(1, 1.0), row(9, 1.0, size=11))[1] is False
    assert held(row(1, 1.0), row(9, 1.0), sizes=(10, 12))[1] is False
    assert held(row(1, 1.0, beside=1.06), row(9, 1.0, beside=1.06))[2] is False
    assert held(row(1, 1.0), row(9, 1.0, again=19.0))[3] is False
    assert held(row(1, 1.0), row(9, 1.0), error=1e-3)[4] is False


def test_a_model_is_watched_while_it_learns():
    seen = []
    model, texts = tiny_llama.build(0, hidden=32, layers=1), tiny_llama.texts(0, 1, 16)
    tiny_llama.tune(model, 5, texts, 1e-3, watch=lambda m, n: seen.append((n, m.training)), every=2)
    assert seen == [(2, False), (4, False), (5, False)]


def nll(logits, ids):
    return -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def test_every_way_to_read_a_text_is_what_its_name_says():
    model, ids = llama().eval(), tokens(2, 40)
    size, sinks = 12, 3
    found = {name: way(model, ids, size, sinks) for name, way in WAYS.items()}
    expected = {
        "sinks": nll(reference.logits(model, ids, sinks, size - sinks), ids),
        "window": nll(reference.logits(model, ids, 0, size), ids),
    }
    with torch.no_grad():
        expected["dense"] = nll(model(ids).logits, ids)
        for name, first in (("recomputed", 0), ("recomputed with BOS", 1)):
            rows = []
            for end in range(1, 40):
                text = ids[:, :end]
                if end > size:
                    text = torch.cat((ids[:, :first], ids[:, end - size + first : end]), 1)
                rows.append(-model(text).logits[:, -1].log_softmax(-1).gather(-1, ids[:, end : end + 1]))
            expected[name] = torch.cat(rows, 1)
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=0, atol=1e-4)
    unturned = found["sinks, not re-rotated"]
    torch.testing.assert_close(unturned[:, :size], expected["sinks"][:, :size], rtol=0, atol=1e-4)
    assert (unturned[:, size:] - expected["sinks"][:, size:]).abs().max() > 1e-3


@pytest.mark.parametrize("cache", [None, "streaming"])
def test_one_way_on_a_batch_is_it_on_each_row(cache):
    model, ids = llama().eval(), tokens(2, 40)
    from fastllm.streaming import token_nll

    def of(rows):
        return token_nll(model, rows, cache=StreamingCache(model, 3, 9) if cache else None)

    torch.testing.assert_close(of(ids), torch.cat([of(ids[:1]), of(ids[1:])]), rtol=0, atol=1e-5)
