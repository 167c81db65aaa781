"""Training data: files, tokenised once into an Arrow file that is memory-mapped from then on, whatever its size.

The file's name is a hash of what it depends on: the content of the sources, the tokenizer and the settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy

from fastllm.errors import DataError
from fastllm.train import files, lock
from fastllm.train.encode import Encoded, Encoder
from fastllm.train.formats import RowError, hint, recognise

_VERSION = 3  # of what is written; another one makes old files be left alone
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 1 << 19  # tokenised together
_SHOWN = 10  # bad rows that a message names
WANTED = {
    "text": "texts: rows of {text}, or .txt files",
    "conversation": "conversations: rows with prompts and responses",
    "preference": "preferences: rows of {prompt, chosen, rejected}",
}


@dataclass
class Totals:
    """What one source gave: rows `read` that were good and `bad` ones; of them `rows` to train on, `cut` of which lost tokens;
    `tokens` in all and `trained` on."""

    read: int = 0
    rows: int = 0
    bad: int = 0
    tokens: int = 0
    trained: int = 0
    cut: int = 0


@dataclass
class Report:
    """What a reading gave: totals by source, and the first bad rows as (file, line, problem)."""

    sources: dict[str, Totals] = field(default_factory=dict)
    bad: list[tuple[str, int, str]] = field(default_factory=list)

    @property
    def total(self) -> Totals:
        whole = Totals()
        for one in self.sources.values():
            for name, value in asdict(one).items():
                setattr(whole, name, getattr(whole, name) + value)
        return whole

    def told(self) -> str:
        """The bad rows, the first ten by file and line, in one line; empty where there are none. What is wrong with several
        in a row is said once."""
        whole = self.total
        if not whole.bad:
            return ""
        alike = groupby(self.bad, key=lambda bad: (bad[0], bad[2]))
        shown = "; ".join(
            f"{file}:{', '.join(str(line) for _, line, _ in rows)}: {problem}" for (file, problem), rows in alike
        )
        more = f"; and {whole.bad - len(self.bad):,} more" if whole.bad > len(self.bad) else ""
        return f"{whole.bad:,} of {whole.bad + whole.read:,} rows cannot be used: {shown}{more}"

    def summed_up(self, max_length: int) -> str:
        """Rows and tokens in one line, and how many rows were cut."""
        whole = self.total
        trained = f", {whole.trained / max(1, whole.tokens):.0%} of them trained on" if whole.trained else ""
        cut = f"; {whole.cut:,} cut to max_length {max_length}" if whole.cut else ""
        return f"{whole.rows:,} rows, {whole.tokens:,} tokens{trained}{cut}"

    def refused(self, key: str) -> DataError:
        """The error of a reading in which no row may be bad."""
        remedy = " (on_bad_row: skip trains on the others)" if self.total.read else ""
        return DataError(f"{key}: {self.told()}{remedy}")


@dataclass(frozen=True)
class Data:
    """Tokenised rows: a datasets.Dataset with columns input_ids, length and, where not all tokens are trained on, labels. A
    preference is one row, both its conversations one after the other, and has a column `chosen`, the tokens of the first."""

    rows: Any
    report: Report
    fingerprint: str


def prepare(
    sources: str | list[str],
    encoder: Encoder,
    *,
    kind: str,
    on_bad_row: str = "error",
    cache: str | os.PathLike[str] | None = None,
    key: str = "data",
) -> Data:
    """Reads, checks and tokenises files, or finds that it was done before.

    Args:
        sources: files and folders of .jsonl, .parquet and .txt.
        encoder: with the tokenizer and the lengths.
        kind: "text", "conversation" or "preference"; rows of another kind are bad.
        on_bad_row: "error", or "skip" to train on the others. Either way they are counted and the first ten shown.
        cache: a folder; default $FASTLLM_CACHE or ~/.cache/fastllm.
        key: of the configuration, for messages.

    Raises:
        DataError: nothing to read, rows that are bad with "error", no good row at all, or no room for the Arrow file.
    """
    folder = Path(cache or os.environ.get("FASTLLM_CACHE") or "~/.cache/fastllm").expanduser()
    paths = files.find(sources, key)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clean(folder)
        fingerprint = _fingerprint(paths, encoder, kind, folder)
        arrow, note = (folder / f"{fingerprint}{suffix}" for suffix in (".arrow", ".json"))
        if not (arrow.is_file() and note.is_file()):
            _write(paths, encoder, kind, on_bad_row, arrow, note, key)
        told = json.loads(note.read_text())
    except OSError as error:
        raise DataError(f"cannot keep tokenised data in {folder}: {error.strerror or error}") from error
    # The cache knows contents, not names: the same files may stand elsewhere now.
    report = Report({str(p): Totals(**t) for p, t in zip(paths, told["sources"])}, [tuple(b) for b in told["bad"]])
    if report.told():
        if on_bad_row == "error":
            raise report.refused(key)
        if os.environ.get("RANK", "0") == "0":
            print(f"warning: {key}: {report.told()}", file=sys.stderr)
    if not report.total.rows:
        good = " that can be used" if report.total.bad else ""
        raise DataError(f"{key} is empty: there is no row{good} in {_listed(paths)}")
    return Data(open_rows(arrow), report, fingerprint)


def open_rows(arrow: Path) -> Any:
    """A datasets.Dataset over an Arrow file, memory-mapped."""
    import datasets

    return datasets.Dataset.from_file(str(arrow))


def _fingerprint(paths: list[Path], encoder: Encoder, kind: str, folder: Path) -> str:
    tokenizer = encoder.tokenizer
    settings = {
        "version": _VERSION,
        "files": [files.digest(path, folder) + path.suffix.lower() for path in paths],
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "template": str(tokenizer.chat_template) if kind != "text" else None,
        "kind": kind,
        "max_length": encoder.max_length,
        "train_on_prompt": encoder.train_on_prompt,
    }
    return hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write(paths: list[Path], encoder: Encoder, kind: str, on_bad_row: str, arrow: Path, note: Path, key: str) -> None:
    """The Arrow file and beside it the report; both appear whole or not at all."""
    import pyarrow

    columns = [("input_ids", pyarrow.list_(pyarrow.int32())), ("length", pyarrow.int32())]
    if kind == "preference" or (kind == "conversation" and not encoder.train_on_prompt):
        columns.insert(1, ("labels", pyarrow.list_(pyarrow.int32())))
    if kind == "preference":
        columns.append(("chosen", pyarrow.int32()))
    schema = pyarrow.schema(columns)
    report = Report()
    with _written_whole(arrow) as sink:
        with pyarrow.ipc.new_stream(sink, schema) as writer:
            for path in paths:
                totals = report.sources[str(path)] = Totals()
                for rows in _encoded(path, encoder, kind, on_bad_row, report):
                    writer.write_batch(_batch(rows, schema))
                    for row in rows:
                        totals.rows += 1
                        totals.tokens += len(row.input_ids)
                        totals.trained += sum(row.trained[1:]) if row.trained else len(row.input_ids) - 1
                        totals.cut += row.cut
        if report.bad and on_bad_row == "error":
            raise report.refused(key)
    told = {"sources": [asdict(t) for t in report.sources.values()], "bad": report.bad}
    with _written_whole(note) as sink:
        sink.write(json.dumps(told).encode())


@contextmanager
def _written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write into that gets its name at the end of the block, and vanishes where the block fails. While it is written it is
    locked, by which others know it from one that a killed process has left."""
    while True:
        part = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
        file = part.open("xb")
        lock.take(file)
        if lock.is_at(file, part):
            break
        file.close()  # another process has taken it for one that is left
    try:
        with file:
            yield file
            file.flush()
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _clean(folder: Path) -> None:
    """Removes what killed processes were writing. Where there are no locks, nobody can tell, and it stays."""
    for part in folder.glob("*.part"):
        with suppress(OSError), part.open("r+b") as file:  # of another user, or just gone
            if lock.take(file):
                part.unlink()


