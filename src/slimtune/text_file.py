"""Text files that are written whole or not at all; those that an option names are found wanting before the work."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from slimtune.errors import UserError


def write_atomically(target: Path, text: str) -> None:
    """Write a text file whole or not at all; a link stays one, and what is no file (a pipe, a device) is written to.

    Raises:
        OSError: it cannot be written; what was there is as before.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_file() and not target.is_dir():
        target.write_text(text, encoding="utf-8")
        return
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def named(option: str, value: str | Path | None) -> Path | None:
    """The file that an option names, if it seems that it can be written; None of no value, and of ``-``, the terminal.

    Args:
        option: as the user writes it, e.g. ``--json``.

    Raises:
        UserError: it is a folder, its folder does not exist, or either may not be written.
    """
    if value is None or str(value) == "-":
        return None
    path = Path(value).expanduser()
    if path.is_dir() or str(value).endswith(("/", "\\")):
        raise UserError(f"{option} {str(value)!r} is a folder; name a file")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UserError(f"{option} {str(value)!r}: there is no folder {str(folder)!r}; make it, or name another file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option} {str(value)!r} cannot be written; name another file")
    return path


def write(option: str, target: Path, text: str) -> None:
    """Write what an option asked for. Raises UserError."""
    try:
        write_atomically(target, text)
    except OSError as error:
        raise UserError(f"{option} {str(target)!r} cannot be written ({error.strerror}); name another file") from error


def write_or_print(option: str, target: Path, text: str) -> None:
    """Write what took long to make; where that fails, it is printed and not lost. Raises UserError."""
    try:
        write_atomically(target, text)
    except OSError as error:
        print(text, end="")
        raise UserError(f"{option} {str(target)!r} cannot be written ({error.strerror}); it was printed instead") from error
