"""Runs of ``n`` words as hashes: what the guard compares.

Words are runs of letters and digits after NFKC and casefold; a row is the set of its runs of ``n`` words (n-grams), each a
64-bit hash. A *unit* is a number: 2 x the index of a row for the whole of it, one more for its prompt alone.

Shape legend: G n-grams (distinct within their unit).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slimtune.data.prompts import ASSISTANT
from slimtune.data.sources import Row

Hashes = NDArray[np.uint64]
Indices = NDArray[np.int64]

LEAST_WORDS = 5
"""A row or prompt of fewer words than n is one gram, its whole; below this it is too generic ("yes") to tell anything."""
CHUNK_WORDS = 1 << 19
"""Words hashed at a time; bounds the memory."""

_BASE = np.uint64(0x9E3779B97F4A7C15)  # any odd number: the hashes of the words are random already
_UNIT = np.uint64(0xD6E8FEB86659FD93)
_PROMPT = np.uint64(0xA5A5F00DCAFE1234)
_ASCII = re.compile("[a-z0-9]+")
_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Chinese and Japanese have no spaces: a word a character
_FORMAT = "".join(each for each in map(chr, range(1 << 16)) if unicodedata.category(each) == "Cf")
_UNSEEN = re.compile(f"[{re.escape(_FORMAT)}]")  # soft hyphens, zero-width spaces: they stand inside words
_WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")


def words(text: str) -> list[str]:
    """The normalised words of a text: case, punctuation, white space, width and unseen characters do not count."""
    if text.isascii():
        return _ASCII.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", _UNSEEN.sub("", text)).casefold())


class Chunk(NamedTuple):
    """[G] units and their n-grams."""

    unit: Indices
    gram: Hashes


def chunks(rows: Sequence[Row], n: int) -> Iterator[Chunk]:
    """The distinct n-grams of every unit, some rows at a time: a long list of words would take more memory than the text."""
    text: list[str] = []
    units: list[int] = []
    lengths: list[int] = []
    for index, row in enumerate(rows):
        head, tail = (words(part) for part in parts(row))
        text += head + tail
        units.append(2 * index)
        lengths.append(len(head) + len(tail))
        if head:
            text += head
            units.append(2 * index + 1)
            lengths.append(len(head))
        if len(text) >= CHUNK_WORDS:
            yield _hashed(text, units, lengths, n)
            text, units, lengths = [], [], []
    if text:
        yield _hashed(text, units, lengths, n)


def parts(row: Row) -> tuple[str, str]:
    """What is asked and what is answered (the last answer of a chat); of a plain text all is the second."""
    if row.messages is None:
        return ("", row.text) if row.text is not None else (row.prompt or "", row.completion or "")
    answers = [at for at, message in enumerate(row.messages) if message["role"] == ASSISTANT]
    said = [message["content"] for message in row.messages]
    last = answers[-1] if answers else 0
    return " ".join(said[:last]), " ".join(said[last:])


def _hashed(text: list[str], units: list[int], lengths: list[int], n: int) -> Chunk:
    # str hashes are 64 bits and salted by process: none of them is kept, and which are equal does not depend on the salt
    code = np.fromiter(map(hash, text), np.int64, len(text)).view(np.uint64)
    unit = np.repeat(np.array(units, np.int64), lengths)
    count = max(len(code) - n + 1, 0)
    gram = reduce(lambda value, at: value * _BASE + code[at : at + count], range(n), np.zeros(count, np.uint64))
    inside = unit[:count] == unit[n - 1 :] if count else np.zeros(0, bool)
    ends = np.cumsum(lengths)
    short = [at for at, length in enumerate(lengths) if LEAST_WORDS <= length < n]
    whole = np.array([hash(" ".join(text[ends[at] - lengths[at] : ends[at]])) for at in short], np.int64).view(np.uint64)
    unit = np.concatenate([unit[:count][inside], np.array(units, np.int64)[short]])
    gram = np.concatenate([gram[inside], whole])
    gram[unit % 2 == 1] ^= _PROMPT  # a prompt is compared with prompts only
    _, first = np.unique(gram + unit.view(np.uint64) * _UNIT, return_index=True)
    return Chunk(unit[first], gram[first])
