"""docs/benchmarks.md is what the committed results say, and nothing in it could be typed unnoticed."""

import json

import pytest

from bench import report, rules
from tests.bench.rows import row, steps, wrong

DEMO = {
    "machine": steps()[0]["machine"],
    "rows": [["final loss", "2.15", "2.15", "same"]],
    "sentence": "The curves differ by at most 1e-7.",
    "runs": {side: {"losses": [5.0, 4.0, 3.0], "blocks": [[0.5, 0.5], [0.5]]} for side in ("unpatched", "patched")},
}
KERNELS = [
    row(fastllm=2.0, eager=6.0, torch_compile=3.0, missing=("liger",)),
    wrong(row("swiglu", fastllm=1.0, eager=4.0)),
]


@pytest.fixture
def folders(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    docs.mkdir()
    for device, name, rows in (("a", "kernels", KERNELS), ("a", "train", steps()), ("b", "demo", DEMO)):
        (results / device).mkdir(parents=True, exist_ok=True)
        (results / device / f"{name}.json").write_text(json.dumps(rows))
    report.write(results, docs)
    return results, docs


def test_the_committed_page_is_what_the_committed_results_say():
    assert report.main(["--check"]) == 0, "run `make docs`"


def test_the_page_holds_every_number_with_its_machine(folders):
    results, docs = folders
    said = (docs / "benchmarks.md").read_text()
    for wanted in (
        "## A CPU, 4 cores", "torch 2.13.0", "commit 0123456789ab", "`python -m bench kernels`", "2026-01-02", "3.00×",
        "2.00 | 1.96–2.04", "50%", "**WRONG**", "liger: not installed", "2.00×", "1000 (0.50×)", DEMO["sentence"],
        "images/benchmarks/a/kernels-limit.svg", "images/benchmarks/b/demo-curves.svg",
    ):  # fmt: skip
        assert wanted in said
    assert report.check(results, docs) == []
    assert said == report.page(results)


def test_a_number_typed_by_hand_is_found(folders):
    results, docs = folders
    page = docs / "benchmarks.md"
    page.write_text(page.read_text().replace("3.00× |", "9.00× |"))
    assert report.check(results, docs) == ["docs/benchmarks.md"]


def test_results_newer_than_the_page_and_its_pictures_are_found(folders):
    results, docs = folders
    (results / "a" / "train.json").write_text(json.dumps(steps(patched=1.0)))
    assert report.check(results, docs) == ["docs/benchmarks.md", "docs/images/benchmarks/a/train-steps.svg"]
    report.write(results, docs)
    assert report.check(results, docs) == []


def test_pictures_missing_or_left_over_are_found(folders):
    results, docs = folders
    (docs / "images" / "benchmarks" / "b" / "demo-curves.svg").unlink()
    (docs / "images" / "benchmarks" / "b" / "old.svg").write_text("")
    assert report.check(results, docs) == [
        "docs/images/benchmarks/b/demo-curves.svg",
        "docs/images/benchmarks/b/old.svg (left over)",
    ]
    report.write(results, docs)
    assert report.check(results, docs) == []


@pytest.mark.parametrize("gone", ["a/kernels", "a/train", "b/demo"])
def test_any_file_may_be_absent(folders, gone):
    results, docs = folders
    (results / f"{gone}.json").unlink()
    report.write(results, docs)
    assert report.check(results, docs) == []
    assert f"images/benchmarks/{gone}-" not in (docs / "benchmarks.md").read_text()


def test_few_runs_are_told(folders):
    results, _ = folders
    (results / "a" / "kernels.json").write_text(json.dumps([row(fastllm=2.0, eager=6.0) | {"runs": 5}]))
    assert "Too few runs to quote" in report.page(results)


def test_a_file_that_is_no_result_is_one_line_and_exit_code_2(folders, monkeypatch, capsys):
    results, docs = folders
    (results / "a" / "loss.json").write_text("{}")
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "DOCS", docs)
    with pytest.raises(SystemExit) as stopped:
        report.main(["--check"])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "loss.json holds no results" in said
    assert len(said.splitlines()) == 1


def test_rules_of_attention_are_those_measured_often_enough():
    def causal(times, runs=20, dtype="bf16", which="forward", gpu="a chip"):
        made = row("attention", "causal 1x2x3x4", **times)
        return made | {
            "runs": runs,
            "dtype": dtype,
            "pass": which,
            "machine": made["machine"] | {"gpu": gpu, "instruction_set": "x"},
        }

    rows = [
        causal({"fastllm": 4.0, "eager": 1.0}), causal({"fastllm": 1.0, "eager": 2.0}),
        causal({"fastllm": 1.0, "eager": 2.0}, which="forward+backward"), causal({"fastllm": 4.0, "eager": 1.0}, 5, "fp32"),
        causal({"fastllm": 1.0, "eager": 2.0}, gpu=None),
    ]  # fmt: skip
    found = rules.fastest([rows])
    device = f"{rows[0]['machine']['cpu']}, x"
    assert found == {
        ("a chip", "bfloat16", False): ("sdpa", "fastllm"), ("a chip", "bfloat16", True): ("fastllm",),
        (device, "bfloat16", False): ("fastllm",),
    }  # fmt: skip
    namespace = {}
    exec(rules.text([rows]), namespace)
    assert namespace["FASTEST"] == found


def test_files_that_no_suite_wrote_and_empty_ones_are_left_out(folders):
    results, docs = folders
    (results / "a" / "gpu.json").write_text('{"stages": []}')
    (results / "a" / "tiles.json").write_text("[]")
    (results / "a" / "loss.json").write_text("")  # of a suite that was interrupted before its first row
    assert report.check(results, docs) == []
