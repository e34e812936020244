"""Write a folder whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError

from slimtune.errors import UserError
from slimtune.models.load import TOKENIZER_FILES

_FULL = (errno.ENOSPC, errno.EDQUOT)
_MODEL, _ADAPTER = "config.json", "adapter_config.json"
_WRITTEN = {
    _MODEL: (
        _MODEL,
        "generation_config.json",
        "*.safetensors",
        "*.safetensors.index.json",
        "plan.json",
        "verify.json",
        "README.md",
        "modeling_slimtune*.py",
        "model.onnx*",
        *TOKENIZER_FILES,
    ),
    _ADAPTER: (
        _ADAPTER,
        "adapter_model.safetensors",
        "changed.safetensors",
        "routers.safetensors",
        "apply.json",
        "plan.json",
        "README.md",
    ),
}
"""By marker: names of the files that slimtune writes. A folder with any other is a user's, and is not replaced."""
_CODE = ("modeling_slimtune*.py", "tokenization_*.py")
"""Names of the code among them: ``tokenizer*`` would take in a program of the user's."""
_CACHE = "__pycache__"  # Python leaves it beside a class that was loaded


@contextmanager
def replacing(folder: Path, needed_bytes: int, marker: str = _MODEL) -> Iterator[Path]:
    """Give an empty sibling folder to write into; when the block ends well, it takes the place of ``folder``.

    Whatever goes wrong, ``folder`` stays as it was and nothing half-written is left.

    Args:
        folder: the target; absent, empty, or what slimtune wrote earlier (see ``check_target``), which is then replaced.
        needed_bytes: space to ask the disk for beforehand.
        marker: the file by which a folder is one of the kind that is written.

    Raises:
        UserError: the target holds something else, cannot be written, or the disk is (or becomes) full.
    """
    folder = folder.resolve()  # "." has no name to put another beside
    check_target(folder, marker, of_run=True)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        _prepare(folder, partial, needed_bytes, marker)
        yield partial
        _readable(partial)
        _swap(partial, folder)
    except OSError as error:
        if error.errno in _FULL:
            raise _full(folder, needed_bytes) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise _unwritable(folder, error) from error
        raise
    except SafetensorError as error:  # wraps the system's error in a text
        if any(f"os error {code}" in str(error) for code in _FULL):
            raise _full(folder, needed_bytes) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(folder: Path, marker: str = _MODEL, *, of_run: bool = False) -> None:
    """Raise UserError where ``folder`` is or holds something that may not be replaced by a model.

    It may be absent, empty, or hold ``marker`` and nothing but plain files of names that slimtune writes.

    Args:
        marker: the file by which a folder is one of the kind that is written.
        of_run: the folder ``model`` of a run may be replaced too, which is for the run alone.
    """
    shown = str(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"model folder {shown!r} is a file; choose another folder")
        entries = sorted(folder.iterdir()) if folder.is_dir() else []
        foreign = next((entry.name for entry in entries if not _ours(entry, marker)), None)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if entries and not any(entry.name == marker for entry in entries):
        raise UserError(f"{shown!r} holds other files than a model (no {marker}) and is not replaced; choose another")
    if foreign is not None:
        raise UserError(f"{shown!r} holds other files than a model ({foreign!r}) and is not replaced; choose another")
    if entries and not of_run and (here := folder.resolve()).name == "model" and (here.parent / "recipe.yaml").is_file():
        raise UserError(f"{shown!r} is the model of the run {str(here.parent)!r}; choose another folder")


def _ours(entry: Path, marker: str) -> bool:
    if entry.is_symlink():
        return False
    if entry.is_dir():
        return entry.name == _CACHE
    patterns = _CODE if marker == _MODEL and entry.suffix == ".py" else _WRITTEN[marker]
    return entry.is_file() and any(fnmatchcase(entry.name, pattern) for pattern in patterns)


def _prepare(folder: Path, partial: Path, needed_bytes: int, marker: str) -> None:
    """Make the empty ``partial``, beside what was there before a run that was killed."""
    try:
        _restore(folder)
        check_target(folder, marker, of_run=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        _check_space(folder, needed_bytes)
        partial.mkdir()
    except OSError as error:  # a place that is no disk, a file where a folder should be, a name too long, ...
        raise (_full(folder, needed_bytes) if error.errno in _FULL else _unwritable(folder, error)) from error


def _check_space(folder: Path, needed_bytes: int) -> None:
    if shutil.disk_usage(folder.parent).free < needed_bytes:
        raise _full(folder, needed_bytes)


def _full(folder: Path, needed_bytes: int) -> UserError:
    free = shutil.disk_usage(folder.parent).free
    return UserError(
        f"no space for the model in {str(folder)!r}: it needs {_size(needed_bytes)}, {_size(free)} are free; nothing "
        "was changed there. Free some space or choose a folder on another disk"
    )


def _unwritable(folder: Path, error: OSError) -> UserError:
    reason = f"model folder {str(folder)!r} cannot be written: {error.strerror} ({error.filename})"
    return UserError(f"{reason}; choose another folder")


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
    old, inside = _old(folder), folder.exists() and folder.samefile(Path.cwd())
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    if inside:  # relative paths would go by the folder that is removed
        os.chdir(folder)
    shutil.rmtree(old, ignore_errors=True)
