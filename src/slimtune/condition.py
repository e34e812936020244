"""Conditions on figures, as text: ``">= 0.95 x dense"``, ``"<= dense + 0.05"``, ``"< 30"``, ``">= baseline - noise"``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from slimtune.errors import UserError, nearest

WORDS = {
    "dense": "the uncut, untuned model",
    "base": "the same",
    "dense_lora": "the uncut model, tuned on the same tokens (evaluate.dense_lora)",
    "baseline": "the run that another one is checked against",
    "noise": "half the width of the 95% interval of the difference",
}
"""What a condition may be relative to."""
_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_NUMBER = r"\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?"
_TERM = re.compile(rf"(?P<factor>{_NUMBER})?\s*(?P<percent>%)?\s*(?P<times>[x*])?\s*(?P<word>[A-Za-z_]+)?", re.IGNORECASE)
_EXAMPLE = 'write e.g. ">= 0.95 x dense", "<= dense + 0.05" or "<= 30"'


@dataclass(frozen=True)
class Condition:
    """A bound on a figure: a sum of numbers, and of words times numbers.

    Attributes:
        text: as it was written.
        sign: ``<=``, ``>=``, ``<`` or ``>``.
        terms: ``(number, word)``; the word is None of a plain number.
    """

    text: str
    sign: str
    terms: tuple[tuple[float, str | None], ...]

    @classmethod
    def of(cls, text: str | float, name: str = "condition", known: Iterable[str] = WORDS) -> Condition:
        """Read a condition.

        Args:
            name: of the figure that it is for, for messages.
            known: words, of those that there are, which an unknown one is told.

        Raises:
            UserError: it is none.
        """
        written = str(text).strip()
        found = re.match(r"([<>]=?|≤|≥)(?!=)\s*(.+)", written)
        if not found:
            raise UserError(f"{name}: {written!r} does not begin with <=, >=, < or >; {_EXAMPLE}")
        sign = {"≤": "<=", "≥": ">="}.get(found.group(1), found.group(1))
        return cls(written, sign, tuple(_terms(found.group(2), written, name, tuple(known))))

    @property
    def words(self) -> tuple[str, ...]:
        """Those that it is relative to, each once; ``base`` is called ``dense``."""
        return tuple(dict.fromkeys(word for _, word in self.terms if word))

    def limit(self, values: Mapping[str, float]) -> float:
        """The bound, where every one of ``words`` has a value; NaN where one has none."""
        return sum(number * (values.get(word, math.nan) if word else 1.0) for number, word in self.terms)  # fsum may raise

    def holds(self, value: float, values: Mapping[str, float]) -> bool:
        """Whether ``value`` is within the bound; never where either is NaN."""
        return _OPERATORS[self.sign](value, self.limit(values))


def _terms(text: str, whole: str, name: str, known: tuple[str, ...]) -> list[tuple[float, str | None]]:
    """The terms of a sum, with their signs. A sign behind an e is part of a number."""
    pieces = re.split(r"(?<![0-9.]e)\s*([+-])\s*", text.strip(), flags=re.IGNORECASE)
    pieces = ["+", *pieces] if pieces[0] else pieces[1:]  # nothing is before the first sign of "- 0.5"
    return [_term(word, sign, whole, name, known) for sign, word in zip(pieces[::2], pieces[1::2], strict=False)]


def _term(text: str, sign: str, whole: str, name: str, known: tuple[str, ...]) -> tuple[float, str | None]:
    found = _TERM.fullmatch(text.strip())
    factor, word = (found["factor"], found["word"]) if found else (None, None)
    if not found or (factor is None and word is None) or (bool(found["times"]) != (factor is not None and word is not None)):
        raise UserError(f"{name}: {text.strip()!r} in {whole!r} is no number, word or number x word; {_EXAMPLE}")
    if word is not None and word not in WORDS:
        raise UserError(f"{name}: {word!r} in {whole!r} is unknown.{nearest(word, known)} Known words: {', '.join(known)}")
    number = float(factor or 1.0) * (0.01 if found["percent"] else 1.0)
    if not math.isfinite(number):
        raise UserError(f"{name}: {text.strip()!r} in {whole!r} is too large a number; {_EXAMPLE}")
    return (-number if sign == "-" else number), "dense" if word == "base" else word
