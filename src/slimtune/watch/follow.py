"""A run's folder, looked at again and again: of what grows only the new part is read. Takes no lock, writes nothing."""

from __future__ import annotations

import json
import math
import os
import time
from array import array
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from slimtune.errors import UserError
from slimtune.recipe import Recipe, parse
from slimtune.report.files import Row, kept
from slimtune.structure.axes import AXES
from slimtune.structure.plan import Plan
from slimtune.train.claim import is_held, place

State = Literal["absent", "starting", "running", "silent", "broken off", "stopped", "finished"]
"""``silent``: nothing comes, and whether a process is still at it cannot be seen from here. ``stopped``: by a guard."""
LINES = ("adapt_loss", "decide_loss", "valid_ppl", "kept")
"""Figures of which the values of all steps are kept, to be drawn."""
_PATIENCE = 30.0
"""Seconds without a step that need no word, or as many as five steps and an evaluation take."""
_LATEST = 50
"""Steps by which the time of one is told."""
_ENDING = 512
"""Bytes before the end of what was read that must be there still."""


class Tail:
    """A file of JSON lines that grows, and now and then is another one: cut back by ``--resume``, replaced."""

    def __init__(self, file: Path):
        self.file = file
        self._offset, self._ending = 0, b""

    def read(self) -> tuple[list[Row], bool]:
        """The rows of steps that are new, and whether all before them are void. Half a line waits until it is whole."""
        try:
            with self.file.open("rb") as file:
                file.seek(self._offset - len(self._ending))
                # told by what is in it: a new file may have the size, and the number, of one that is gone
                void = file.read(len(self._ending)) != self._ending
                if void:
                    file.seek(0)
                    self._offset, self._ending = 0, b""
                new = file.read()
        except OSError:
            void, self._offset, self._ending = self._offset > 0, 0, b""
            return [], void
        whole = new[: new.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._ending = (self._ending + whole)[-_ENDING:]
        return [row for line in whole.splitlines() if (row := _row(line))], void


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(row, dict) and isinstance(row.get("step"), int) and {"stage", "phase"} <= row.keys()
    return row if whole else None


@dataclass
class Stretch:
    """The steps of a phase.

    Attributes:
        done: steps that are behind it.
        spent: seconds of its steps and evaluations.
        latest, evaluations: seconds of the latest of either.
    """

    done: int = 0
    spent: float = 0.0
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=_LATEST))
    evaluations: deque[float] = field(default_factory=lambda: deque(maxlen=8))

    @property
    def step(self) -> float:
        """Seconds of a step; the slowest two do not count, in which kernels may have been made."""
        found = sorted(self.latest)
        some = found[: max(1, len(found) - 2)]
        return sum(some) / len(some) if some else 0.0

    @property
    def evaluation(self) -> float:
        """Seconds of an evaluation."""
        return sum(self.evaluations) / len(self.evaluations) if self.evaluations else 0.0


class Seen:
    """What the rows of a run came to, in as much memory as its curves take.

    Attributes:
        last: the newest row.
        stretches: by stage and phase, in their order.
        lines: of each stage the values of ``LINES``.
        evaluated: of each stage the last two rows with validation figures.
        shape: the newest row that tells widths.
        widest: most units that any layer was seen with, by axis.
        reopened: part of all units that came back, over all steps.
    """

    def __init__(self) -> None:
        self.last: Row | None = None
        self.stretches: dict[tuple[str, str], Stretch] = {}
        self.lines: dict[str, dict[str, array[float]]] = {}
        self.evaluated: dict[str, deque[Row]] = {}
        self.shape: Row | None = None
        self.widest: dict[str, int] = {}
        self.reopened = 0.0

    @property
    def stage(self) -> str:
        """``main``, or ``dense_lora`` while the reference is tuned."""
        return str(self.last["stage"]) if self.last else "main"

    def add(self, row: Row) -> None:
        """One more step."""
        stage, self.last = row["stage"], row
        stretch = self.stretches.setdefault((stage, row["phase"]), Stretch())
        stretch.done = row["step"] + 1
        if (seconds := number(row, "seconds")) is not None:
            stretch.latest.append(seconds)
            stretch.spent += seconds
        if (seconds := number(row, "evaluate_seconds")) is not None:
            stretch.evaluations.append(seconds)
            stretch.spent += seconds
        lines = self.lines.setdefault(stage, {})
        for name in LINES:
            if (value := number(row, name) if name != "kept" else number({name: kept(row)}, name)) is not None:
                lines.setdefault(name, array("d")).append(value)
        if any(key.startswith("valid_") for key in row):
            self.evaluated.setdefault(stage, deque(maxlen=2)).append(row)
        if all(row.get(f"widths_{axis}") for axis in AXES):
            self.shape = row
            self.reopened += number(row, "reopened") or 0.0
            for axis in AXES:
                self.widest[axis] = max(self.widest.get(axis, 1), *row[f"widths_{axis}"])


