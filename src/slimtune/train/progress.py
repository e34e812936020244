"""What a person sees while a run goes on: phase, kept ratio, loss, time left. Never silent for more than seconds."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from slimtune.runtime import rank

LINE_EVERY_S = 10.0
_BAR_WIDTH = 16
"""So that a line has room in 80 columns."""


class Progress:
    """A rich bar on a terminal, a line every ten seconds elsewhere; nothing on ranks above 0.

    Args:
        console: where to write; default: stderr.
        costs: ``{phase: cost}`` of all phases of the run in their order, in any unit; what is still to come is taken to
            go on at the speed of the present phase. Without it only this phase's time left is shown.
    """

    def __init__(self, console: Console | None = None, costs: Mapping[str, float] | None = None):
        self.console = console or Console(stderr=True)
        self.costs = dict(costs or {})
        self._bar: RichProgress | None = None
        self._begun = self._printed = time.monotonic()
        self._steps, self._first, self._later, self._warm = 0, 0, 0.0, False

    def say(self, text: str) -> None:
        if rank() == 0:
            self.console.print(text, highlight=False)

    def start(self, phase: str, first: int, steps: int) -> None:
        self._steps, self._first, self._later, self._warm = steps, first, self._cost_after(phase), False
        self._begun = time.monotonic()
        self._printed = 0.0
        if rank() != 0 or not self.console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=_BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        self._bar.start()
        self._bar.add_task(phase, total=steps, completed=first, figures="", left="")

    def step(self, phase: str, step: int, loss: float, kept: float) -> None:
        figures, left = f"kept {kept:6.1%}  loss {loss:.3f}", self._left(step + 1)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step + 1, figures=figures, left=left)
            return
        now = time.monotonic()
        if rank() == 0 and (now - self._printed > LINE_EVERY_S or step + 1 == self._steps):
            self.console.print(f"{phase:<8} {step + 1}/{self._steps}  {figures}  {left}", highlight=False)
            self._printed = now

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _cost_after(self, phase: str) -> float:
        """Of the phases that follow, as a multiple of this one's."""
        names = list(self.costs)
        if not self.costs.get(phase):
            return 0.0
        return sum(self.costs[name] for name in names[names.index(phase) + 1 :]) / self.costs[phase]

    def _left(self, done: int) -> str:
        now = time.monotonic()
        step = (now - self._begun) / max(1, done - self._first)
        if not self._warm:  # the first step, in which kernels are made, says little of those after it
            self._begun, self._first, self._warm = now, done, True
        here = step * (self._steps - done)
        run = f" (run {_clock(here + step * self._steps * self._later)})" if self._later else ""
        return f"left {_clock(here)}{run}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
