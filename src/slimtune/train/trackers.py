"""What a run tells to trackers, through the classes that accelerate has for them.

All that they are told stands in ``metrics.jsonl`` and ``summary.json`` as well, so a tracker that fails costs no run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from rich.markup import escape

from slimtune.errors import UserError, nearest
from slimtune.recipe import Recipe
from slimtune.runtime import rank
from slimtune.train.tracker_kinds import KINDS, Tracker, figures_in, flat

PAUSE_S, PAUSE_SHARE = 60.0, 20.0
"""A tracker that failed is left alone for so many seconds, and for so many times what the failure took: a server that is gone
lets its caller wait for minutes, which at every step would stop the run."""

_OF_THE_RECIPE = ("seed", "keep")
"""What a summary has from there: no figures."""


def check(names: Sequence[str]) -> None:
    """Raise UserError where a tracker is unknown or its package is not installed."""
    known, available = [str(kind) for kind in LoggerType], [str(kind) for kind in get_available_trackers()]
    for name in names:
        if name not in known:
            hint = nearest(name, known)
            raise UserError(f"track: {name!r} is unknown.{hint} accelerate knows {', '.join(sorted(known))}")
        if name not in available and name != "all":  # accelerate would leave it out without a word
            package = name.replace("_", "-")
            raise UserError(f"track: {name!r} needs the package {package}: pip install {package}, or leave it out")


class Trackers:
    """All trackers of a run. As a context: at its end those that were started end, as failed where an error comes through.

    Args:
        recipe: its ``track`` names them.
        say: how to tell a person of one that fails.

    Raises:
        UserError: a tracker is unknown or its package is not installed.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]):
        check(recipe.track)
        self.recipe, self.say = recipe, say
        self.running: list[Tracker] = []

    def start(self, earlier: Mapping[str, str]) -> dict[str, str]:
        """Begin all; on rank 0 alone, as nothing here does anything on another.

        Args:
            earlier: ``{tracker: id}`` of a run that is resumed, else nothing.

        Returns:
            ``{tracker: id}`` of all that this run told, to be kept for a resume.

        Raises:
            UserError: one cannot start.
        """
        if rank() != 0:
            return dict(earlier)
        wanted = [str(kind) for kind in get_available_trackers()] if "all" in self.recipe.track else self.recipe.track
        # TensorBoard is the one that writes into the folder at once, which is not yet this run's should another fail
        for name in sorted(dict.fromkeys(wanted), key=lambda name: name == "tensorboard"):
            one = KINDS.get(name, Tracker)(name, Path(self.recipe.out), earlier.get(name) or None)
            try:
                one.start(self.recipe)
            except Exception as error:
                with suppress(Exception):  # half of it may be there
                    one.end(failed=True)
                remedy = f"{one.remedy}, or " if one.remedy else ""
                raise UserError(f"track: {name!r} cannot start: {_first_line(error)}; {remedy}leave it out") from error
            self.running.append(one)
        return {**earlier, **{one.name: one.id for one in self.running if one.id}}

    def step(self, row: Mapping[str, Any], step: int) -> None:
        """Tell the figures of a row of ``metrics.jsonl``; ``step`` counts on over the phases of a stage.

        The reference's figures have names of their own, for its steps are the same numbers as the run's.
        """
        prefix = "" if row["stage"] == "main" else f"{row['stage']}/"
        floats = {prefix + name: value for name, value in row.items() if isinstance(value, float)}
        self._each(lambda one: one.log(figures_in(floats), step), "was not told a step")

    def final(self, summary: Mapping[str, Any], metrics: Path) -> None:
        """Tell the summary's numbers as ``final/...``, at the step after the last in the run's ``metrics``."""
        if not self.running:
            return
        rows = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
        steps = sum(row.get("stage") == "main" for row in rows)
        told = {name: value for name, value in summary.items() if name not in _OF_THE_RECIPE}
        told["guard"] = {each["guard"]: {**each, "holds": int(each["holds"])} for each in summary.get("guard", [])}
        figures = figures_in(flat({"final": told}, "/"))
        self._each(lambda one: one.log(figures, steps), "was not told the summary", always=True)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._each(lambda one: one.end(failed=error is not None), "did not end well", always=True)
        self.running.clear()

    def _each(self, act: Callable[[Tracker], None], what: str, always: bool = False) -> None:
        """Do something with every tracker that is not left alone, or with all; one that fails is told of once."""
        for one in self.running:
            begun = time.monotonic()
            if begun < one.silent_until and not always:
                continue
            try:
                act(one)
            except Exception as error:  # a long run is worth more than its curves elsewhere
                now = time.monotonic()
                one.silent_until = now + max(PAUSE_S, PAUSE_SHARE * (now - begun))
                if not one.told_of:
                    self.say(
                        f"[yellow]track: {one.name} {what} ({escape(_first_line(error))}); the run goes on, figures may be "
                        "missing there, and metrics.jsonl has all[/yellow]"
                    )
                one.told_of = True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")
