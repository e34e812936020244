"""A SentencePiece-like BPE (Llama 2, Mistral) as llama.cpp has it (``tokenizer.ggml.model`` = ``llama``), or why it has not.

llama.cpp knows no merges here: of two neighbours it joins those whose text is the token of the highest score, whichever they
are. See ``docs/decisions/0025-sentencepiece-in-gguf.md`` for when that is the same as merges by rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from slimtune.errors import UserError

MARK = "\u2581"
"""A space, in tokens of this kind."""
BYTES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
"""Tokens that stand for the bytes of a character that is no token."""
ELSEWHERE = "use the model's folder as it is"
_MARKED = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
_PREPENDED = {"type": "Prepend", "prepend": MARK}
_DOUBLED = {"type": "Replace", "pattern": {"Regex": f"\\A{MARK}"}, "content": MARK * 2}
"""Makes up for a Metaspace, which puts no space before one; transformers writes it from a SentencePiece model."""
_MORE = "llama.cpp reads one space more before a text that begins with a space, and before"
_TOLD = {"always": f"{_MORE} one after an added token", "first": f"{_MORE} whatever follows an added token"}
"""What llama.cpp, which puts a space before every part of a text, reads otherwise."""


@dataclass(frozen=True)
class Pieces:
    """What a GGUF file says of such a tokenizer beside its tokens.

    Attributes:
        scores: by id.
        space_prefix: a space is put before a text, and after an added token.
        adds_bos, adds_eos: a beginning token is put before every text, an end after it.
        note: texts that llama.cpp reads otherwise all the same; empty: none. (The sign for a space counts as one.)
    """

    scores: Sequence[float]
    space_prefix: bool
    adds_bos: bool
    adds_eos: bool
    note: str


def read(tokenizer: Any, raw: Mapping[str, Any], tokens: Sequence[str], file: Path) -> Pieces:
    """Of a tokenizer as transformers loads it.

    Args:
        raw: what it says of itself, in the form of ``tokenizer.json``. The file itself may say something else: transformers
            takes its vocabulary and merges alone for a ``LlamaTokenizer``.
        tokens: by id, as many as the embedding has rows.
        file: named in messages.

    Raises:
        UserError: it does something to texts that llama.cpp does not.
    """
    added = raw.get("added_tokens", ())
    _check_model(raw["model"], tokens, file)
    names = {token["content"] for token in added}
    space_prefix, note = _spaces(raw, [token for token in tokens if token not in names], file)
    note = _check_added(added, raw.get("normalizer") is not None and space_prefix, file) or note
    adds_bos, adds_eos = _around(tokenizer, file)
    return Pieces(scores(raw["model"], tokens, names, file), space_prefix, adds_bos, adds_eos, note)


def scores(model: Mapping[str, Any], tokens: Sequence[str], added: set[str], file: Path) -> list[float]:
    """By id, so that llama.cpp joins what the merges join, in their order.

    Whatever surrounds them, two neighbours that make up a token's text are those that the text alone comes to, since nothing
    was joined across its ends. So a token has one last pair, and that pair's rank is its score. A token whose last pair is no
    merge stays two tokens here and becomes one in llama.cpp.

    Args:
        added: tokens that are cut out of a text before anything is joined.

    Raises:
        UserError: there is such a token.
    """
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    never = -float(len(ranks) + 1)
    found = []
    for token in tokens:
        pair = None if token in added else _last_pair(token, ranks)
        if pair and pair not in ranks:
            raise UserError(
                f"{str(file)!r} has the token {token!r} and leaves its text as {pair[0]!r} and {pair[1]!r}, which llama.cpp "
                f"would join (no merge makes that token); {ELSEWHERE}"
            )
        found.append(-float(ranks[pair]) if pair else never)
    return found


def _last_pair(text: str, ranks: Mapping[tuple[str, str], int]) -> tuple[str, str] | None:
    """The two parts that merges bring ``text`` to before the last; None if they do not."""
    parts = list(text)
    while len(parts) > 2:
        ranked = [(ranks[pair], index) for index, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not ranked:
            return None
        index = min(ranked)[1]  # the leftmost of equals
        parts[index : index + 2] = [parts[index] + parts[index + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def as_there(tokenizer: Any, text: str) -> str:
    """The text that ``tokenizer`` reads as llama.cpp reads ``text``: another one only where :attr:`Pieces.note` says so."""
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        return text
    scheme = _scheme(
        *(json.loads(part.__getstate__()) if part else None for part in (backend.normalizer, backend.pre_tokenizer))
    )
    if scheme not in _TOLD:
        return text
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    parts = re.split(f"({'|'.join(map(re.escape, added))})", text) if added else [text]
    for place, part in enumerate(parts):
        if part and part not in added and (part.startswith((" ", MARK)) or (scheme == "first" and place)):
            parts[place] = " " + part
    return "".join(parts)


def _check_model(model: Mapping[str, Any], tokens: Sequence[str], file: Path) -> None:
    named = {key: model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")}
    if given := [f"{key}={value!r}" for key, value in named.items() if value]:
        raise UserError(f"{str(file)!r} joins pieces in a way that llama.cpp does not ({given[0]}); {ELSEWHERE}")
    if absent := sorted(BYTES - set(tokens)):
        raise UserError(f"{str(file)!r} has no token {absent[0]!r}: llama.cpp wants one for each of the 256 bytes; {ELSEWHERE}")
    if joined := next((pair for pair in model["merges"] if not BYTES.isdisjoint(pair)), None):
        raise UserError(f"{str(file)!r} joins bytes ({' and '.join(map(repr, joined))}), which llama.cpp does not; {ELSEWHERE}")


def _spaces(raw: Mapping[str, Any], pieces: Sequence[str], file: Path) -> tuple[bool, str]:
    """Whether a space is put before a text, and where llama.cpp puts one that this tokenizer does not."""
    rules, splits = _steps(raw.get("normalizer"), "normalizers"), _steps(raw.get("pre_tokenizer"), "pretokenizers")
    scheme = _scheme(raw.get("normalizer"), raw.get("pre_tokenizer"))
    if not scheme:
        raise UserError(
            f"{str(file)!r} prepares texts by {', '.join(step['type'] for step in (*rules, *splits)) or 'nothing'}; llama.cpp "
            f"only writes {MARK} for a space, and one before a text (Prepend and Replace, or Metaspace); {ELSEWHERE}"
        )
    words = any(step["split"] for step in splits)
    if words and (beyond := next((piece for piece in pieces if MARK in piece[1:]), None)):
        raise UserError(
            f"{str(file)!r} splits texts at spaces and has the token {beyond!r}, which llama.cpp would use; {ELSEWHERE}"
        )
    return scheme != "never", _TOLD.get(scheme, "")


def _scheme(normalizer: Mapping[str, Any] | None, pre_tokenizer: Mapping[str, Any] | None) -> str:
    """Before what a tokenizer puts a space; empty: it does something else, or more.

    ``never``; before ``every`` part of a text between added tokens; ``always``: before every one that does not begin with a
    space; ``first``: before the beginning alone, if that does not.
    """
    rules, splits = _steps(normalizer, "normalizers"), _steps(pre_tokenizer, "pretokenizers")
    if not splits and rules in ([_MARKED], [_PREPENDED, _MARKED]):
        return "never" if rules == [_MARKED] else "every"
    if [step["type"] for step in splits] != ["Metaspace"] or splits[0]["replacement"] != MARK:
        return ""
    scheme = str(splits[0]["prepend_scheme"])
    if rules in ([], [_MARKED]):
        return scheme
    return "every" if rules == [_MARKED, _DOUBLED] and scheme == "always" else ""


def _check_added(added: Sequence[Mapping[str, Any]], prepended: bool, file: Path) -> str:
    """What is read otherwise of tokens that are cut out of a text. Raises UserError where that is any text with one."""
    for token in added:
        if flag := next((flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)), None):
            raise UserError(
                f"{str(file)!r} has the added token {token['content']!r} with {flag}, which llama.cpp has not; {ELSEWHERE}"
            )
    if not (sought := [token for token in added if token.get("normalized") and prepended]):
        return ""
    if plain := next((token["content"] for token in sought if not token.get("special")), None):
        raise UserError(
            f'{str(file)!r} looks for the added token {plain!r} after it has written spaces ("normalized": true), llama.cpp '
            f"before; say false there, or {ELSEWHERE}"
        )
    return f"llama.cpp looks for {sought[0]['content']!r} in a text before it writes spaces, this tokenizer after (normalized)"


def _around(tokenizer: Any, file: Path) -> tuple[bool, bool]:
    """Whether a beginning, and an end, is put around a text."""
    whole, plain = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for adds_bos, adds_eos in ((False, False), (True, False), (False, True), (True, True)):
        if whole == [*([bos] * adds_bos), *plain, *([eos] * adds_eos)]:
            return adds_bos, adds_eos
    raise UserError(
        f"{str(file)!r} puts other tokens around a text than its beginning and its end, which llama.cpp cannot; {ELSEWHERE}"
    )


def _steps(step: Mapping[str, Any] | None, inside: str) -> list[Any]:
    if not step:
        return []
    return list(step[inside]) if step["type"] == "Sequence" else [step]
