"""Another process beside the one that tests."""

import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


@contextmanager
def killed_inside(held: AbstractContextManager[Any]) -> Iterator[int]:
    """A process inside the context `held`, which is killed at the end, so that it never leaves it; its id."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with held:
                os.write(write, b"1")
                signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    try:
        assert os.read(read, 1) == b"1"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
