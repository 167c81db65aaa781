"""A folder that one run at a time trains in, and files that one process writes: POSIX record locks, which end with their process.

They are the process's own: workers that it forks do not have them, so that after a kill nothing is left but a file.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not POSIX
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
_held: dict[Path, IO[str]] = {}  # closing any file object of a locked file would end the lock, so there is one


def take(file: IO[Any]) -> bool | None:
    """Locks a file that is open for writing, until it is closed. False: another process has it; None: the file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether a file that is open still has that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def hold(run: Path) -> str:
    """Keeps other processes from training in a folder until `release` or the end of this process; what holds it already may ask again.

    Returns:
        Who trains there, as a sentence, or nothing where it is held now. A file system without locks keeps nobody out, and is named on
        stderr.

    Raises:
        OSError: nothing can be written there.
    """
    run = run.resolve()
    if run in _held:
        return ""
    path = run / NAME
    while True:
        file = path.open("a+", encoding="utf-8")
        got = take(file)
        if got is False:
            with file:
                file.seek(0)
                return _who(file.read(), path)
        if is_at(file, path):
            break
        file.close()  # which its last owner has just taken away
    if got is None:
        print(f"warning: {run} has no file locks: nothing keeps a second run from training there", file=sys.stderr)
    file.truncate(0)
    file.write(
        json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")})
    )
    file.flush()
    _held[run] = file
    return ""


def release(run: Path) -> None:
    """Lets others train in a folder; nothing where this process does not hold it."""
    if file := _held.pop(run.resolve(), None):
        (run / NAME).unlink(missing_ok=True)  # before the lock ends: who has opened it in between finds the name gone
        file.close()


@atexit.register
def _release_all() -> None:
    for run in list(_held):
        release(run)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


def _who(told: str, path: Path) -> str:
    try:
        one = json.loads(told)
        said = f"process {one['process']} on {one['host']} trains in {path.parent} since {one['since']}"
        elsewhere = one["host"] != socket.gethostname()
    except (ValueError, KeyError, TypeError):  # it has not written it yet
        return f"another process trains in {path.parent}"
    # Of a machine that is gone a server may keep the lock.
    return said + (f"; if it is no more, remove {path}" if elsewhere else "")