def number(row: Mapping[str, Any], key: str) -> float | None:
    """A finite number; None where there is none."""
    value = row.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


class Watched:
    """A run's folder as it was at the last ``look``.

    Attributes:
        claimed: whether the folder is a run's yet.
        recipe: None before that, or where another version wrote it.
        stages, summary: what stands in these files, empty before.
        plan: what was decided, once it is written.
        seen: of the rows.
        held: whether a process is seen to hold the folder.
        age: seconds since anything was written that tells how far it is.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.resolve().name
        self.claimed = False
        self.recipe: Recipe | None = None
        self.stages: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.plan: Plan | None = None
        self.seen, self.held, self.age = Seen(), is_held(folder), 0.0
        self._tail = Tail(folder / "metrics.jsonl")
        self._files: dict[str, tuple[Any, Any]] = {}

    def look(self) -> None:
        """Read what is new.

        Raises:
            UserError: the summary or the plan is damaged.
        """
        self.held = is_held(self.folder)
        self.claimed, self.recipe = self._read("recipe.yaml", _recipe) or (False, None)
        self.stages = self._read("stages.json", _object) or {}
        self.plan = self._read("plan.json", Plan.from_json)
        rows, void = self._tail.read()
        if void:
            self.seen = Seen()
        for row in rows:
            self.seen.add(row)
        self.summary = self._read("summary.json", _object) or {}  # last: what it sums up was written before
        self.age = self._age()

    @property
    def state(self) -> State:
        """How it stands with the run. A summary is an earlier run's where another process has begun to write."""
        if self.summary.get("result") and not self.held:
            return "finished"
        if not self.claimed:
            return "starting" if self.held else "absent"
        if self.held:
            return "running" if self.seen.last else "starting"
        if self.recipe and self.recipe.alarm.then == "stop" and self.seen.last and self.seen.last.get("breached"):
            return "stopped"
        if self.stages.get("place") and self.stages["place"] == place():  # where the run itself was seen to hold it
            return "broken off"
        return "silent" if self.age > self.patience else "running"

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self.state in ("finished", "stopped", "broken off")

    @property
    def patience(self) -> float:
        """Seconds without a step that say nothing."""
        last = self.seen.last
        stretch = self.seen.stretches[last["stage"], last["phase"]] if last else Stretch()
        return max(_PATIENCE, 5 * stretch.step + 2 * stretch.evaluation)

    @property
    def units(self) -> dict[str, list[int]] | None:
        """Units of every layer before the cut, by axis; None where it is not known yet."""
        if self.plan is not None:
            return {axis: [layer[axis] for layer in self.plan.full] for axis in AXES}
        return self.stages.get("units")

    def _age(self) -> float:
        found = (_stat(self.folder / name) for name in ("metrics.jsonl", "stages.json", "recipe.yaml"))
        return max(0.0, time.time() - max((status.st_mtime for status in found if status), default=math.inf))

    def _read(self, name: str, read: Callable[[str], Any]) -> Any:
        """What ``read`` makes of a file; the same again for as long as the file is the same. None where there is none."""
        status = _stat(self.folder / name)
        mark = status and (status.st_ino, status.st_size, status.st_mtime_ns)
        if name not in self._files or self._files[name][0] != mark:
            try:
                found = read((self.folder / name).read_text(encoding="utf-8"))
            except (FileNotFoundError, NotADirectoryError):
                found = None
            except (OSError, ValueError, UserError) as error:
                remedy = "; the run writes it anew with --resume" if name == "summary.json" else ""
                raise UserError(f"{str(self.folder / name)!r} cannot be read ({error}){remedy}") from error
            self._files[name] = mark, found
        return self._files[name][1]


def _stat(file: Path) -> os.stat_result | None:
    try:
        return file.stat()
    except OSError:
        return None


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    return found if isinstance(found, dict) else {}


def _recipe(text: str) -> tuple[bool, Recipe | None]:
    """Whether it is a run's, and what it says to this version."""
    try:
        raw = yaml.safe_load(text)
        if not isinstance(raw, dict) or not {"method", "model"} <= raw.keys():
            return False, None
        return True, parse(raw)
    except yaml.YAMLError:
        return False, None
    except UserError:  # a key that another version had
        return True, None
