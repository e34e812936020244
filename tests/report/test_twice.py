"""Two pieces of work at once: in two processes where that is safe, with the same results and errors everywhere."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from slimtune.report.twice import both

FORKED = """
import os, sys
from slimtune.report.twice import both

mine, theirs = both(os.getpid, lambda: (os.getpid(), "x" * 1_000_000))
assert mine == os.getpid()
assert len(theirs[1]) == 1_000_000
print(theirs[0] != mine)

def broken():
    print("asked", file=sys.stderr)
    raise KeyError("what is missing")

try:
    both(lambda: 1, broken)
except KeyError as error:
    print(error)
try:
    both(broken, lambda: "x" * 1_000_000)  # more than a pipe holds
except KeyError as error:
    print(error)
try:
    os.waitpid(-1, 0)
except ChildProcessError:
    print("no child is left")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")
def test_the_second_is_done_by_a_fork_and_errors_are_raised_here() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=60)
    *told, last = done.stdout.splitlines()
    assert told == ["True", "'what is missing'", "'what is missing'"]
    assert last == "no child is left"
    assert set(done.stderr.split()) == {"asked"}


def test_beside_another_thread_both_are_done_here() -> None:
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        assert both(threading.get_ident, threading.get_ident) == (threading.get_ident(),) * 2
    finally:
        ended.set()
        thread.join()
