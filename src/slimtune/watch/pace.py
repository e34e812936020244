"""How far the phases of a run are, how long a step takes, and how long what is left of them will."""

from __future__ import annotations

from dataclasses import dataclass

from slimtune.recipe import Recipe
from slimtune.watch.follow import Stretch, Watched

Key = tuple[str, str]
"""Stage and phase."""
_SEARCHES = ("search", "decide")
"""Phases that are evaluated at ``evaluate.search_every`` (``SEARCHES`` of the loop, which needs torch)."""


@dataclass(frozen=True)
class Phase:
    """A phase of a run, past, present or still to come.

    Attributes:
        stage: ``main``, or ``dense_lora`` of the reference.
        steps: in all; None where the recipe cannot be read.
        done: of them.
        step: seconds of one; None before the first.
        spent: seconds of its steps and evaluations so far.
        left: seconds that the others will take at the present speed, with their evaluations; None where that is not known.
    """

    stage: str
    name: str
    steps: int | None
    done: int
    step: float | None
    spent: float
    left: float | None


def steps_of(recipe: Recipe) -> dict[Key, int]:
    """The steps of all phases of a run, in the order in which they come; phases without steps are left out."""
    found: dict[Key, int] = {}
    if recipe.method == "finetune":
        found["main", "tune"] = recipe.train.steps
    elif recipe.evaluate.dense_lora:
        found["dense_lora", "tune"] = recipe.updates
    if recipe.method == "atp":
        found["main", "search"], found["main", "settle"] = recipe.search.steps, recipe.settle_steps
        found["main", "recover"] = recipe.recover.steps - recipe.settle_steps
    if recipe.method == "tomoe":
        found["main", "search"], found["main", "recover"] = recipe.search.steps, recipe.recover.steps
    if recipe.method == "twostage":
        found["main", "decide"] = recipe.search.steps if recipe.twostage.scores == "generator" else 0
        found["main", "recover"] = recipe.tuning_steps
    return {key: steps for key, steps in found.items() if steps}


def phases(watched: Watched) -> list[Phase]:
    """All phases, those of which no step is made yet too."""
    seen, steps = watched.seen, steps_of(watched.recipe) if watched.recipe else {}
    now = (str(seen.last["stage"]), str(seen.last["phase"])) if seen.last else None
    found = []
    for key in dict.fromkeys([*steps, *seen.stretches]):
        stretch = seen.stretches.get(key, Stretch())
        count, known = steps.get(key), stretch.step if stretch.latest else None
        left = _left(watched, key, count, now) if now and count else None
        found.append(Phase(*key, count, stretch.done, known, stretch.spent, left))
    return found


def left(found: list[Phase]) -> float | None:
    """Seconds that the steps of all phases will take; None where that is not known of one of them."""
    each = [phase.left for phase in found]
    return None if None in each else sum(seconds for seconds in each if seconds is not None)


def _left(watched: Watched, key: Key, steps: int, now: Key) -> float | None:
    """Seconds; of a phase that is still to come by what its steps cost beside those of the present one."""
    recipe, present = watched.recipe, watched.seen.stretches[now]
    done = watched.seen.stretches.get(key, Stretch()).done
    if done >= steps:
        return 0.0
    if not recipe or len(present.latest) < 2:  # in the first, kernels may be made
        return None
    costs, counts = watched.stages.get("costs") or {}, steps_of(recipe)
    ratio = 1.0
    if key != now:
        if not costs.get(now[1]) or key[1] not in costs or now not in counts:
            return None
        ratio = (costs[key[1]] / steps) / (costs[now[1]] / counts[now])
    evaluate = recipe.evaluate
    every = evaluate.search_every if evaluate.every and evaluate.search_every and key[1] in _SEARCHES else evaluate.every
    evaluations = steps // every - done // every if every else 0
    seconds = [stretch.evaluation for stretch in watched.seen.stretches.values() if stretch.evaluations]
    return (steps - done) * present.step * ratio + evaluations * (seconds[-1] if seconds else 0.0)
