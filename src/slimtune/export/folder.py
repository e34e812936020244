"""Write a folder whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slimtune.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(folder: Path, needed_bytes: int, marker: str = "config.json") -> Iterator[Path]:
    """Give an empty sibling folder to write into; when the block ends well, it takes the place of ``folder``.

    Whatever goes wrong, ``folder`` stays as it was and nothing half-written is left.

    Args:
        folder: the target; absent, empty, or an earlier model (a folder with ``marker``), which is then replaced.
        needed_bytes: space to ask the disk for beforehand.
        marker: the file by which a folder is one of the kind that is written.

    Raises:
        UserError: the target holds something that is no model, cannot be written, or the disk is (or becomes) full.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    _restore(folder)
    check_target(folder, marker)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        _check_space(folder, needed_bytes)
        partial.mkdir()
        yield partial
        _readable(partial)
        _swap(partial, folder)
    except OSError as error:
        if error.errno in _FULL:
            raise _full(folder, needed_bytes) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"model folder {str(folder)!r} cannot be written: {error.strerror} ({error.filename})"
            raise UserError(f"{reason}; choose another folder") from error
        raise
    except SafetensorError as error:  # wraps the system's error in a text
        if any(f"os error {code}" in str(error) for code in _FULL):
            raise _full(folder, needed_bytes) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(folder: Path, marker: str = "config.json") -> None:
    """Raise UserError where ``folder`` is or holds something that may not be replaced by a model."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"model folder {str(folder)!r} is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UserError(f"{str(folder)!r} holds other files than a model (no {marker}) and is not replaced; choose another")


def _check_space(folder: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(folder.parent).free < needed_bytes:
        raise _full(folder, needed_bytes)


def _full(folder: Path, needed_bytes: int) -> UserError:
    free = shutil.disk_usage(folder.parent).free
    return UserError(
        f"no space for the model in {str(folder)!r}: it needs {_size(needed_bytes)}, {_size(free)} are free; nothing "
        "was changed there. Free some space or choose a folder on another disk"
    )


def _size(count_bytes: int) -> str:
    return f"{count_bytes / 1e9:.2f} GB" if count_bytes >= 1e8 else f"{count_bytes / 1e6:.1f} MB"


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _restore(folder: Path) -> None:
    if _old(folder).is_dir() and not folder.exists():  # a run was killed between the two renames of _swap
        _old(folder).rename(folder)


def _readable(partial: Path) -> None:
    """Give every file the mode that the user's umask asks for: safetensors writes its own for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~mask)


def _swap(partial: Path, folder: Path) -> None:
    old = _old(folder)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
