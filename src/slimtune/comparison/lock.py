"""Files that tell other calls that something is being made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def held(file: Path, wait: bool = False) -> Iterator[bool]:
    """Whether the lock is this call's; with ``wait`` it always is, in the end. It goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield True
        return
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
