"""The guards of a run while it goes on: which hold, which are broken, which are still to be held to anything."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal, NamedTuple

from slimtune.condition import Condition
from slimtune.errors import UserError
from slimtune.guard.judge import SEARCHES
from slimtune.guard.names import at_steps, figures_of
from slimtune.guard.ruling import Ruling, rule
from slimtune.recipe import Recipe
from slimtune.watch.follow import Watched

Figures = dict[str, float]


class Line(NamedTuple):
    """What is known of a figure and its bound."""

    state: Literal["holds", "BREACHED", "not yet", "at the end"]
    guard: str
    told: str


def references(stages: dict[str, Any]) -> dict[str, Figures]:
    """Validation figures of ``dense`` and ``dense_lora``, as far as a run took them."""
    found = {}
    for word, stage in (("dense", "base"), ("dense_lora", "dense_lora")):
        taken, perplexity = (stages.get("valid") or {}).get(word) or {}, (stages.get(stage) or {}).get("valid_ppl")
        found[word] = {**({"ppl": perplexity} if perplexity is not None else {}), **taken}
    return found


def guards(watched: Watched) -> list[Line]:
    """Each figure that is held to a bound: at the end as it was judged on test rows, before by the validation figures."""
    if watched.state == "finished":
        rulings = [Ruling(**each) for each in watched.summary.get("guard") or ()]
        return [_ruled(ruling) for ruling in rulings]
    if not (recipe := watched.recipe):
        return []
    return [
        _line(watched, recipe, guard, figure, Condition.of(text, guard))
        for guard, text in recipe.guard.items()
        for figure in _figures(guard, recipe.evaluate.tasks)
    ]


def breached(watched: Watched) -> bool:
    """Whether a guard was out of its bound at the end of the run, or ended it."""
    rulings = watched.summary.get("guard") or ()
    return watched.state == "stopped" or (watched.state == "finished" and not all(ruling["holds"] for ruling in rulings))


def _line(watched: Watched, recipe: Recipe, guard: str, figure: str, condition: Condition) -> Line:
    alarm, told = recipe.alarm, f"{guard}{'' if figure in guard else f' ({figure})'}, to be {condition.text}"
    if alarm.begin == "end" or not recipe.evaluate.every or not at_steps(figure):
        return Line("at the end", guard, told)
    rows = watched.seen.evaluated.get("main")
    if not rows or (alarm.begin == "recover" and rows[-1]["phase"] in SEARCHES):
        return Line("not yet", guard, told)
    row = {key.removeprefix("valid_"): value for key, value in rows[-1].items() if key.startswith("valid_")}
    if figure not in row:  # a task of the user's own, whose file is not to be found from here
        return Line("BREACHED" if guard in rows[-1].get("breached", ()) else "holds", guard, told)
    return _ruled(rule(guard, figure, condition, row, references(watched.stages)))


def _ruled(ruling: Ruling) -> Line:
    return Line("holds" if ruling.holds else "BREACHED", ruling.guard, ruling.told)


@lru_cache(maxsize=64)
def _figures(guard: str, tasks: tuple[str, ...]) -> tuple[str, ...]:
    """The figures of a guard; itself, where a task's file is not to be found from here."""
    try:
        return tuple(figures_of(guard, tasks))
    except UserError:
        return (guard,)
