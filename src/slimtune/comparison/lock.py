"""Files that tell other calls that something is being made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from slimtune.runtime import locked


@contextmanager
def held(file: Path, wait: bool = False) -> Iterator[TextIO | None]:
    """The lock, None where it is another call's; with ``wait`` it is this call's in the end.

    It goes with the process, however that ends, and with those that its open file was passed on to (``shared``).
    """
    with file.open("w") as handle:
        yield handle if locked(handle.fileno(), wait) else None


def shared(lock: TextIO) -> tuple[int, ...]:
    """``pass_fds`` of a child that shall hold the lock for as long as it lives. Nothing where files are not passed on."""
    return (lock.fileno(),) if os.name == "posix" else ()
