"""Writes docs/ops: one page per public op (all of fastllm.ops, and of fastllm.rl what is an op itself), from its docstring,
its definition and the kernels that are there.

python docs/generate.py            writes the pages
python docs/generate.py --check    writes nothing; exit code 1 when a page is missing, old or left over
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from pathlib import Path

import fastllm.ops
from fastllm import rl
from fastllm.ops import _op

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "ops"
# The public functions that one op serves, by name: fastllm.ops, and of fastllm.rl what is more than a composition.
FUNCTIONS = {name: getattr(fastllm.ops, name) for name in fastllm.ops.__all__}
FUNCTIONS |= {name: getattr(rl, name) for name in rl.__all__ if name in _op.PUBLIC}
HEADINGS = {"Args": "Arguments", "Returns": "Returns", "Raises": "Errors", "Warns": "Warnings"}


def main(arguments: list[str]) -> int:
    pages = {f"{name}.md": page(name) for name in FUNCTIONS}
    pages["README.md"] = index()
    there = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    if "--check" in arguments:
        wrong = sorted(name for name in pages.keys() | there.keys() if pages.get(name) != there.get(name))
        if wrong:
            print(f"docs/ops is not what the code says: {', '.join(wrong)}; run `make docs`", file=sys.stderr)
        return 1 if wrong else 0
    for name in there.keys() - pages.keys():
        (PAGES / name).unlink()
    for name, text in pages.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    return 0


def index() -> str:
    rows = "".join(f"| [{name}]({name}.md) | {summary(name)} | {', '.join(kernels(name))} |\n" for name in FUNCTIONS)
    return (
        "# The ops\n\n"
        "Functions of `fastllm.ops`, and `fastllm.rl.ppo_loss`, each usable without patching anything, each differentiable but\n"
        "`gae`.\n"
        "[Numerics and errors](../numerics.md) holds for all of them.\n\n"
        f"| op | what it computes | kernels |\n|---|---|---|\n{rows}"
    )


def page(name: str) -> str:
    text, sections = parse(inspect.getdoc(FUNCTIONS[name]) or "")
    parts = [f"# {name}", f"```python\n{signature(name)}\n```", text]
    for title, body in sections.items():
        parts.append(f"## {HEADINGS[title]}\n\n{body}")
    if name in _op.COMPOSED:
        return "\n\n".join([*parts, f"## Backends\n\nMade of {_op.COMPOSED[name]}."]) + "\n"
    op = _op.PUBLIC[name]
    source = Path(inspect.getsourcefile(op.definition) or "").relative_to(ROOT).as_posix()
    parts.append(
        "## Backends\n\n"
        + "\n".join(f"- `{backend}`: {where}" for backend, where in kernels(name).items())
        + "\n\n[Which one serves a call](../backends.md)."
    )
    parts.append(
        f"## Definition\n\nWhat the kernels are tested against in float64, and what runs where there is none "
        f"(`torch.ops.fastllm.{op.name}` in [{source}](../../{source}), arguments already checked):\n\n"
        f"```python\n{inspect.getsource(op.definition).rstrip()}\n```"
    )
    return "\n\n".join(parts) + "\n"


def parse(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring as Markdown: the text outside its sections, and each section's body."""
    text, sections, current = [], {}, None
    for line in doc.replace("``", "`").splitlines():
        heading = re.fullmatch(r"(\w+):", line)
        if heading and heading[1] in HEADINGS:
            current = heading[1]
            sections[current] = []
        elif current and (line.startswith(" ") or not line):
            sections[current].append(line)
        else:
            current = None
            text.append(line)
    return "\n".join(text).strip(), {
        title: bullets(body) if title != "Returns" else body
        for title, lines in sections.items()
        for body in [textwrap.dedent("\n".join(lines)).strip()]
    }


def bullets(text: str) -> str:
    """Entries "name: text", continued on indented lines, as a list."""
    joined = re.sub(r"\n\s+", " ", text)
    return "\n".join(re.sub(r"^([\w, *]+): ", r"- `\1`: ", line) for line in joined.splitlines())


def summary(name: str) -> str:
    first = (inspect.getdoc(FUNCTIONS[name]) or "").split("\n\n")[0]
    return " ".join(first.replace("``", "`").split()).replace("|", "\\|")


def signature(name: str) -> str:
    parameters = inspect.signature(FUNCTIONS[name]).parameters.values()
    words, starred = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        words.append(f"{parameter.name}: {parameter.annotation}{default}")
    name = f"fastllm.{'ops' if name in fastllm.ops.__all__ else 'rl'}.{name}"
    line = f"{name}({', '.join(words)})"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(words) + ",\n)"


def kernels(name: str) -> dict[str, str]:
    """backend -> where its kernel is, by what the sources hold, not by what this machine could build."""
    if name in _op.COMPOSED:
        return {"composed": _op.COMPOSED[name]}
    op = _op.PUBLIC[name]
    found = {"torch": "the definition below"}
    for backend, folder in (("cpp", "cpu"), ("cuda", "cuda")):
        for source in sorted((ROOT / "csrc" / folder).glob("*.c*")):
            registered = op.name + "_cuda" * (backend == "cuda")
            if f'm.impl("{registered}"' in source.read_text(encoding="utf-8"):
                found[backend] = f"[csrc/{folder}/{source.name}](../../csrc/{folder}/{source.name})"
    if op._triton is None and "triton" in op.kernels:
        return found | dict.fromkeys(("cpp", "triton"), "matrix products of torch around kernels of the other ops")
    if op._triton is not None:
        file = f"fastllm/kernels/triton/{op._triton.split(':')[0]}"  # a folder, where one file would be too long
        file += "" if (ROOT / file).is_dir() else ".py"
        found["triton"] = f"[{file}](../../{file})"
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
