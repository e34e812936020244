"""What a guard may name, and which of a run's figures that is.

``healthcare.pubmedqa.accuracy`` is a figure of a task (the suite may be left out), ``general.bits_per_byte`` that figure of
every followed task of a suite, ``speed.decode_ms`` one of speed, ``ppl`` the run's own perplexity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from slimtune.condition import Condition
from slimtune.errors import UserError, nearest
from slimtune.evaluate.tasks import Task, built_in, find_suites, find_task
from slimtune.recipe import Recipe

OWN = {
    "ppl": "perplexity: at steps on validation, at the end on test windows",
    "loss": "the same in nats a token",
    "valid_ppl": "perplexity on validation windows, at the end",
    "accuracy": "of test rows with choices, at the end",
    "parameters": "of the written model",
    "block_ratio": "kept part of the blocks",
    "bytes": "of the written weights",
    "memory": "most bytes on a GPU while training",
    "seconds": "of training",
}
"""Figures of a run that are of no task."""
SPEED = re.compile(r"speed\.(?:(?:prefill|first_token|decode)_ms(?:@(?P<batch>\d+))?|memory_bytes)")
"""Figures of speed: see ``slimtune.bench.named``."""
_METRICS = {
    "choice": ("accuracy", "macro_f1"),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "perplexity": ("perplexity", "bits_per_byte"),
}
"""Of the kinds of tasks whose metrics are known before they are run."""


def figures_of(guard: str, tasks: Sequence[str]) -> list[str]:
    """The figures, as a run calls them (``task.metric``, ``ppl``, ``speed.decode_ms``), that ``guard`` is for.

    Args:
        tasks: followed by the run (``evaluate.tasks``).

    Raises:
        UserError: it names nothing that the run measures.
    """
    if guard in OWN or SPEED.fullmatch(guard):
        return [guard]
    if guard.startswith("speed."):
        raise UserError(
            f"guard.{guard}: no such figure of speed; name speed.prefill_ms, speed.first_token_ms, speed.decode_ms (of another "
            "batch than the smallest: speed.decode_ms@8) or speed.memory_bytes"
        )
    followed = {task.name: task for task in map(find_task, tasks)}
    head, _, rest = guard.partition(".")
    if head in followed:
        return [_of_task(guard, followed[head], rest)]
    if head in built_in("suites"):
        return _of_suite(guard, head, rest, followed)
    known = [*followed, *built_in("suites"), *OWN, "speed"]
    raise UserError(f"guard.{guard}: {head!r} is no figure, followed task or suite.{nearest(head, known)} {_told(followed)}")


def _told(followed: dict[str, Task]) -> str:
    tasks = f"tasks of evaluate.tasks: {', '.join(followed)}" if followed else "evaluate.tasks names none to follow"
    return f"Figures: {', '.join(OWN)}, speed.decode_ms; {tasks}"


def _of_suite(guard: str, suite: str, rest: str, followed: dict[str, Task]) -> list[str]:
    members = [task.name for tasks in find_suites([suite]).values() for task in tasks]
    name, _, metric = rest.partition(".")
    if metric:
        if name not in members:
            raise UserError(f"guard.{guard}: {name!r} is no task of {suite}.{nearest(name, members)} Its: {', '.join(members)}")
        if name not in followed:
            raise UserError(f"guard.{guard}: the run does not follow {name!r}; add it to evaluate.tasks, or drop the guard")
        return [_of_task(guard, followed[name], metric)]
    own = [task.name for task in find_suites([suite]).get(suite, ())]
    having = [task for task in own if task in followed and rest in _METRICS.get(followed[task].file.metric, ())]
    if not having:
        raise UserError(
            f"guard.{guard}: no task of {suite} with a figure {rest!r} is followed; add one of {', '.join(own)} to "
            "evaluate.tasks, or name SUITE.TASK.FIGURE"
        )
    return [f"{task}.{rest}" for task in having]


def _of_task(guard: str, task: Task, metric: str) -> str:
    known = _METRICS.get(task.file.metric)
    if not metric or (known and metric not in known):
        given = f"has no figure {metric!r}.{nearest(metric, known or ())}" if metric else "has several figures: name one."
        raise UserError(
            f"guard.{guard}: task {task.name!r} {given} Its figures: {', '.join(known or ('those of its metric',))}"
        )
    return f"{task.name}.{metric}"


def check(recipe: Recipe) -> dict[str, list[tuple[str, Condition]]]:
    """``{figure: [(guard, condition), ...]}`` of a recipe.

    Raises:
        UserError: a guard names nothing that the run measures, or is relative to a model that it does not measure.
    """
    found: dict[str, list[tuple[str, Condition]]] = {}
    for name, text in recipe.guard.items():
        condition = Condition.of(text, f"guard.{name}")
        if "dense" in condition.words and not (recipe.evaluate.base and recipe.model.init == "pretrained"):
            raise UserError(f"guard.{name}: {text!r} is relative to the base, which evaluate.base=false leaves unmeasured")
        if "dense_lora" in condition.words and not (recipe.evaluate.dense_lora and recipe.method != "finetune"):
            raise UserError(f"guard.{name}: {text!r} needs evaluate.dense_lora=true: the uncut model tuned on the same tokens")
        _check_speed(name, condition, recipe)
        for figure in figures_of(name, recipe.evaluate.tasks):
            found.setdefault(figure, []).append((name, condition))
    _check_alarm(recipe)
    return found


def _check_speed(name: str, condition: Condition, recipe: Recipe) -> None:
    if not (found := SPEED.fullmatch(name)):
        return
    if recipe.speed.measure is False:
        raise UserError(f"guard.{name}: speed.measure=false leaves it unmeasured; set it to auto, or drop the guard")
    batches = recipe.speed.batches
    if found["batch"] and int(found["batch"]) not in sorted(batches)[1:]:
        raise UserError(f"guard.{name}: speed.batches={list(batches)} does not hold it beside a smaller one; add it")
    if "dense_lora" in condition.words:
        raise UserError(f"guard.{name}: the uncut model is as fast tuned as untuned: write dense for dense_lora")


def _check_alarm(recipe: Recipe) -> None:
    alarm = recipe.alarm
    if not recipe.guard and (alarm.command or alarm.webhook or alarm.then == "stop"):
        raise UserError("alarm is set, but guard has no bound that could be left; add one, e.g. guard: {ppl: '<= 2 x dense'}")


def suite_of(task: str) -> str | None:
    """The shipped suite that a task belongs to itself."""
    return next((suite for suite in built_in("suites") if task in _members(suite)), None)


def _members(suite: str) -> list[str]:
    return [Path(task.name).stem for task in find_suites([suite]).get(suite, ())]
