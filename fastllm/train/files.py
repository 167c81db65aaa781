"""Rows out of files: .jsonl, .parquet and .txt, one at a time, each with the line it stands on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastllm.errors import DataError

SUFFIXES = (".jsonl", ".parquet", ".txt")
# A text file is one document up to this size; a longer one is cut at the next end of a line, so that it never is in memory whole.
DOCUMENT_BYTES = 1 << 20


class Row(NamedTuple):
    """One row of a file: `value`, or what is wrong with it. Lines count from 1; of a .parquet file, rows."""

    line: int
    value: dict[str, Any] | None
    problem: str = ""


def find(sources: str | list[str], key: str = "data") -> list[Path]:
    """The files behind a path or several, folders searched whole and in order.

    Raises:
        DataError: nothing there, a folder without such files, or a file of another kind. `key` is named in the message.
    """
    found: list[Path] = []
    for source in [sources] if isinstance(sources, str) else sources:
        path = Path(source).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise DataError(f"{key}: the folder {path} holds no {', '.join(SUFFIXES)} file")
            found += inside
        elif not path.exists():
            raise DataError(f"{key}: there is no file or folder {path}")
        elif path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{key}: {path} is no {', '.join(SUFFIXES)} file")
        else:
            found.append(path)
    if not found:
        raise DataError(f"{key} names no file")
    for path in found:
        if not os.access(path, os.R_OK):
            raise DataError(f"{key}: {path} cannot be read")
    return list(dict.fromkeys(found))


def read(path: Path) -> Iterator[Row]:
    """The rows of a file, in order and without holding more than a few of them."""
    suffix = path.suffix.lower()
    return {".jsonl": _jsonl, ".parquet": _parquet, ".txt": _text}[suffix](path)


def digest(path: Path, memory: Path) -> str:
    """A hash of the file's content. `memory`, a folder, remembers it for as long as size and time of the file stay."""
    state = path.stat()
    told = f"{path.resolve()}|{state.st_size}|{state.st_mtime_ns}|{state.st_ino}"
    note = memory / f"digest-{hashlib.blake2b(told.encode(), digest_size=16).hexdigest()}"
    if note.is_file():
        return note.read_text()
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    memory.mkdir(parents=True, exist_ok=True)
    fresh = note.with_suffix(f".{os.getpid()}")
    fresh.write_text(found.hexdigest())
    fresh.replace(note)
    return found.hexdigest()


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Row(number, None, f"not UTF-8 (byte {error.start + 1} of the line)")
            except RecursionError:
                yield Row(number, None, "not JSON that can be read: nested too deeply")
            except ValueError as error:
                place = f" (column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
                yield Row(number, None, f"not JSON: {getattr(error, 'msg', error)}{place}")
            else:
                if b"\\ud" in line.lower() and not _encodes(value):
                    yield Row(number, None, "half of a surrogate pair, which is no character")
                elif isinstance(value, dict):
                    yield Row(number, value)
                else:
                    yield Row(number, None, f"not a JSON object but {type(value).__name__}")


def _encodes(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for value in batch.to_pylist():
                    number += 1
                    # Columns of other formats in the same file are null in this row.
                    yield Row(number, {key: v for key, v in value.items() if v is not None})
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable Parquet file: {str(error).splitlines()[0]}") from None


def _text(path: Path) -> Iterator[Row]:
    begin, number = 1, 0
    held: list[str] = []
    size = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                held.append(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield Row(number, None, f"not UTF-8 (byte {error.start + 1} of the line)")
                continue
            size += len(line)
            if size >= DOCUMENT_BYTES:
                yield Row(begin, {"text": "".join(held)})
                begin, held, size = number + 1, [], 0
    if "".join(held).strip():
        yield Row(begin, {"text": "".join(held)})
