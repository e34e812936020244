"""Two pieces of work at once: drawing keeps one processor busy, and there are two."""

from __future__ import annotations

import os
import pickle
import sys
import threading
from collections.abc import Callable
from typing import TypeVar

_A = TypeVar("_A")
_B = TypeVar("_B")


def both(one: Callable[[], _A], other: Callable[[], _B]) -> tuple[_A, _B]:
    """What both give, in their order.

    The second is done by a fork of this process where that is safe: on Linux, with no other thread and a second processor.
    Where the fork fails it is done here, so that its error is raised here.
    """
    if sys.platform != "linux" or threading.active_count() > 1 or len(os.sched_getaffinity(0)) < 2:
        return one(), other()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)  # so that writing fails, and does not wait, when nobody reads any more
        _do(other, writing)
    os.close(writing)
    try:
        mine = one()
        with os.fdopen(reading, "rb", closefd=False) as file:
            content = file.read()
    finally:
        os.close(reading)  # before it is waited for: it may be writing
        _, status = os.waitpid(child, 0)
    return mine, pickle.loads(content) if status == 0 else other()


def _do(work: Callable[[], object], writing: int) -> None:
    """In the fork, which ends here whatever happens: what this process has open is not its to close."""
    code = 1
    try:
        with os.fdopen(writing, "wb") as file:
            file.write(pickle.dumps(work()))
        code = 0
    finally:
        os._exit(code)
