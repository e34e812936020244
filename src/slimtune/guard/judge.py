"""Figures held to their bounds: while a run goes on, and at its end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from slimtune.condition import Condition
from slimtune.errors import UserError, nearest
from slimtune.guard.alarm import Alarm
from slimtune.guard.names import at_steps, check
from slimtune.guard.ruling import Figures, Ruling, rule
from slimtune.recipe import Recipe
from slimtune.train.judgement import Breach, Judgement
from slimtune.train.task_figures import OF_EXPERTS

Bounds = Mapping[str, Sequence[tuple[str, Condition]]]
SEARCHES = ("search", "settle", "decide")
"""Phases before the cut."""
_LATER = ("parameters", "block_ratio", *OF_EXPERTS, "bytes", "seconds")
"""Figures that a written model has, and ``Measure`` does not take."""


class Judge:
    """Holds a run's validation figures to the recipe's guards as they come, and sounds the alarm when one leaves its bound.

    Args:
        recipe: with its guards, which are checked.
        say: gets a line for what is told.

    Attributes:
        bounds: ``{figure: [(guard, condition), ...]}``; followed: those whose figures are taken at every evaluation, too.
        references: validation figures of ``dense`` and ``dense_lora``, set when they are taken.

    Raises:
        UserError: a guard or the alarm cannot be used.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]):
        self.recipe, self.say, self.alarm = recipe, say, Alarm(recipe.alarm, recipe.out, say)
        self.bounds = check(recipe)
        some = recipe.alarm.begin != "end" and recipe.evaluate.every > 0
        self.followed = {figure: guards for figure, guards in self.bounds.items() if some and at_steps(figure)}
        self.references: Mapping[str, Figures] = {}
        self.breached: set[tuple[str, str]] = set()

    @property
    def wants_speed(self) -> bool:
        """Whether the written model is to be timed."""
        measure = self.recipe.speed.measure
        return measure is True or (measure == "auto" and any(figure.startswith("speed.") for figure in self.bounds))

    @property
    def needed(self) -> list[str]:
        """Words of ``followed``: models whose validation figures are needed."""
        found = (word for guards in self.followed.values() for _, condition in guards for word in condition.words)
        return list(dict.fromkeys(found))

    def check_names(self, taken: Collection[str], cuda: bool) -> None:
        """Raise UserError where a guard names a figure that this run will not have.

        Args:
            taken: names of the figures that it takes of every model.
            cuda: whether it runs on a GPU, where memory is counted.
        """
        known = {*taken, *_LATER, *(["memory", "speed.memory_bytes"] if cuda else [])}
        for figure, guards in self.bounds.items():
            if figure in known or (figure.startswith("speed.") and figure != "speed.memory_bytes"):
                continue
            start = f"guard.{guards[0][0]}: this run will not have {figure!r}: "
            task, _, metric = figure.partition(".")
            if figure in ("memory", "speed.memory_bytes"):
                raise UserError(f"{start}memory is counted on a GPU alone; drop the guard")
            if not metric:
                lacking = "data.valid has no token" if figure == "valid_ppl" else "no row of data.test has choices and a label"
                raise UserError(f"{start}{lacking}; drop the guard")
            its = [name.partition(".")[2] for name in taken if name.startswith(f"{task}.")]
            raise UserError(f"{start}task {task!r} has no {metric!r}.{nearest(metric, its)} Its figures: {', '.join(its)}")

    def check_references(self, references: Mapping[str, Figures], bounds: Bounds, rows: str) -> None:
        """Raise UserError where a condition is relative to a figure that its model turned out not to have.

        Args:
            bounds: ``bounds`` or ``followed``.
            rows: what the figures were taken on, in words.
        """
        for ruling in self._rulings(bounds, {}, references):
            if ruling.limit is None and not ruling.figure.startswith("speed."):
                raise UserError(
                    f"guard.{ruling.guard}: {ruling.condition!r} cannot be held: what it is relative to has no finite "
                    f"{ruling.figure!r} on {rows}; write a number, or drop the guard"
                )

    def at_step(self, figures: Figures, phase: str, step: int) -> Judgement:
        """Validation figures of a step; of the guards those on figures that are taken at steps."""
        if phase in SEARCHES and self.recipe.alarm.begin == "recover":
            return Judgement()
        return self._judged(self._rulings(self.followed, figures, self.references), {"phase": phase, "step": step})

    def at_end(self, figures: Figures, references: Mapping[str, Figures]) -> tuple[list[Ruling], Judgement]:
        """All figures of the written model, by those of the others on the same rows."""
        rulings = self._rulings(self.bounds, figures, references)
        # of other rows: what is out is told anew, and what is in has come back
        self.breached -= {(ruling.guard, ruling.figure) for ruling in rulings if not ruling.holds}
        return rulings, self._judged(rulings, {"phase": "end", "step": None})

    @staticmethod
    def _rulings(bounds: Bounds, figures: Figures, references: Mapping[str, Figures]) -> list[Ruling]:
        return [
            rule(guard, figure, condition, figures, references)
            for figure, guards in bounds.items()
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
            return Breach(f"guard: {told}. The model is written; the run ends with exit code 1 (alarm.then=stop)")
        return Breach(
            f"guard: {told}, at step {when['step'] + 1} of {when['phase']}. The run stopped (alarm.then=stop) with a "
            "checkpoint: go on with --resume alarm.then=warn, or change the bound; to cut less, raise budget.keep and start "
            "anew"
        )
