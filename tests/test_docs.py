"""The documentation says what the code does: pages, snippets, commands and links."""

import importlib.util
import re
from pathlib import Path

import pytest

import fastllm.ops
from fastllm import cli

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN = [path for path in FILES if path.parent.name != "ops"]  # the rest is generated


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def name(value):
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else None


def test_every_public_op_has_a_page_that_is_what_the_code_says():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    assert generate.main(["--check"]) == 0, "run `make docs`"
    pages = {path.stem for path in (ROOT / "docs" / "ops").glob("*.md")} - {"README"}
    assert pages == set(generate.FUNCTIONS) >= {*fastllm.ops.__all__, "ppo_loss"}


@pytest.mark.parametrize("path", [p for p in WRITTEN if blocks(p, "python")], ids=name)
def test_python_snippets_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for snippet in blocks(path, "python"):
        exec(compile(snippet, path.name, "exec"), {})


def test_commands_in_the_documentation_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    found = 0
    for path in WRITTEN:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"`make ([a-z]+)", text)) <= targets
        commands = "".join(blocks(path, "sh"))
        assert set(re.findall(r"^make ([a-z]+)", commands, re.MULTILINE)) <= targets
        for line in re.findall(r"^fastllm (.*)$", commands, re.MULTILINE):
            cli._parser().parse_args(line.split())
            found += 1
        assert set(re.findall(r"`fastllm ([a-z]+)", text)) <= {"doctor", "patch", "context", "plan", "train", "stream"}
    assert found


@pytest.mark.parametrize("path", FILES, ids=name)
def test_relative_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
