"""Metrics of the user's own: functions of an answer and its row, loaded when their task is prepared and not before."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from slimtune.errors import UserError, nearest
from slimtune.evaluate import metrics
from slimtune.evaluate.tasks import Task
from slimtune.train.task_figures import LOWER

_TAKEN = ("accuracy", "macro_f1", *metrics.ROUGE, "rows", *LOWER)
"""Figures that there are, which tables and intervals know by name."""
_HARNESS = ("doc", "doc_id", "target", "arguments", "resps", "filtered_resps", "filter", "metrics")
"""What the harness writes of a row beside its figures."""
_ENDS = ("_low", "_high", "_majority", "_chance", "_se")
"""Ends of the keys that stand beside a figure."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Scorer:
    """A function that was tried on the rows of its task.

    Attributes:
        figures: names of what it gives: its own, or the keys of its dictionary.
        lower: those of them that are the better the lower they are.
        chance: {figure: its mean for the reference answers of other rows}; of a single row nothing.
        sha256: of the function's file.
        origins: ``file:line`` of each row.
    """

    figures: tuple[str, ...]
    lower: tuple[str, ...]
    chance: Mapping[str, float]
    sha256: str
    origins: tuple[str, ...]


def tried(task: Task, docs: Sequence[Mapping[str, Any]], origins: Sequence[str]) -> Scorer:
    """The function of a task, tried on each row with the reference answer of the next one, and on an empty answer.

    What it cannot do shows here, before a model has written anything.

    Args:
        docs: ``prompt``, ``completion`` and ``fields`` (JSON) of each row.

    Raises:
        UserError: the function cannot be loaded, fails, gives no numbers or not the same figures for all rows, or a name of
            a figure cannot be used.
    """
    _load(task)
    figures: list[str] = []
    found = []
    try:
        for number, (doc, other) in enumerate(zip(docs, [*docs[1:], *docs[:1]], strict=True), 1):
            stamped = {**doc, "scoring": settings(task, figures) | {"row": number}}
            found.append(metrics.own(stamped, [other["completion"]]))
            if not figures:
                figures = _named(task, list(found[0]))
                stamped["scoring"] = {**stamped["scoring"], "figures": figures}
                metrics.own(stamped, [""])
    except metrics.Unscored as error:
        raise told(task, error, origins) from error
    means = {name: sum(values[name] for values in found) / len(found) for name in figures} if len(found) > 1 else {}
    return Scorer(tuple(figures), _lower(task, figures), means, _sha256(task), tuple(origins))


def settings(task: Task, figures: Sequence[str], function: str = "") -> dict[str, Any]:
    """What ``metrics.own`` needs to know of a task.

    Args:
        function: where it is, if not where the task's file says.
    """
    return {"task": task.name, "function": function or task.function, "figures": list(figures)}


def told(task: Task, error: metrics.Unscored, origins: Sequence[str]) -> UserError:
    """What to say of an answer that the function gave no figures for."""
    remedy = "SLIMTUNE_DEBUG=1 shows where; it must take any answer, an empty one too"
    if error.__cause__ is None:
        remedy = "return a finite number, True or False, or a dict of such by name, with the same names for every answer"
    return UserError(
        f"task {task.name!r}: {task.file.metric} {error.reason}, on row {error.row} ({origins[error.row - 1]}) with the answer "
        f"{error.answer!r}; {remedy}"
    )


def words(task: Task) -> tuple[str, ...]:
    """What figures of a task depend on besides its rows: what its file says, and the text of its function's file.

    Raises:
        UserError: the function's module is not there.
    """
    unset = set() if task.file.lower_is_better else {"lower_is_better"}  # so that earlier words stay what they are
    return (task.file.model_dump_json(exclude=unset), *([_sha256(task)] if task.function else []))


def _sha256(task: Task) -> str:
    where = task.function.rpartition(":")[0]
    path = Path(where) if where.endswith(".py") else _file_of(where, task)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _file_of(module: str, task: Task) -> Path:
    """A module's file, found without importing anything."""
    first, *rest = module.split(".")
    spec: ModuleSpec | None = importlib.util.find_spec(first)
    for number in range(len(rest)):
        below = spec.submodule_search_locations if spec else None
        name = ".".join([first, *rest[: number + 1]])
        spec = PathFinder.find_spec(name, below) if below is not None else None
    if spec is None:
        beside = task.folder / f"{module}.py"
        hint = f" Did you mean {beside.name}:{task.function.rpartition(':')[2]}?" if beside.is_file() else ""
        raise _unusable(task, f"no module {module!r} is installed here.{hint} Install it, or give FILE.py:FUNCTION")
    if not spec.has_location or not spec.origin:
        raise _unusable(task, f"the module {module!r} has no file; name a module whose text can be compared")
    return Path(spec.origin)


def _load(task: Task) -> None:
    """Raise UserError unless there is a function that can be called with an answer and a row."""
    _sha256(task)  # which says what is missing before anything is run
    where, _, name = task.function.rpartition(":")
    metrics.function.cache_clear()  # the file may have changed since
    try:
        module = metrics.module(where)
    except (Exception, SystemExit) as error:  # a script's exit too: it would end the command without a word
        beside = isinstance(error, ModuleNotFoundError) and (task.folder / f"{error.name}.py").is_file()
        hint = f" (a file is read alone, without {error.name}.py beside it: put both into one)" if beside else ""  # type: ignore[union-attr]
        raise _unusable(task, f"{where} cannot be loaded: {type(error).__name__}: {error}{hint}") from error
    if not hasattr(module, name):
        own = {key: value for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        known = [key for key, value in own.items() if callable(value) and not key.startswith("_")]
        has = f"It has {', '.join(known[:9])}{', ...' * (len(known) > 9)}" if known else "It has none"
        raise _unusable(task, f"{where} has no function {name!r}.{nearest(name, known)} {has}")
    _check_call(task, getattr(module, name))


def _check_call(task: Task, function: Any) -> None:
    if not callable(function):
        raise _unusable(task, f"it is no function but {function!r:.60}; give a function of (answer, row)")
    with suppress(ValueError):  # some that are written in C do not tell what they take
        signature = inspect.signature(function)
        try:
            signature.bind("", {})
        except TypeError as error:
            raise _unusable(task, f"it takes {signature}, and is called with (answer, row): {error}") from error


def _unusable(task: Task, reason: str) -> UserError:
    return UserError(f"task {task.name!r}: metric={task.file.metric!r}: {reason}")


def _named(task: Task, names: list[str]) -> list[str]:
    """The names of its figures. Raises UserError where one cannot stand among those of a model, a table or the harness."""
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            reason = "use letters, digits, - and _, with a letter first"
        elif name in (*_TAKEN, *_HARNESS):
            reason = f"that name has a meaning of its own (so have {', '.join((*_TAKEN, *_HARNESS))}); call it something else"
        elif name.endswith(_ENDS):
            reason = f"names that end in {', '.join(_ENDS)} are those of what stands beside a figure; call it something else"
        else:
            continue
        raise _unusable(task, f"its figure {name!r} cannot be called so: {reason}")
    return names


def _lower(task: Task, figures: Sequence[str]) -> tuple[str, ...]:
    """Those of the figures that are the better the lower they are. Raises UserError where a name is none of them."""
    asked = task.file.lower_is_better
    if isinstance(asked, bool):
        return tuple(figures) if asked else ()
    for name in asked:
        if name not in figures:
            known = f"{nearest(name, figures)} It gives {', '.join(figures)}"
            raise UserError(f"task {task.name!r}: lower_is_better: {task.file.metric} gives no figure {name!r}.{known}")
    return asked
