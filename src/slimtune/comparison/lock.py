"""Files that tell other calls that something is being made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def held(file: Path, wait: bool = False) -> Iterator[TextIO | None]:
    """The lock, None where it is another call's; with ``wait`` it is this call's in the end.

    It goes with the process, however that ends, and with those that its open file was passed on to (``shared``).
    """
    try:
        import fcntl
    except ImportError:  # Windows
        with file.open("w") as handle:
            yield handle
        return
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield handle


def shared(lock: TextIO) -> tuple[int, ...]:
    """``pass_fds`` of a child that shall hold the lock for as long as it lives. Nothing where files are not passed on."""
    return (lock.fileno(),) if os.name == "posix" else ()
