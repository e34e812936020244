"""The one exception a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user gave cannot be used. The message names the value and the remedy; the CLI prints it alone."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest known word, else the empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
