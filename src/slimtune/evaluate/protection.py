"""Of which tasks a run, and those that its base and teacher come from, kept the rows from what they learned. Reads no data."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimtune import recipe as recipes
from slimtune.errors import UserError
from slimtune.evaluate.rows import Prepared
from slimtune.evaluate.tasks import Task, find_task
from slimtune.recipe import Recipe
from slimtune.sections import Source


@dataclass(frozen=True)
class Run:
    """What a run says of its rows.

    Attributes:
        rows: {task of ``evaluate.tasks``: SHA-256 of all its test rows}, of a run that has ended; else nothing is known.
        folder: that relative paths of the recipe go by: where the run was started.
    """

    recipe: Recipe
    rows: Mapping[str, str] = field(default_factory=dict)
    folder: Path = Path()


def tell(model: str, tasks: Sequence[Prepared], room: int, say: Callable[[str], None]) -> list[str] | None:
    """Names of the tasks whose rows the runs behind a model did not protect, told in a line; None where it is not known.

    Also told: rows that are read longer than those that the model was tuned on, for which its run gave other figures.

    Args:
        room: tokens at which prompts are cut here.
    """
    try:
        runs = runs_behind(model)
    except UserError as error:
        say(f"what this model was tuned on is not known: {error}")
        return None
    if runs:
        _tell_of_length(runs[0].recipe.data.max_length, tasks, room, say)
    names = not_protected(runs, tasks) if runs else None
    if names:
        say(
            f"their rows were not kept from what this model was tuned on: {', '.join(names)}; name them in evaluate.tasks or "
            "data.protect to have that checked"
        )
    return names


def _tell_of_length(tuned: int, tasks: Sequence[Prepared], room: int, say: Callable[[str], None]) -> None:
    longer = [task.name for task in tasks if task.task.file.kind != "perplexity" and task.longest > tuned]
    if longer and tuned < room:
        say(
            f"rows of {', '.join(longer)} are longer than the {tuned} tokens that this model was tuned on, and are read at "
            f"more here; --max-length {tuned} cuts their prompts as its run does"
        )


def tell_of_base(recipe: Recipe, tasks: Sequence[Prepared], say: Callable[[str], None]) -> None:
    """The same of a run that starts from, or is taught by, another run's model, before it begins."""
    for key, path in _models(recipe):
        try:
            runs = runs_behind(path)
        except UserError as error:
            say(f"[yellow]what {key}={path} was tuned on is not known: {error}[/yellow]")
            continue
        seen = not_protected(runs, tasks)
        seen += [f"data.test ({source.path})" for source in recipe.data.test if not all(_holds(run, source) for run in runs)]
        if seen:
            say(f"[yellow]the run of {key}={path} did not keep these rows from what it learned: {', '.join(seen)}[/yellow]")


def runs_behind(model: str) -> list[Run]:
    """The run that wrote a model, and those that wrote its base, its teacher and theirs; none where no run wrote it.

    Raises:
        UserError: a recipe cannot be read, e.g. one of another version.
    """
    found: dict[Path, Run] = {}
    todo = [Path(model)]
    while todo:
        folder = todo.pop().expanduser().resolve()
        run = folder.parent
        wrote = folder.name == "model" and all((run / name).is_file() for name in ("recipe.yaml", "stages.json"))
        if not wrote or run in found:
            continue
        try:
            rows, began = _read(run / "summary.json").get("task_rows", {}), _read(run / "stages.json").get("cwd", "")
            found[run] = Run(recipes.load(run / "recipe.yaml"), rows, Path(began))
        except UserError as error:
            raise UserError(f"{run / 'recipe.yaml'} cannot be read: {error}") from error
        todo += [found[run].folder / Path(path).expanduser() for _, path in _models(found[run].recipe)]
    return list(found.values())


def not_protected(runs: Sequence[Run], tasks: Sequence[Prepared]) -> list[str]:
    """Names of those tasks whose rows one of the runs did not hold its train and decision rows against.

    A run does so with the rows of its ``evaluate.tasks`` and with those of ``data.test``, ``data.valid`` and ``data.protect``.
    """
    return [task.name for task in tasks if not all(_protects(run, task) for run in runs)]


def _models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.model.init == "pretrained":
        yield "model.path", recipe.model.path
    if recipe.distill.teacher and recipe.method == "atp":
        yield "distill.teacher", recipe.distill.teacher


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _protects(run: Run, task: Prepared) -> bool:
    same = any(_same_task(task.task, other) for other in _followed(run))
    return (same and run.rows.get(task.name, task.whole) == task.whole) or _holds(run, task.origin)


def _holds(run: Run, rows: Source) -> bool:
    data = run.recipe.data
    whole = [file for file in (*data.test, *data.valid, *data.protect) if file.rows is None]
    return any(_same_rows(rows, file, run.folder) for file in whole)


def _followed(run: Run) -> Iterator[Task]:
    for name in run.recipe.evaluate.tasks:
        try:
            yield find_task(name, run.folder)
        except UserError:  # the file of a task is gone, or was named from another folder: it cannot be told which it was
            continue


def _same_task(task: Task, other: Task) -> bool:
    return task.data is None and (task.folder, task.file) == (other.folder, other.file)


def _same_rows(source: Source, other: Source, folder: Path) -> bool:
    path = Path(source.path).expanduser()
    if path.is_file():
        return path.resolve() == (folder / Path(other.path).expanduser()).resolve()
    return (source.path, source.name, source.split) == (other.path, other.name, other.split)
