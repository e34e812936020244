"""Whose the output folder is: nothing of an earlier run is touched before the new one has passed its checks."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import UserError
from slimtune.recipe import Recipe
from slimtune.runtime import RunFolder, rank

_RECIPE = "recipe.yaml"
_FOLDERS = ("adapter", "checkpoint-main.shards", "checkpoint-dense_lora.shards")
_FILES = (
    "summary.json",
    "windows.json",
    "stages.json",
    "plan.json",
    "metrics.jsonl",
    "bench.json",
    "checkpoint-main.pt",
    "checkpoint-dense_lora.pt",
)
"""What a run leaves beside ``recipe.yaml`` and ``model``. By full name: a pattern would catch the files of others."""

FREE_ON_RESUME = frozenset(
    {
        "out",
        "track",
        "train.checkpoint_every",
        "train.compile",
        "train.threads",
        "train.shard",
        "evaluate.batch",
        "export.verify",
        "export.dtype",
        "export.adapter",
    }
)
"""Keys that may be others on a resume: none changes what is learned (threads, processes, compiling: but for rounding)."""
FREE_SECTIONS = ("guard", "alarm", "speed")
"""Sections of which that is true as well."""


def open_folder(recipe: Recipe, resume: bool, overwrite: bool) -> RunFolder:
    """The run's folder, as it is.

    Raises:
        UserError: it holds a run that is neither to be continued nor replaced, one with another recipe, or files of
            others under the names that a run writes.
    """
    folder = Path(recipe.out)
    stored = _stored(folder)
    if stored is None:
        # recipe.yaml is what a run writes first: half of one is all that a full disk or a kill then leaves
        foreign = [path.name for path in _of_one_run(folder) if path.name != f"{_RECIPE}.partial"]
        if (folder / _RECIPE).exists():
            foreign.append(_RECIPE)
        foreign += [name for name in _FOLDERS if (folder / name).exists()]
        _refuse(recipe, foreign)
    elif resume:
        _same_recipe(stored, recipe)
    elif not overwrite:
        raise UserError(f"out={recipe.out!r} already holds a run; continue it with --resume, replace it with --overwrite")
    return RunFolder(recipe.out)


def check_model(folder: RunFolder, recipe: Recipe) -> None:
    """Raise UserError where ``model`` in the folder is the run's own base, or not an earlier run's: it is not replaced."""
    model = folder / "model"
    for key, path in (("path", recipe.model.path), ("tokenizer", recipe.model.tokenizer)):
        if path and Path(path).expanduser().resolve() == model.resolve():
            raise UserError(f"model.{key}={path!r} is where out={recipe.out!r} writes its model; choose another out")
    if _stored(folder.path) is None and model.is_dir() and any(model.iterdir()):
        _refuse(recipe, ["model"])


def _refuse(recipe: Recipe, foreign: list[str]) -> None:
    if foreign:
        raise UserError(
            f"out={recipe.out!r} is no folder of a run of ours (it has no recipe.yaml of one) but holds "
            f"{', '.join(sorted(foreign))}, which a run would replace; choose another out"
        )


def _stored(folder: Path) -> dict[str, Any] | None:
    """The recipe of the run in ``folder``; None where there is none, or a recipe.yaml of something else."""
    try:
        raw = yaml.safe_load((folder / _RECIPE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return raw if isinstance(raw, dict) and {"method", "out", "model", "data"} <= set(raw) else None


def _of_one_run(folder: Path) -> list[Path]:
    """The files there that a run writes besides its recipe, and those of them that were left half-written."""
    names = [*_FILES, *(f"{name}.partial" for name in (*_FILES, _RECIPE))]
    return [folder / name for name in names if (folder / name).is_file()]


def claim(folder: RunFolder, recipe: Recipe, resume: bool) -> None:
    """From here on the folder is this run's (rank 0 acts).

    An earlier run's checkpoints and figures go, so that none is taken for this run's; its ``model`` (whose card tells its
    figures) stays until the new one is complete and takes its place. A resumed run keeps everything, but ``recipe.yaml``
    tells what it goes on with.
    """
    if rank() != 0:
        return
    resumed = resume and (folder / _RECIPE).is_file()
    folder.write_text(_RECIPE, recipe.to_yaml())  # first: should the disk be full, the earlier run is still whole
    if not resumed:
        for path in _of_one_run(folder.path):
            path.unlink()
        for name in _FOLDERS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)


def place() -> str | None:
    """The running system and the processes that can be seen in it, as one word; None where it cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def seen_from(folder: Path) -> str | None:
    """The place in which a folder that is not seen to be held is not held: of the run that holds it now.

    None where its lock is not listed there, or not by the numbers that the folder has.
    """
    return place() if is_held(folder) else None


def is_held(folder: Path) -> bool:
    """Whether a run's folder is seen to be held (``RunFolder.held``).

    Read from the system's list of locks: to take the lock in order to find out would turn away a run that begins just then.
    """
    try:
        status, listed = folder.stat(), Path("/proc/locks").read_text(encoding="utf-8")
    except OSError:
        return False
    return f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino} " in listed


def read_stages(file: Path) -> dict[str, Any]:
    """What a run that is resumed has behind it. Raises UserError where it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--resume: {str(file)!r} is damaged ({error}); start anew with --overwrite") from error
    if not isinstance(found, dict):
        raise UserError(f"--resume: {str(file)!r} is damaged (no object); start anew with --overwrite")
    return found


def same_input(stages: dict[str, Any], name: str, now: str, what: str) -> None:
    """Raise UserError where ``what`` a run reads is not what it began with; ``stages`` remembers its fingerprint."""
    if stages.setdefault(name, now) != now:
        raise UserError(f"--resume: the {what} are not those the run began with; restore them or start anew with --overwrite")


def _same_recipe(stored: dict[str, Any], recipe: Recipe) -> None:
    with suppress(UserError, ValueError):  # a key that came after the run's begin had its default then
        stored = yaml.safe_load(type(recipe).model_validate(stored).to_yaml())
    before, now = _flat(stored), _flat(yaml.safe_load(recipe.to_yaml()))
    for key in sorted((set(before) | set(now)) - FREE_ON_RESUME):
        if key.partition(".")[0] in FREE_SECTIONS:
            continue
        old, new = before.get(key), now.get(key)
        if old != new:
            raise UserError(
                f"--resume: {key} is {new!r} now but {old!r} in the run's recipe.yaml; resume with the same recipe (only "
                f"{', '.join(sorted({*FREE_ON_RESUME, *FREE_SECTIONS}))} may change) or start anew with --overwrite"
            )


def _flat(raw: dict[str, Any]) -> dict[str, Any]:
    """``{section.key: value}``; the keys of ``model.config`` are one value."""
    flat: dict[str, Any] = {}
    for name, value in raw.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat
