"""Of which tasks a run kept the rows from what it tuned on, as its recipe says. Reads no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from slimtune import recipe as recipes
from slimtune.errors import UserError
from slimtune.evaluate.rows import Prepared
from slimtune.evaluate.tasks import Task, find_task
from slimtune.recipe import Recipe
from slimtune.sections import Source


def tell(model: str, tasks: Sequence[Prepared], say: Callable[[str], None]) -> list[str] | None:
    """Names of the tasks whose rows the run that wrote a model did not protect, told in a line; None where it is not known."""
    try:
        recipe = recipe_of(model)
    except UserError as error:
        say(f"what this model was tuned on is not known: {Path(model).parent / 'recipe.yaml'} cannot be read: {error}")
        return None
    names = None if recipe is None else not_protected(recipe, tasks)
    if names:
        say(
            f"their rows were not kept from what this model was tuned on: {', '.join(names)}; name them in evaluate.tasks or "
            "data.protect to have that checked"
        )
    return names


def recipe_of(model: str) -> Recipe | None:
    """The recipe of the run that wrote a model; None where none did.

    Raises:
        UserError: it cannot be read, e.g. by another version.
    """
    folder = Path(model).expanduser().resolve()
    run = folder.parent
    if folder.name != "model" or not all((run / name).is_file() for name in ("recipe.yaml", "stages.json")):
        return None
    return recipes.load(run / "recipe.yaml")


def not_protected(recipe: Recipe, tasks: Sequence[Prepared]) -> list[str]:
    """Names of those tasks whose rows a run of the recipe did not hold its train and decision rows against.

    It did so with the rows of its ``evaluate.tasks`` and with those of ``data.test``, ``data.valid`` and ``data.protect``.
    """
    followed = list(_followed(recipe))
    data = recipe.data
    files = [source for source in (*data.test, *data.valid, *data.protect) if source.rows is None]  # else it saw the first ones
    return [
        task.name
        for task in tasks
        if not any(_same_task(task.task, other) for other in followed)
        and not any(_same_rows(task.origin, file) for file in files)
    ]


def _followed(recipe: Recipe) -> Iterator[Task]:
    for name in recipe.evaluate.tasks:
        try:
            yield find_task(name)
        except UserError:  # the file of a task is gone, or was named from another folder: it cannot be told which it was
            continue


def _same_task(task: Task, other: Task) -> bool:
    return task.data is None and (task.folder, task.file) == (other.folder, other.file)


def _same_rows(source: Source, other: Source) -> bool:
    paths = [Path(each.path).expanduser().resolve() for each in (source, other)]
    if paths[0].is_file():
        return paths[0] == paths[1]
    return (source.path, source.name, source.split) == (other.path, other.name, other.split)
