"""One figure held to its bound, and how it is told. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from slimtune.condition import Condition

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Ruling:
    """One figure and its bound.

    Attributes:
        guard: as the recipe names it.
        figure: as a run calls it.
        condition: as text.
        value: of the figure; None where it was not measured, or is not finite.
        limit: that the condition comes to; None where that of which it is relative to is not known, or not finite.
        holds: whether the figure is within.
        words: values of what the condition is relative to.
    """

    guard: str
    figure: str
    condition: str
    value: float | None
    limit: float | None
    holds: bool
    words: dict[str, float]

    @property
    def told(self) -> str:
        """In a sentence."""
        shown, limit = apart(self.value, self.limit)
        value = f"is {shown}" if shown else "has no finite value"
        bound = f"{self.condition} = {limit}" if self.words and limit else self.condition
        return f"{self.guard}{'' if self.figure in self.guard else f' ({self.figure})'} {value}, to be {bound}"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in summary.json."""
        return asdict(self)


def rule(guard: str, figure: str, condition: Condition, figures: Figures, references: Mapping[str, Figures]) -> Ruling:
    """Hold a figure to its bound; what is not measured, or not finite, is not within.

    Args:
        references: figures of ``dense``, ``dense_lora``, ..., as far as they were taken.
    """
    words = {word: float(references.get(word, {}).get(figure, math.nan)) for word in condition.words}
    value, limit = float(figures.get(figure, math.nan)), condition.limit(words)
    holds = math.isfinite(value) and math.isfinite(limit) and condition.holds(value, words)
    known = {word: number for word, number in words.items() if math.isfinite(number)}  # JSON has no others
    return Ruling(guard, figure, condition.text, _finite(value), _finite(limit), holds, known)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def apart(value: float | None, limit: float | None) -> tuple[str, str]:
    """Both in four digits, or in as many as show that they differ; None is nothing."""
    for digits in range(4, 18):
        texts = tuple("" if number is None else _number(number, digits) for number in (value, limit))
        if texts[0] != texts[1] or value == limit:
            break
    return texts[0], texts[1]


def _number(value: float, digits: int) -> str:
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e15 else f"{value:.{digits}g}"
