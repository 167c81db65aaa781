"""A sample of the sweep over all families; `make sweep` runs all of them."""

import importlib

import pytest

from fastllm.patching import sweep

SAMPLE = (
    "llama",
    "falcon",
    "gptj",
    "olmo2",
    "deepseek_v3",
    "gemma3n_text",
    "mamba",
    "opt",
    "gpt_oss",
    "stablelm",
    "bart",
)


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_matches_or_says_why_not(family):
    result = sweep.check(family)
    assert result.status != "wrong", result.reason
    if result.status == "matches":
        assert result.layers_patched == result.layers
    else:
        assert result.reason


def test_the_kept_table_has_at_least_130_families_and_none_wrong():
    text = (sweep.Path(__file__).parents[2] / "docs/families.md").read_text()
    rows = [line.split("|")[2].strip() for line in text.splitlines() if line.startswith("| ") and "family" not in line]
    assert sum(status.startswith("matches") for status in rows) >= 130
    assert not any(status.startswith("wrong") for status in rows)


def test_a_wrong_family_is_caught(monkeypatch):
    from fastllm import ops

    right = ops.rms_norm
    monkeypatch.setattr(ops, "rms_norm", lambda *a, **k: right(*a, **k) * 1.01)
    assert sweep.check("llama").counts.get("rms_norm", 0) == 0  # verification puts such a norm back
    monkeypatch.setattr(ops, "rms_norm", right)
    monkeypatch.setattr(importlib.import_module("fastllm.patching.patch"), "_verify", lambda *_: "")
    from fastllm.patching.rules import rope

    for name in ("apply_rope", "rope"):
        monkeypatch.setattr(rope.ops, name, lambda q, k, *_, **__: (q, k))
    rope._layout.cache_clear()
    monkeypatch.setattr(rope, "_layout", lambda _: "half")
    assert sweep.check("llama").status == "wrong"