def _encoded(path: Path, encoder: Encoder, kind: str, on_bad_row: str, report: Report) -> Iterator[list[Encoded]]:
    """Tokenised rows of a file, many at a time. Once a row is bad and none may be, rows are only looked at."""
    for batch in _batches(_examples(path, kind, report), _BATCH_ROWS, _BATCH_CHARACTERS):
        counting = on_bad_row == "error" and report.bad
        totals = report.sources[str(path)]
        if kind == "text":
            totals.read += len(batch)
            if not counting:
                yield [row for rows in encoder.texts([example for _, example in batch]) for row in rows]
            continue
        good = []
        encode = encoder.preferences if kind == "preference" else encoder.chats
        for (line, _), row in zip(batch, encode([example for _, example in batch])):
            if isinstance(row, RowError):
                _note(report, path, line, str(row))
            else:
                good.append(row)
        totals.read += len(good)
        if good and not counting:
            yield good


def _examples(path: Path, kind: str, report: Report) -> Iterator[tuple[int, Any]]:
    for row in files.read(path):
        if row.value is None:
            _note(report, path, row.line, row.problem)
            continue
        try:
            example = recognise(row.value)
            if example.kind != kind:
                raise RowError(f"a {example.kind}, where the stage takes {WANTED[kind]}{hint(row.value)}")
        except RowError as error:
            _note(report, path, row.line, str(error))
            continue
        yield row.line, example


def _note(report: Report, path: Path, line: int, problem: str) -> None:
    report.sources[str(path)].bad += 1
    if len(report.bad) < _SHOWN:
        report.bad.append((str(path), line, problem))


def _batches(examples: Iterable[tuple[int, Any]], rows: int, characters: int) -> Iterator[list[tuple[int, Any]]]:
    held: list[tuple[int, Any]] = []
    size = 0
    for line, example in examples:
        held.append((line, example))
        size += example.characters
        if len(held) >= rows or size >= characters:
            yield held
            held, size = [], 0
    if held:
        yield held


def _batch(rows: list[Encoded], schema: Any) -> Any:
    import pyarrow

    lengths = numpy.fromiter((len(row.input_ids) for row in rows), dtype=numpy.int32, count=len(rows))
    offsets = pyarrow.array(numpy.concatenate(([0], numpy.cumsum(lengths))), type=pyarrow.int32())
    ids = numpy.fromiter((i for row in rows for i in row.input_ids), dtype=numpy.int32, count=int(lengths.sum()))
    arrays = [pyarrow.ListArray.from_arrays(offsets, pyarrow.array(ids)), pyarrow.array(lengths)]
    if "labels" in schema.names:
        trained = numpy.fromiter((t for row in rows for t in row.trained or ()), dtype=bool, count=ids.size)
        arrays.insert(
            1, pyarrow.ListArray.from_arrays(offsets, pyarrow.array(numpy.where(trained, ids, -100).astype("i4")))
        )
    if "chosen" in schema.names:
        arrays.append(pyarrow.array([row.chosen for row in rows], type=pyarrow.int32()))
    return pyarrow.record_batch(arrays, schema=schema)


def _listed(paths: list[Path]) -> str:
    shown = ", ".join(map(str, paths[:3]))
    return shown + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
