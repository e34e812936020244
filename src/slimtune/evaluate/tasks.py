"""Tasks and suites: short YAML files, shipped with the package or the user's own. Reads no data."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from slimtune.errors import UserError, nearest
from slimtune.evaluate.shipped import built_in, where
from slimtune.sections import Source

Split = Literal["test", "valid"]
Kind = Literal["choice", "rouge", "perplexity", "own"]
_SPLITS = ("test", "valid")
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_METRICS = ("choice", "rouge", "perplexity")
_FUNCTION = re.compile(r"(?:.*\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):[A-Za-z_]\w*")


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


_F = TypeVar("_F", bound=_File)


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class TaskFile(_File):
    """What a task's file may say."""

    metric: str
    """``choice``: accuracy and macro-F1 of the likeliest choice; ``rouge``: ROUGE-1/2/L of a greedy answer;
    ``perplexity``: of a token, and bits per byte; ``FILE.py:FUNCTION``, a file beside this one, or ``MODULE:FUNCTION``: the
    mean over rows of what a function of the greedy answer and its row gives."""
    sources: tuple[Annotated[dict[str, Any], BeforeValidator(_source)], ...] = Field(min_length=1)
    """Sources as in a recipe (a text is a path); the first that is there is read. ``{split}`` in a path is ``test`` or
    ``valid``, or what the source's own ``splits: {test: ..., valid: ...}`` says; that is also the split of a hub data set."""
    rows: int | None = Field(default=None, gt=0)
    """At most this many rows (of a perplexity: pieces of text), evenly spaced."""
    tokens: int = Field(default=64, gt=0)
    """``rouge``, or a function: at most this many tokens are written."""
    until: tuple[str, ...] = ("\n",)
    """``rouge``, or a function: what ends an answer, besides the end-of-text token."""
    join: str | None = None
    """``perplexity``: the rows are lines of one text; this stands for a row without a word."""
    lower_is_better: bool | tuple[str, ...] = False
    """A function: what it gives is the better the lower it is; or the names of those of its figures that are."""

    @property
    def kind(self) -> Kind:
        """The metric, or ``own`` for a function."""
        return cast("Kind", self.metric) if self.metric in _METRICS else "own"

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        if value not in _METRICS and not _FUNCTION.fullmatch(value):
            what = "it names no function" if value.endswith((".py", ".py:")) else "it is no metric"
            raise ValueError(
                f"{what}.{nearest(value, _METRICS)} Give {', '.join(_METRICS)}, FILE.py:FUNCTION, or MODULE:FUNCTION"
            )
        return value

    @field_validator("lower_is_better", mode="before")
    @classmethod
    def _known_direction(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("metric") in _METRICS:
            raise ValueError(f"it goes with a function; which way metric: {info.data['metric']} is the better is known")
        if isinstance(value, (bool, str)) or (isinstance(value, list) and all(isinstance(name, str) for name in value)):
            return (value,) if isinstance(value, str) else value
        raise ValueError("give true, or a list of names of figures")


class SuiteFile(_File):
    """What a suite's file may say."""

    tasks: tuple[str, ...] = ()
    """Names of tasks, or files beside this one."""
    suites: tuple[str, ...] = ()
    """Suites that belong to this one."""


@dataclass(frozen=True)
class Task:
    """A task by name, with its file and the folder that its paths are relative to.

    Attributes:
        about: the file's comments.
        data: read instead of the path of the file's first source.
    """

    name: str
    file: TaskFile
    folder: Path
    about: str
    data: str | None = None

    def reading(self, data: str | None) -> Task:
        """The same task on rows of another file."""
        return replace(self, data=data)

    @property
    def function(self) -> str:
        """``FILE.py:NAME`` with the file's whole path, or ``MODULE:NAME``, of a metric that is a function; else empty."""
        if self.file.kind != "own":
            return ""
        where, _, name = self.file.metric.rpartition(":")
        return f"{self.folder / Path(where).expanduser()}:{name}" if where.endswith(".py") else self.file.metric

    @property
    def variables(self) -> list[str]:
        """Environment variables that the paths of its sources name."""
        return [name for raw in self.file.sources for name in _VARIABLE.findall(str(raw.get("path", "")))]

    def source(self, raw: Mapping[str, Any], split: Split) -> Source:
        """One of the file's sources for one split.

        Raises:
            UserError: a variable is not set, a key is unknown, or nothing tells the splits apart.
        """
        keys = dict(raw)
        splits = keys.pop("splits", {})
        if not isinstance(splits, Mapping) or not set(splits) <= set(_SPLITS):
            raise UserError(f"task {self.name!r}: splits={splits!r} must be {{test: ..., valid: ...}}")
        path = str(keys.get("path", ""))
        if split != "test" and "{split}" not in path and split not in splits:
            raise UserError(
                f"task {self.name!r} has no {split} rows: its path {path!r} is the same for test and {split}; write {{split}} "
                "into the path, or splits: {test: ..., valid: ...}"
            )
        name = str(splits.get(split, {"valid": "validation"}.get(split, split) if "{split}" not in path else split))
        keys["path"] = self._found(_expanded(path, self.name).replace("{split}", name))
        keys.setdefault("split", name)
        try:
            return Source.model_validate(keys)
        except ValidationError as error:
            raise UserError(f"task {self.name!r}: {_explain(error, Source)}") from error

    def _found(self, path: str) -> str:
        beside = self.folder / Path(path).expanduser()
        return str(beside) if beside.is_file() else path


def _expanded(path: str, task: str) -> str:
    missing = [name for name in _VARIABLE.findall(path) if name not in os.environ]
    if missing:
        raise UserError(f"{missing[0]} is not set")
    return _VARIABLE.sub(lambda match: os.environ[match.group(1)], path)


def find_suites(names: Sequence[str]) -> dict[str, list[Task]]:
    """The tasks of suites, by the suite that names them itself: those of a suite inside another stand under its name.

    Raises:
        UserError: a suite or task is unknown or its file is wrong.
    """
    found: dict[str, list[Task]] = {}
    for name in names:
        _collect(name, Path(), found, ())
    return found


def _collect(name: str, folder: Path, found: dict[str, list[Task]], within: tuple[str, ...]) -> None:
    file = _file(name, folder, "suites")
    if file.stem in within:
        raise UserError(f"suite {name!r} holds itself; take it out of its own suites")
    content = _parsed(file, SuiteFile, "suite")
    if not content.tasks and not content.suites:
        raise UserError(f"suite {name!r} has no tasks; name some: tasks: [{', '.join(built_in('tasks')[:2])}]")
    if file.stem not in found:
        found[file.stem] = [find_task(task, file.parent) for task in content.tasks]
    for other in content.suites:
        _collect(other, file.parent, found, (*within, file.stem))


def find_task(name: str, folder: Path = Path()) -> Task:
    """A task by name or file.

    Args:
        folder: where a file name is looked for first.

    Raises:
        UserError: it is unknown or its file is wrong.
    """
    file = _file(name, folder, "tasks")
    if not _NAME.fullmatch(file.stem):
        raise UserError(f"task file {str(file)!r}: its name becomes the task's: use letters, digits, - and _ only")
    content = _parsed(file, TaskFile, "task")
    comments = [line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    task = Task(file.stem, content, file.parent, " ".join(comments))
    for raw in content.sources:
        _check_keys(task, raw)
    _check_function(task)
    return task


def _check_function(task: Task) -> None:
    """Raise UserError where the file of a function is not there; it is not run before the task is prepared."""
    path = Path(task.function.rpartition(":")[0])
    if path.suffix == ".py" and not path.is_file():
        there = [file.name for file in task.folder.glob("*.py")]
        raise UserError(
            f"task {task.name!r}: metric={task.file.metric!r}: there is no file {str(path)!r}.{nearest(path.name, there)} "
            "Its path is relative to the task's file"
        )


def _check_keys(task: Task, raw: Mapping[str, Any]) -> None:
    """Raise UserError where a source has a key that no source has, or no path; set variables or not."""
    if not raw.get("path"):
        raise UserError(f"task {task.name!r}: a source has no path; name a file, or a data set of the hub")
    for key in raw:
        if key not in Source.model_fields and key != "splits":
            known = [*Source.model_fields, "splits"]
            raise UserError(
                f"task {task.name!r}: unknown key {key!r} of a source.{nearest(key, known)} Known: {', '.join(known)}"
            )


def _file(name: str, folder: Path, kind: Literal["tasks", "suites"]) -> Path:
    """The file of a built-in name or a path."""
    word = kind[:-1]
    if name.endswith((".yaml", ".yml")) or "/" in name:
        for file in (folder / Path(name).expanduser(), Path(name).expanduser()):
            if file.is_file():
                return file.resolve()
        raise UserError(f"{word} file {name!r} does not exist; give a YAML file or one of {', '.join(built_in(kind))}")
    shipped = built_in(kind)
    if name not in shipped:
        other: Literal["tasks", "suites"] = "suites" if kind == "tasks" else "tasks"
        hint = nearest(name, shipped)
        if name in built_in(other):
            hint = f" It is a {other[:-1]}: --{'suite' if other == 'suites' else 'tasks'} {name}."
        raise UserError(f"{word} {name!r} is unknown.{hint} Known: {', '.join(shipped)}; or give a YAML file")
    return where(kind) / f"{name}.yaml"


def _parsed(file: Path, model: type[_F], word: str) -> _F:
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{word} file {str(file)!r} is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{word} file {str(file)!r} must be a mapping of keys to values, not {type(raw).__name__}")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{word} file {str(file)!r}: {_explain(error, model)}") from error


def _explain(error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(model.model_fields)
        return f"unknown key {where!r}.{nearest(where, known)} Known: {', '.join(known)}"
    if first["type"] == "missing":
        return f"{where} is missing; known keys: {', '.join(model.model_fields)}"
    return f"{where}={first['input']!r} is not valid: {first['msg'].removeprefix('Value error, ')}"
