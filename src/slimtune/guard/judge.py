"""Figures held to their bounds: while a run goes on, and at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from slimtune.condition import Condition
from slimtune.errors import UserError
from slimtune.guard.alarm import Alarm
from slimtune.guard.names import check
from slimtune.recipe import Recipe
from slimtune.train.judgement import Breach, Judgement

Figures = Mapping[str, float]
SEARCHES = ("search", "settle", "decide")
"""Phases before the cut."""


@dataclass(frozen=True)
class Ruling:
    """One figure and its bound.

    Attributes:
        guard: as the recipe names it.
        figure: as a run calls it.
        condition: as text.
        value: of the figure; None where it was not measured.
        limit: that the condition comes to; None where what it is relative to was not measured.
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
        value = "was not measured" if self.value is None else f"is {self.value:.4g}"
        bound = self.condition if not self.words or self.limit is None else f"{self.condition} = {self.limit:.4g}"
        return f"{self.guard}{'' if self.figure in self.guard else f' ({self.figure})'} {value}, to be {bound}"

    def to_dict(self) -> dict[str, Any]:
        """As it stands in summary.json."""
        return asdict(self)


def rule(guard: str, figure: str, condition: Condition, figures: Figures, references: Mapping[str, Figures]) -> Ruling:
    """Hold a figure to its bound; what is not measured is not within.

    Args:
        references: figures of ``dense``, ``dense_lora``, ..., as far as they were taken.
    """
    words = {word: references.get(word, {}).get(figure, math.nan) for word in condition.words}
    value, limit = float(figures.get(figure, math.nan)), condition.limit(words)
    known = {word: number for word, number in words.items() if not math.isnan(number)}
    holds = condition.holds(value, words)
    return Ruling(guard, figure, condition.text, _finite(value), _finite(limit), holds, known)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Judge:
    """Holds a run's validation figures to the recipe's guards as they come, and sounds the alarm when one leaves its bound.

    Args:
        recipe: with its guards, which are checked.
        say: gets a line for what is told.

    Attributes:
        references: validation figures of ``dense`` and ``dense_lora``, set when they are taken.

    Raises:
        UserError: a guard or the alarm cannot be used.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]):
        self.recipe, self.say, self.alarm = recipe, say, Alarm(recipe.alarm, recipe.out, say)
        self.bounds = check(recipe)
        self.references: dict[str, Figures] = {}
        self.breached: set[tuple[str, str]] = set()

    @property
    def wants_speed(self) -> bool:
        """Whether the written model is to be timed."""
        measure = self.recipe.speed.measure
        return measure is True or (measure == "auto" and any(figure.startswith("speed.") for figure in self.bounds))

    @property
    def at_steps(self) -> bool:
        """Whether figures on the way are held to anything."""
        return bool(self.bounds) and self.recipe.alarm.begin != "end" and self.recipe.evaluate.every > 0

    def check_names(self, figures: Figures) -> None:
        """Raise UserError where a guard names a figure of a task that, as its rows show, the task does not have."""
        for figure, guards in self.bounds.items():
            task, _, metric = figure.partition(".")
            known = [key.partition(".")[2] for key in figures if key.startswith(f"{task}.")]
            if metric and known and figure not in figures and task != "speed":
                raise UserError(f"guard.{guards[0][0]}: task {task!r} has no figure {metric!r}; it has {', '.join(known)}")

    def at_step(self, figures: Figures, phase: str, step: int) -> Judgement:
        """Validation figures of a step; only those that are taken at steps are judged."""
        if not self.at_steps or (phase in SEARCHES and self.recipe.alarm.begin == "recover"):
            return Judgement()
        rulings = [ruling for ruling in self._rulings(figures, self.references) if ruling.figure in figures]
        return self._judged(rulings, {"phase": phase, "step": step})

    def at_end(self, figures: Figures, references: Mapping[str, Figures]) -> tuple[list[Ruling], Judgement]:
        """All figures of the written model, by those of the others on the same rows."""
        rulings = self._rulings(figures, references)
        self.breached.clear()  # of other rows: each is told anew
        return rulings, self._judged(rulings, {"phase": "end", "step": None})

    def _rulings(self, figures: Figures, references: Mapping[str, Figures]) -> list[Ruling]:
        return [
            rule(guard, figure, condition, figures, references)
            for figure, guards in self.bounds.items()
            for guard, condition in guards
        ]

    def _judged(self, rulings: list[Ruling], when: dict[str, Any]) -> Judgement:
        for ruling in rulings:
            key = ruling.guard, ruling.figure
            if not ruling.holds and key not in self.breached:
                self.breached.add(key)
                self.alarm.sound("breach", ruling, when)
            elif ruling.holds and key in self.breached:
                self.breached.remove(key)
                self.alarm.sound("recovered", ruling, when)
        out = [ruling for ruling in rulings if not ruling.holds]
        return Judgement(tuple(sorted({ruling.guard for ruling in out})), self._stop(out, when))

    def _stop(self, out: list[Ruling], when: dict[str, Any]) -> Breach | None:
        if not out or self.recipe.alarm.then != "stop":
            return None
        told = "; ".join(ruling.told for ruling in out)
        if when["step"] is None:
            return Breach(f"guard: {told}. The model is written; the run ends with this code because of alarm.then=stop")
        return Breach(
            f"guard: {told}, at step {when['step']} of {when['phase']}. The run stopped (alarm.then=stop) with a checkpoint: "
            "go on with --resume alarm.then=warn, or change the bound; to cut less, raise budget.keep and start anew"
        )
