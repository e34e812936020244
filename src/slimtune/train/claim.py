"""Whose the output folder is: nothing of an earlier run is touched before the new one has passed its checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import UserError
from slimtune.recipe import Recipe
from slimtune.runtime import RunFolder, rank

_OF_ONE_RUN = ("summary.json", "stages.json", "metrics.jsonl", "checkpoint-*.pt", "*.partial")
"""What a run leaves beside ``recipe.yaml`` and ``model``."""


def open_folder(recipe: Recipe, resume: bool, overwrite: bool) -> RunFolder:
    """The run's folder, as it is.

    Raises:
        UserError: it holds a run that is neither to be continued nor replaced, or one with another recipe.
    """
    stored = Path(recipe.out) / "recipe.yaml"
    if stored.is_file() and not resume and not overwrite:
        raise UserError(f"out={recipe.out!r} already holds a run; continue it with --resume, replace it with --overwrite")
    if stored.is_file() and resume:
        _same_recipe(yaml.safe_load(stored.read_text(encoding="utf-8")), recipe)
    return RunFolder(recipe.out)


def claim(folder: RunFolder, recipe: Recipe, resume: bool) -> None:
    """From here on the folder is this run's (rank 0 acts).

    An earlier run's checkpoints and figures go, so that none is taken for this run's; its ``model`` (whose card tells its
    figures) stays until the new one is complete and takes its place.
    """
    if rank() != 0 or (resume and (folder / "recipe.yaml").is_file()):
        return
    for pattern in _OF_ONE_RUN:
        for path in folder.path.glob(pattern):
            if path.is_file():
                path.unlink()
    folder.write_text("recipe.yaml", recipe.to_yaml())


def _same_recipe(stored: dict[str, Any], recipe: Recipe) -> None:
    now = yaml.safe_load(recipe.to_yaml())
    for key in sorted(set(stored) | set(now)):
        if key != "out" and stored.get(key) != now.get(key):
            old, new = stored.get(key), now.get(key)
            if isinstance(old, dict) and isinstance(new, dict):
                inner = next(name for name in sorted(set(old) | set(new)) if old.get(name) != new.get(name))
                key, old, new = f"{key}.{inner}", old.get(inner), new.get(inner)
            raise UserError(
                f"--resume: {key} is {new!r} now but {old!r} in the run's recipe.yaml; "
                "resume with the same recipe or start anew with --overwrite"
            )
