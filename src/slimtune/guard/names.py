"""What a guard may name, and which of a run's figures that is.

``healthcare.pubmedqa.accuracy`` is a figure of a task (the suite may be left out), ``general.bits_per_byte`` that figure of
every followed task of a suite, ``speed.decode_ms`` one of speed, ``ppl`` the run's own perplexity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from slimtune.condition import Condition
from slimtune.errors import UserError, nearest
from slimtune.evaluate.shipped import built_in
from slimtune.evaluate.tasks import Task, find_suites, find_task
from slimtune.recipe import Recipe
from slimtune.train.task_figures import OF_EXPERTS

OWN = {
    "ppl": "perplexity: at steps on validation, at the end on test windows",
    "loss": "the same in nats a token",
    "valid_ppl": "perplexity on validation windows, at the end",
    "accuracy": "of test rows with choices, at the end",
    "parameters": "of the written model",
    "block_ratio": "kept part of the blocks; of experts all that is stored",
    "active_parameters": "that a token uses, of experts",
    "active_ratio": "part of the blocks that a token uses, of experts",
    "bytes": "of the written weights",
    "memory": "most bytes on a GPU while training",
    "seconds": "of training",
}
"""Figures of a run that are of no task."""
AT_STEPS = ("ppl", "loss")
"""Those of them that are taken at every evaluation, as the figures of tasks are."""
SPEED = re.compile(r"speed\.(?:(?:prefill|decode)_ms(?:@(?P<batch>[1-9]\d*))?|first_token_ms|memory_bytes)")
"""Figures of speed: see ``slimtune.bench.named``."""
_OF_TRAINING = ("seconds", "memory")
"""The untuned base has none of these."""
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
            f"guard.{guard}: no such figure of speed; name speed.prefill_ms, speed.decode_ms (of another batch than the "
            "smallest of speed.batches: speed.decode_ms@8), speed.first_token_ms (of one row) or speed.memory_bytes"
        )
    followed = {task.name: task for task in map(find_task, tasks)}
    head, _, rest = guard.partition(".")
    if head in followed:
        return [_of_task(guard, followed[head], rest)]
    if head in built_in("suites"):
        return _of_suite(guard, head, rest, followed)
    known = [*followed, *built_in("suites"), *OWN, "speed"]
    raise UserError(f"guard.{guard}: {head!r} is no figure, followed task or suite.{nearest(head, known)} {_told(followed)}")


def at_steps(figure: str) -> bool:
    """Whether a figure is taken at every evaluation, and not at the end alone."""
    return figure in AT_STEPS or (figure not in OWN and not figure.startswith("speed."))


def _told(followed: dict[str, Task]) -> str:
    tasks = f"tasks of evaluate.tasks: {', '.join(followed)}" if followed else "evaluate.tasks names none to follow"
    return f"Figures: {', '.join(OWN)}, speed.decode_ms; {tasks}"


def _of_suite(guard: str, suite: str, rest: str, followed: dict[str, Task]) -> list[str]:
    """One task of a suite or of one inside it by ``TASK.FIGURE``, or by ``FIGURE`` the suite's own that have it."""
    suites = find_suites([suite])
    own, members = suites.get(suite, []), [task.name for tasks in suites.values() for task in tasks]
    name, _, metric = rest.partition(".")
    if not metric and name not in members:
        return _of_all(guard, suite, own, rest, followed)
    if name not in members:
        raise UserError(f"guard.{guard}: {name!r} is no task of {suite}.{nearest(name, members)} Its: {', '.join(members)}")
    if name not in followed:
        raise UserError(f"guard.{guard}: the run does not follow {name!r}; add it to evaluate.tasks, or drop the guard")
    return [_of_task(guard, followed[name], metric)]


