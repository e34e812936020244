"""The one exception a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave cannot be used. The message names the value and the remedy; the CLI prints it alone."""

    exit_code = 2
    """Of the command line."""
    shared = False
    """Whether every process of a run comes to it, so that the first one's word is enough."""


def nearest(word: str, known: Iterable[str], below: Iterable[str] = ()) -> str:
    """``" Did you mean 'x'?"`` for the closest known word, else the empty string; with the keys that x is below."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {'.'.join([*below, match[0]])!r}?" if match else ""


def out_of_memory(error: Exception) -> str | None:
    """What to do about an error that says that memory is full; None of any other.

    By name, for torch may not be loaded: its own class, or CUDA's or the CPU's error where torch's allocator was not asked.
    """
    text = str(error)
    on_cpu = "DefaultCPUAllocator: can't alloc" in text or "DefaultCPUAllocator: not enough" in text
    full = isinstance(error, RuntimeError) and (on_cpu or "CUDA error: out of memory" in text)
    if type(error).__name__ != "OutOfMemoryError" and not full:
        return None
    return (
        f"{'memory is full' if on_cpu else 'the GPU is out of memory'}; work in smaller parts (tune: train.micro_batch, "
        "evaluate.batch, model.checkpointing=non_reentrant; evaluate, bench: --batch), or free what other processes hold of it"
        f"; slimtune estimate tells what a run takes ({text.splitlines()[0][:160]})"
    )
