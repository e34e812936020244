"""Rows from sources: text, prompt/completion or chat messages, found by field names or made by templates.

Shapes of a record, in the order they are looked for when the source names no template:
``messages`` (role/content) or ``conversations`` (from/value); ``prompt`` + ``completion``; ``text``.
``choices`` (list of strings) and ``label`` (index or text of the right one) are kept for multiple-choice figures.
"""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from slimtune.data.python_docs import documents
from slimtune.data.records import Record, records
from slimtune.errors import UserError, nearest
from slimtune.sections import Source

BUILTIN = "builtin:"
_HALF = re.compile("[\ud800-\udfff]")
_ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}


@dataclass(frozen=True)
class Row:
    """One document, example or chat; exactly one of ``text``, ``prompt`` + ``completion``, ``messages`` is set.

    Attributes:
        choices: texts of a multiple-choice row, each a possible ``completion``.
        label: index of the right choice.
        origin: ``file:line``, for messages to the user.
        record: all fields of the record that the row was made of, where they were asked for.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    choices: tuple[str, ...] | None = None
    label: int | None = None
    origin: str = ""
    record: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def content(self) -> str:
        """Everything the model would see, joined: what makes two rows the same row."""
        if self.messages is not None:
            return " ".join(message["content"] for message in self.messages)
        return self.text if self.text is not None else f"{self.prompt} {self.completion}"

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of the content after NFKC, casefold and collapsing of white space: the row's identity."""
        text = self.content
        if not text.isascii():
            text = unicodedata.normalize("NFKC", text)
        return hashlib.sha256(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def empty(self) -> bool:
        """Nothing to learn from: no text, no completion, or no message with content."""
        if self.messages is not None:
            return not any(message["content"].strip() for message in self.messages)
        return not (self.text if self.text is not None else self.completion or "").strip()


def read(source: Source) -> list[Row]:
    """The non-empty rows of a source, in its order.

    Raises:
        UserError: the source is missing, damaged or without rows, or a record lacks the fields it needs.
    """
    return read_counted(source)[0]


def read_counted(source: Source, blank: str | None = None, record: bool = False) -> tuple[list[Row], int]:
    """As ``read``, with the number of empty rows that were skipped.

    Args:
        blank: empty texts stay, as this.
        record: rows keep all fields of the records that they were made of.
    """
    check_templates(source)
    rows: list[Row] = []
    skipped = 0
    for origin, fields in _records(source):
        row = _row(fields, origin, source)
        if row.empty:
            skipped += 1
            if blank is None or row.text is None:
                continue
            row = replace(row, text=blank)
        rows.append(replace(row, record=fields) if record else row)
        if len(rows) == source.rows:
            break
    if all(row.empty for row in rows):
        why = f"all of its {skipped} rows are empty" if skipped else "it is empty"
        raise UserError(f"data source {source.path!r} has no usable row: {why}; give a source with text")
    return rows, skipped


def check_templates(source: Source) -> None:
    """Raise UserError unless the source names one shape of row at most."""
    if source.label is not None and (source.completion is not None or not source.choices or source.prompt is None):
        raise UserError(f"data source {source.path!r} has a label: that goes with a prompt and choices, without a completion")
    if source.label is None and (source.prompt is None) != (source.completion is None):
        given, other = ("completion", "prompt") if source.prompt is None else ("prompt", "completion")
        raise UserError(f"data source {source.path!r} has a {given} template but no {other}; give both or neither")
    shapes = [name for name in ("text", "prompt", "messages") if getattr(source, name) is not None]
    if len(shapes) > 1:
        raise UserError(f"data source {source.path!r} has templates for {' and '.join(shapes)}; keep one of them")
    if source.choices and source.prompt is None:
        raise UserError(f"data source {source.path!r} has choices but no prompt and completion; give templates of both")


def _records(source: Source) -> Iterator[Record]:
    if not source.path.startswith(BUILTIN):
        yield from records(source)
    elif source.path == BUILTIN + "python-docs":
        yield from ((f"{source.path}:{name}", {"text": text}) for name, text in documents())
    else:
        raise UserError(f"data source {source.path!r} is not known; the only built-in one is 'builtin:python-docs'")


def _row(fields: Mapping[str, Any], origin: str, source: Source) -> Row:
    if source.text is not None:
        return Row(text=_fill(source.text, fields, origin), origin=origin)
    if source.messages is not None:
        return Row(messages=_messages(_field(source.messages, fields, origin), origin), origin=origin)
    if source.prompt is not None and source.label is not None:
        choices = [_fill(choice, fields, origin) for choice in source.choices]
        label = _label(_fill(source.label, fields, origin), "", choices, origin)
        assert label is not None
        prompt = _fill(source.prompt, fields, origin)
        return Row(prompt=prompt, completion=choices[label], choices=tuple(choices), label=label, origin=origin)
    if source.prompt is not None and source.completion is not None:
        prompt, completion = _fill(source.prompt, fields, origin), _fill(source.completion, fields, origin)
        if source.choices:
            return _chosen(prompt, completion, [_fill(choice, fields, origin) for choice in source.choices], origin)
        return _example(prompt, completion, fields, origin)
    for name in ("messages", "conversations"):
        if name in fields:
            return Row(messages=_messages(fields[name], origin), origin=origin)
    if "prompt" in fields and "completion" in fields:
        return _example(_string(fields, "prompt", origin), _string(fields, "completion", origin), fields, origin)
    if "text" in fields:
        return Row(text=_string(fields, "text", origin), origin=origin)
    raise _unknown_shape(fields, origin)


def _unknown_shape(fields: Mapping[str, Any], origin: str) -> UserError:
    known = ("messages", "conversations", "prompt", "completion", "text")
    hints = (f" {name!r}:{nearest(name, known)}" for name in fields if name not in known and nearest(name, known))
    return UserError(
        f"{origin}: no row can be made of the fields {sorted(map(str, fields))}; expected messages, or prompt and "
        "completion, or text. Rename the fields or give templates, e.g. data.train=[{path: ..., "
        f'prompt: "{{question}}", completion: " {{answer}}"}}].{"".join(hints)}'
    )


def _chosen(prompt: str, completion: str, choices: list[str], origin: str) -> Row:
    """A row whose completion is one of the recipe's choices."""
    if completion not in choices:
        raise UserError(
            f"{origin}: the completion {completion!r} is none of the choices {choices}; the templates of data's completion and "
            "choices must agree, spaces included"
        )
    label = choices.index(completion)
    return Row(prompt=prompt, completion=completion, choices=tuple(choices), label=label, origin=origin)


def _example(prompt: str, completion: str, fields: Mapping[str, Any], origin: str) -> Row:
    choices = fields.get("choices")
    if not (isinstance(choices, (list, tuple)) and choices and all(isinstance(choice, str) for choice in choices)):
        return Row(prompt=prompt, completion=completion, origin=origin)
    label = _label(fields.get("label"), completion, choices, origin)
    return Row(prompt=prompt, completion=completion, choices=tuple(choices), label=label, origin=origin)


def _label(label: Any, completion: str, choices: Sequence[str], origin: str) -> int | None:
    if label is None:
        return choices.index(completion) if completion in choices else None
    if isinstance(label, str):
        stripped = [choice.strip() for choice in choices]
        if label.strip() in stripped:
            return stripped.index(label.strip())
        if label.strip().isdecimal():
            label = int(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(choices):
        return label
    raise UserError(f"{origin}: label={label!r} is neither one of the choices {list(choices)} nor an index into them")


def _messages(value: Any, origin: str) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{origin}: messages must be a list of {{role, content}}, found {type(value).__name__}")
    return tuple(_message(item, origin) for item in value)


def _message(item: Any, origin: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise UserError(f"{origin}: a message must be {{role, content}}, found {type(item).__name__}")
    if "from" in item and "value" in item:
        item = {"role": _ROLES.get(item["from"], item["from"]), "content": item["value"]}
    for name in ("role", "content"):
        if not isinstance(item.get(name), str):
            found = type(item[name]).__name__ if name in item else f"only the fields {sorted(map(str, item))}"
            raise UserError(f"{origin}: a message needs a string {name!r}, found {found}; convert or remove the row")
    return {**item, "content": _whole(item["content"])}


def _whole(text: str) -> str:
    """Half of a character, which JSON may hold where a text was cut, becomes the sign for one; tokenizers refuse it."""
    return text if text.isascii() else _HALF.sub("\ufffd", text)


def _field(name: str, fields: Mapping[str, Any], origin: str) -> Any:
    if name not in fields:
        known = sorted(map(str, fields))
        raise UserError(
            f"{origin}: no field {name!r}; its fields are {known}.{nearest(name, known)} Name one of them in the source's "
            "template (text, prompt, completion, choices or messages)"
        )
    return fields[name]


def _string(fields: Mapping[str, Any], name: str, origin: str) -> str:
    value = _field(name, fields, origin)
    if value is None or isinstance(value, str):
        return _whole(value or "")
    raise UserError(f"{origin}: field {name!r} must be a string, found {type(value).__name__}; use a template")


class _Template(string.Formatter):
    """``str.format`` with item access only (no attributes of values); lists of strings join by a space."""

    def __init__(self, origin: str):
        self.origin = origin

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, str]:
        first, *rest = field_name.replace("]", "").replace(".", "[").split("[")
        value = _field(first, kwargs, self.origin)
        for name in rest:
            if isinstance(value, (list, tuple)) and name.isdecimal() and int(name) < len(value):
                value = value[int(name)]
            elif isinstance(value, Mapping):
                value = _field(name, value, f"{self.origin}: in {first!r}")
            else:
                raise UserError(f"{self.origin}: {{{field_name}}} finds no {name!r} in {type(value).__name__}")
        return self._plain(value, field_name), first

    def _plain(self, value: Any, name: str) -> Any:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return " ".join(value)
        if isinstance(value, (str, int, float)):
            return value
        raise UserError(
            f"{self.origin}: {{{name}}} in a template must be text, number or list of texts, not {type(value).__name__}"
            + (f"; reach inside, e.g. {{{name}[{next(iter(value))}]}}" if isinstance(value, Mapping) and value else "")
        )


def _fill(template: str, fields: Mapping[str, Any], origin: str) -> str:
    try:
        return _whole(_Template(origin).vformat(template, (), fields))
    except ValueError as error:
        raise UserError(f"template {template!r} is not valid: {error}; double the braces that are not fields") from error
