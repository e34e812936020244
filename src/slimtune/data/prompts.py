"""Rows to token ids and label masks.

* Text: the document, then EOS. Every token is a target.
* Prompt + completion: tokenised once as the joined string, then EOS; a token that straddles the border belongs to the
  completion. Only completion tokens (and EOS) are targets, unless ``answer_only`` is off.
* Messages: as the tokenizer's chat template renders them, assistant turns as targets: the spans of
  ``{% generation %}`` where the template has them, else found by rendering prefixes. The template writes its own
  special tokens, none are added. A tokenizer without a template gets ``role: content`` lines, then EOS.

BOS stands where the tokenizer itself would put it, and never twice. Tokenizer and vocabulary are never changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from numpy.typing import NDArray
from transformers.utils.chat_template_utils import render_jinja_template

from slimtune.data.sources import Row
from slimtune.errors import UserError

ASSISTANT = "assistant"
ROWS_AT_ONCE = 1000
_GENERATION = re.compile(r"\{%-?\s*generation\b")
Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Encoded:
    """A tokenised row of L tokens.

    Attributes:
        ids: [L] int32 token ids.
        target: [L] bool, True where the token is to be predicted.
        prefix: number of leading special tokens (BOS); kept when the prompt is cut.
        head: index of the first token of the answer (L without one).
    """

    ids: NDArray[np.int32]
    target: NDArray[np.bool_]
    prefix: int
    head: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Rendered:
    """A row as a string and its answers in characters (an end past the text covers EOS); ``bare``: add no specials."""

    text: str
    spans: Spans
    bare: bool = False


def pad_id(tokenizer: Any) -> int:
    """The id to fill windows with: pad, else EOS, else 0. Padding is never a target nor attended to by other tokens."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def encode_texts(rows: Sequence[Row], tokenizer: Any) -> Iterator[NDArray[np.int32]]:
    """[L] int32 for each plain-text row: the BOS the tokenizer adds, the document, EOS."""
    prefix = special_prefix(tokenizer)
    for ids, _ in _tokenise([row.text or "" for row in rows], tokenizer, offsets=False):
        front, back = _specials(ids, prefix, tokenizer.eos_token_id)
        yield np.array([*front, *ids, *back], np.int32)


def encode_examples(rows: Sequence[Row], tokenizer: Any, answer_only: bool = True) -> Iterator[Encoded]:
    """Prompt/completion and chat rows, in order.

    Raises:
        UserError: the tokenizer gives no offsets, or a chat template refuses a row or hides its assistant turns.
    """
    if rows and not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path!r} has no fast version, so answers cannot be located; "
            "name one with a tokenizer.json in model.tokenizer, or use plain-text rows"
        )
    prefix = special_prefix(tokenizer)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        rendered = [_render(row, tokenizer) for row in rows[start : start + ROWS_AT_ONCE]]
        tokens = _tokenise([item.text for item in rendered], tokenizer, offsets=True)
        for item, (ids, offsets) in zip(rendered, tokens, strict=True):
            yield _encoded(item, ids, offsets, tokenizer, prefix, answer_only)


def special_prefix(tokenizer: Any) -> list[int]:
    """The ids the tokenizer itself puts before a text (BOS, or nothing)."""
    full = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = (start for start in range(len(full)) if full[start : start + len(bare)] == bare)
    return list(full[: next(starts, 0)])


