"""Raw records of a data source: files (compressed or not) and hub data sets. Knows nothing of templates."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from slimtune.errors import UserError
from slimtune.sections import Source

Record = tuple[str, dict[str, Any]]
"""Origin (``file:line``) and the fields."""

_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_EXTRA = 'pip install "slimtune[hub]"'


def records(source: Source) -> Iterator[Record]:
    """The records of a file or of a hub data set; nothing else touches the network.

    Raises:
        UserError: the file is missing, a directory, of an unknown kind, damaged, or a line is not valid.
    """
    path = Path(source.path).expanduser()
    if path.is_dir():
        raise UserError(f"data source {source.path!r} is a directory; name a file inside it ({_known()})")
    if path.is_file():
        yield from _file_records(path, source)
    elif is_hub_id(source.path):
        yield from _hub_records(source)
    else:
        raise UserError(
            f"data source {source.path!r} does not exist; give a file ({_known()}), "
            "'builtin:python-docs', or a hub id of the form 'org/name'"
        )


def is_hub_id(path: str) -> bool:
    """Whether a path means a data set of the hub, and is no mistyped file."""
    # "data/train.jsonl" or "data/x" beside a folder "data" is a mistyped path: it must not become a download.
    return bool(_HUB_ID.fullmatch(path)) and _kind(Path(path)) is None and not Path(path).parent.is_dir()


def _kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in _OPENERS]
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _known() -> str:
    return "/".join(_READERS) + " with optional " + "/".join(_OPENERS)


def _file_records(path: Path, source: Source) -> Iterator[Record]:
    kind = _kind(path)
    if kind is None:
        raise UserError(f"data source {source.path!r}: unknown kind of file {path.suffix!r}; known: {_known()}")
    try:
        with _OPENERS.get(path.suffix, open)(path, "rb") as file:
            yield from _READERS[kind](file, source)
    except UnicodeDecodeError as error:
        raise UserError(f"data source {source.path!r} is not UTF-8 text ({error}); convert it to UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"data source {source.path!r} cannot be read: {error}; check or re-create the file") from error


def _text(file: IO[bytes], newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)


def _fields(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{origin}: a row must be an object {{...}}, found {type(value).__name__}")
    return value


def _jsonl(file: IO[bytes], source: Source) -> Iterator[Record]:
    with _text(file, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            origin = f"{source.path}:{number}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{origin}: not valid JSON ({error.msg}, column {error.colno}); fix the line") from error
            yield origin, _fields(value, origin)


def _json(file: IO[bytes], source: Source) -> Iterator[Record]:
    with _text(file) as whole:
        text = whole.read()
    try:
        value = json.loads(text) if text.strip() else []
    except json.JSONDecodeError as error:
        hint = "; rename it to .jsonl if it holds one object a line" if error.msg == "Extra data" else ""
        raise UserError(f"{source.path}:{error.lineno}: not valid JSON ({error.msg}){hint}") from error
    if not isinstance(value, list):
        raise UserError(f"{source.path}: a .json file must hold a list of objects, found {type(value).__name__}")
    for number, item in enumerate(value, start=1):
        yield f"{source.path}:{number}", _fields(item, f"{source.path}:{number}")


def _csv(file: IO[bytes], source: Source) -> Iterator[Record]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is less than one long document
    with _text(file, newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        try:
            for row in reader:
                origin = f"{source.path}:{reader.line_num}"
                if None in row:
                    cells = len(reader.fieldnames or ())
                    raise UserError(f"{origin}: more cells than the {cells} of the header; quote those with commas")
                yield origin, row
        except csv.Error as error:
            raise UserError(f"{source.path}:{reader.line_num}: not valid CSV ({error}); fix the line") from error


def _parquet(file: IO[bytes], source: Source) -> Iterator[Record]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"data source {source.path!r} needs pyarrow to read parquet: {_HUB_EXTRA}") from error
    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(file.read()))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data source {source.path!r} is not a parquet file: {error}") from error
    number = 0
    for batch in table.iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{source.path}:{number}", row


def _txt(file: IO[bytes], source: Source) -> Iterator[Record]:
    lines: list[str] = []
    first = 1
    with _text(file) as text:
        for number, line in enumerate(text, start=1):
            if line.rstrip("\n") == source.separator:
                yield f"{source.path}:{first}", {"text": "".join(lines)}
                lines, first = [], number + 1
            else:
                lines.append(line)
    if lines:
        yield f"{source.path}:{first}", {"text": "".join(lines)}


_READERS: dict[str, Callable[[IO[bytes], Source], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _txt,
}


def _hub_records(source: Source) -> Iterator[Record]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"data source {source.path!r} is a hub id and needs datasets: {_HUB_EXTRA}") from error
    try:
        rows = datasets.load_dataset(source.path, source.name, split=source.split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data source {source.path!r} (name={source.name!r}, split={source.split!r}) cannot be loaded from "
            f"the hub: {error}; check the id, name and split, or give a local file"
        ) from error
    for number, row in enumerate(rows):
        yield f"{source.path}[{source.split}]:{number}", dict(row)