def _of_all(guard: str, suite: str, own: Sequence[Task], metric: str, followed: dict[str, Task]) -> list[str]:
    figures = dict.fromkeys(name for task in own for name in _METRICS.get(task.file.metric, ()))
    if metric not in figures:
        given = f"no task of {suite} has {metric!r}.{nearest(metric, figures)}" if metric else "name a figure."
        raise UserError(f"guard.{guard}: {given} Figures of {suite}: {', '.join(figures)}; or name SUITE.TASK.FIGURE")
    having = [task.name for task in own if metric in _METRICS.get(task.file.metric, ())]
    if not (found := [f"{name}.{metric}" for name in having if name in followed]):
        raise UserError(f"guard.{guard}: the run follows none of {', '.join(having)}; add one to evaluate.tasks, or drop it")
    return found


def _of_task(guard: str, task: Task, metric: str) -> str:
    known = _METRICS.get(task.file.metric, ())  # those of a function are known when it was tried on the task's rows
    if not metric or (known and metric not in known):
        given = f"has no figure {metric!r}.{nearest(metric, known)}" if metric else "has several figures: name one."
        raise UserError(f"guard.{guard}: task {task.name!r} {given} Its: {', '.join(known) or 'those that its function gives'}")
    return f"{task.name}.{metric}"


def check(recipe: Recipe) -> dict[str, list[tuple[str, Condition]]]:
    """``{figure: [(guard, condition), ...]}`` of a recipe.

    Raises:
        UserError: a guard names nothing that the run measures, or is relative to a model that it does not measure.
    """
    found: dict[str, list[tuple[str, Condition]]] = {}
    for name, text in recipe.guard.items():
        condition = Condition.of(text, f"guard.{name}")
        _check_speed(name, condition, recipe)
        if name in OF_EXPERTS and recipe.method != "tomoe":
            raise UserError(
                f"guard.{name}: method={recipe.method} makes no experts, so a token uses all that is stored: "
                f"write {OF_EXPERTS[name]} for {name}"
            )
        for figure in figures_of(name, recipe.evaluate.tasks):
            _check_words(name, figure, condition, recipe)
            found.setdefault(figure, []).append((name, condition))
    _check_alarm(recipe)
    return found


def _check_words(guard: str, figure: str, condition: Condition, recipe: Recipe) -> None:
    """Raise UserError where a model that the condition is relative to is not measured, or has no such figure."""
    start = f"guard.{guard}: {condition.text!r} "
    if "dense" in condition.words:
        if recipe.model.init != "pretrained":
            raise UserError(f"{start}is relative to the base, and model.init={recipe.model.init} has none; give a number")
        if not recipe.evaluate.base and not figure.startswith("speed."):
            raise UserError(f"{start}is relative to the base, which evaluate.base=false leaves unmeasured")
        if figure in _OF_TRAINING:
            raise UserError(f"{start}is relative to the base, which was not trained here; write dense_lora, or a number")
    if "dense_lora" in condition.words:
        if figure == "bytes":
            raise UserError(f"{start}is relative to a model that is not written: write dense for dense_lora")
        if not recipe.evaluate.dense_lora or recipe.method == "finetune":
            other = "; method=finetune has no such reference" if recipe.method == "finetune" else ""
            raise UserError(f"{start}needs evaluate.dense_lora=true: the uncut model tuned on the same tokens{other}")


def _check_speed(name: str, condition: Condition, recipe: Recipe) -> None:
    if not (found := SPEED.fullmatch(name)):
        return
    if recipe.speed.measure is False:
        raise UserError(f"guard.{name}: speed.measure=false leaves it unmeasured; set it to auto, or drop the guard")
    batches = recipe.speed.batches
    if found["batch"] and int(found["batch"]) not in sorted(set(batches))[1:]:
        smallest = f"; the smallest has no @: {name.partition('@')[0]}" if int(found["batch"]) == min(batches) else ""
        raise UserError(f"guard.{name}: speed.batches={list(batches)} does not hold it beside a smaller one; add it{smallest}")
    if "dense_lora" in condition.words:
        raise UserError(f"guard.{name}: the uncut model is as fast tuned as untuned: write dense for dense_lora")


def _check_alarm(recipe: Recipe) -> None:
    alarm = recipe.alarm
    if not recipe.guard and (alarm.command or alarm.webhook or alarm.then == "stop"):
        raise UserError("alarm is set, but guard has no bound that could be left; add one, e.g. guard: {ppl: '<= 2 x dense'}")