def _tokenise(texts: Sequence[str], tokenizer: Any, offsets: bool) -> Iterator[tuple[list[int], Any]]:
    for start in range(0, len(texts), ROWS_AT_ONCE):
        found = tokenizer(
            list(texts[start : start + ROWS_AT_ONCE]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=offsets,
            verbose=False,  # long documents are cut into windows: no warning about the model's length
        )
        yield from zip(found["input_ids"], found["offset_mapping"] if offsets else found["input_ids"], strict=True)


def _specials(ids: list[int], prefix: list[int], eos: int | None) -> tuple[list[int], list[int]]:
    """What goes before and after ``ids``: ``prefix`` and EOS, unless the text itself held them."""
    front = [] if ids[: len(prefix)] == prefix else prefix
    return front, [] if eos is None or ids[-1:] == [eos] else [eos]


def _encoded(item: _Rendered, ids: list[int], offsets: Any, tokenizer: Any, prefix: list[int], answer_only: bool) -> Encoded:
    answer = np.zeros(len(ids), dtype=np.bool_)
    first, last = np.asarray(offsets, dtype=np.int64).reshape(-1, 2).T
    for start, end in item.spans:  # by overlap: a token that straddles a border belongs to the answer
        answer |= (last > start) & (first < end)
    front, back = ([], []) if item.bare else _specials(ids, prefix, tokenizer.eos_token_id)
    closes = bool(item.spans) and item.spans[-1][1] > len(item.text)
    answer = np.concatenate([np.zeros(len(front), np.bool_), answer, np.full(len(back), closes)])
    special = int(ids[:1] == [tokenizer.bos_token_id]) if item.bare else len(prefix)
    head = int(answer.argmax()) if answer.any() else len(answer)
    target = answer if answer_only else np.ones(len(answer), np.bool_)
    return Encoded(np.array([*front, *ids, *back], np.int32), target, min(special, head), head)


def _render(row: Row, tokenizer: Any) -> _Rendered:
    if row.messages is None:
        prompt, completion = row.prompt or "", row.completion or ""
        return _Rendered(prompt + completion, ((len(prompt), len(prompt + completion) + 1),))
    if not tokenizer.chat_template:
        return _plain_chat(row)
    template = tokenizer.get_chat_template()
    try:
        if _GENERATION.search(template):
            return _marked_chat(row, tokenizer, template)
        return _unmarked_chat(row, tokenizer)
    except TemplateError as error:
        raise UserError(
            f"{row.origin}: the tokenizer's chat template refuses this chat: {error}; change its messages or roles"
        ) from error


def _plain_chat(row: Row) -> _Rendered:
    """The fallback of a tokenizer without a chat template: ``role: content`` and a newline for every message."""
    text, spans = "", []
    for message in row.messages or ():
        text += f"{message['role']}:"
        start = len(text)  # the space before the content is part of its first token
        text += f" {message['content']}\n"
        if message["role"] == ASSISTANT:
            spans.append((start, len(text)))
    if spans and spans[-1][1] == len(text):
        spans[-1] = (spans[-1][0], len(text) + 1)  # the chat ends with an answer: EOS is a target
    return _Rendered(text, tuple(spans))


def _marked_chat(row: Row, tokenizer: Any, template: str) -> _Rendered:
    # Spans in characters, not apply_chat_template's token mask: that one is empty where a tokenizer trims the space of
    # an answer's first token from its offsets.
    texts, spans = render_jinja_template(
        conversations=[list(row.messages or ())],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return _Rendered(texts[0], tuple((int(start), int(end)) for start, end in spans[0]), bare=True)


def _unmarked_chat(row: Row, tokenizer: Any) -> _Rendered:
    """Assistant turns found by rendering the chat up to each of them."""
    messages = list(row.messages or ())
    whole = _rendered_text(messages, tokenizer)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            before = _rendered_text(messages[:turn], tokenizer, add_generation_prompt=True) if turn else ""
            start = _common(whole, before)
            spans.append((start, _end_of_turn(whole, start, message["content"], messages[: turn + 1], tokenizer, row)))
    return _Rendered(whole, tuple(spans), bare=True)


def _common(one: str, other: str) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _end_of_turn(whole: str, start: int, content: str, upto: list[Any], tokenizer: Any, row: Row) -> int:
    """Index in ``whole`` after the turn's closing tokens (which the model must learn to write)."""
    content = content.strip()
    at = whole.find(content, start)
    if at < 0:
        raise UserError(
            f"{row.origin}: the chat template rewrites the assistant's words, so they cannot be found in its output; "
            "use a tokenizer whose template has {% generation %} marks"
        )
    partial = _rendered_text(upto, tokenizer)
    close = partial[partial.rfind(content) + len(content) :].rstrip()
    end = at + len(content)
    return end + len(close) if whole.startswith(close, end) else end


def _rendered_text(messages: list[Any], tokenizer: Any, **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
