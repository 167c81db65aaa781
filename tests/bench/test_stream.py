"""The stream suite, and the ways to read a long text that the evidence compares."""

import json

import pytest
import torch

from bench import __main__ as command
from bench import device
from bench.streaming_nll import WAYS
from fastllm.streaming import StreamingCache
from tests.patching.models import llama, tokens
from tests.streaming import reference


def test_the_suite_writes_rows_that_plots_and_reports_read(tmp_path, capsys, monkeypatch):
    small = device.Cpu(cache_bytes=1 << 20, copied_bytes=1 << 20, matmul_size=64)
    monkeypatch.setattr(device, "find", lambda name: small)
    file = tmp_path / "stream.json"
    assert command.main(["stream", "--quick", "--json", str(file), "--plot", str(tmp_path)]) == 0
    rows = json.loads(file.read_text())
    assert [row["length"] for row in rows] == [1024, 2048]
    assert all(row["contestants"][0]["error"] < 1e-3 for row in rows)
    assert "recomputing the window takes" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "stream-length.png").stat().st_size
    sizes = [{found["name"]: found["extra_bytes"] for found in row["contestants"]} for row in rows]
    assert sizes[0]["fastllm"] == sizes[1]["fastllm"]
    assert sizes[1]["eager"] > 1.9 * sizes[0]["eager"]


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
