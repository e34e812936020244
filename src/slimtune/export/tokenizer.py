"""The tokenizer's files of a written folder: from them transformers must make the tokenizer that it makes from the base's.

It chooses a tokenizer's class by the folder's ``model_type`` and the ``tokenizer_class`` that the files name. For some model
types the named class counts, for some their own, for some neither, and a class may put its own rules in place of those in
tokenizer.json. So the same files beside another ``model_type`` may split texts otherwise. Which class is chosen when differs
between versions, so it is not looked up but tried; files that give the same tokenizer stay as they are, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from slimtune.models.load import TOKENIZER_FILES, load_tokenizer
from slimtune.sections import ModelConfig

_WHOLE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_PLAIN = "PreTrainedTokenizerFast"
"""Takes tokenizer.json as it stands, in transformers 4 too, which calls it so."""
_TEXTS = (
    "",
    "The first section describes a patient.",
    " one space",
    "  two  spaces  ",
    "\ttab\n\n\nlines \r\n",
    "    return [item for item in x_1]  # 3.14",
    "1234567 and 89",
    "I'LL don't \u2581mark",
    "na\u00efve cafe\u0301 Stra\u00dfe gr\u00f6\u00dfer \ufb01",
    "\u65e5\u672c\u8a9e \u8bed",
    "\U0001f642\U0001f469\u200d\U0001f52c",
)
"""Texts on which classes that were seen to differ do: spaces, lines, digits, characters that some classes write otherwise."""


def settle(base: Callable[[], Any], folder: Path, say: Callable[[str], None]) -> None:
    """Make the tokenizer of ``folder`` read texts as the one of its base does.

    Args:
        base: loads the base's tokenizer; it may fail.
        folder: holds config.json and the tokenizer's files, copied from the base; those that need it are changed.
        say: takes the one line that tells of a tokenizer that cannot be compared or mended; its files then stay as they are.
    """
    if not any(file for name in TOKENIZER_FILES for file in folder.glob(name)):
        return
    try:
        wanted = base()
        expected = _told(wanted)
    except Exception as error:  # UserError, or whatever a class of its own raises; a model is written for all that
        reason = " ".join(str(error).split()) or type(error).__name__
        say(f"tokenizer: its files are copied as they are and were not compared with the base's ({reason})")
        return
    given = {name: _read(folder / name) for name in (_WHOLE, _SETTINGS)}
    for files in ({}, *_options(wanted, given[_SETTINGS])):
        _write(folder, {**given, **files})
        if _told_there(folder) == expected:
            return
    _write(folder, given)
    say(
        f"tokenizer: from this folder transformers makes another one than the base's {type(wanted).__name__}; its files are "
        "copied as they are, so load the base's"
    )


def _options(wanted: Any, given: bytes | None) -> Iterator[dict[str, bytes]]:
    """Other files, from the least change on: the class named, what that class knew by itself, what it did to tokenizer.json."""
    settings = _parsed(given)
    name = type(wanted).__name__
    yield {_SETTINGS: _packed({**settings, "tokenizer_class": _PLAIN if name == "TokenizersBackend" else name})}
    if (backend := getattr(wanted, "backend_tokenizer", None)) is None:
        return
    known = {"padding_side": wanted.padding_side, "model_input_names": list(wanted.model_input_names)}
    known |= {key: str(token) for key, token in wanted.special_tokens_map.items() if not isinstance(token, list)}
    plain = {_SETTINGS: _packed({**known, **settings, "tokenizer_class": _PLAIN})}
    yield plain
    yield {**plain, _WHOLE: f"{json.dumps(json.loads(backend.to_str()), ensure_ascii=False, indent=2)}\n".encode()}


def _told(tokenizer: Any) -> tuple[Any, ...]:
    """What must be the same: ids (with and without what is put around a text), texts made of them, names and sides."""
    special = sorted(map(str, {*tokenizer.all_special_tokens, *list(tokenizer.get_added_vocab())[:8]}))
    texts = [*_TEXTS, *(text for token in special for text in (f"one{token}two", f"one {token} two  {token}\n"))]
    whole = [dict(tokenizer(text)) for text in texts]
    bare = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    back = [tokenizer.decode(each["input_ids"], skip_special_tokens=skip) for each in whole for skip in (False, True)]
    sides = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length, len(tokenizer))
    return whole, bare, back, dict(tokenizer.special_tokens_map), sides


def _told_there(folder: Path) -> tuple[Any, ...] | None:
    """The same of ``folder``; None: no tokenizer can be made of its files, or it fails on some text."""
    try:
        return _told(load_tokenizer(ModelConfig(path=str(folder)), "RUN"))
    except Exception:  # whatever a class raises for files that are not its own, pyo3's too, is an answer: not these
        return None


def _read(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def _parsed(content: bytes | None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(content) if content else {}
    return found


def _packed(settings: dict[str, Any]) -> bytes:
    return f"{json.dumps(settings, ensure_ascii=False, indent=2)}\n".encode()


def _write(folder: Path, files: dict[str, bytes | None]) -> None:
    for name, content in files.items():
        if content is None:
            (folder / name).unlink(missing_ok=True)
        elif _read(folder / name) != content:
            (folder / name).unlink(missing_ok=True)  # the base's may be read-only, and so is its copy
            (folder / name).write_bytes(content)
