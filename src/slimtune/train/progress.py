"""What a person sees while a run goes on: phase, kept ratio, loss, time left. Never silent for more than seconds."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from slimtune.runtime import rank

LINE_EVERY_S = 10.0


class Progress:
    """A rich bar on a terminal, a line every ten seconds elsewhere; nothing on ranks above 0."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        self._bar: RichProgress | None = None
        self._started = self._printed = time.monotonic()
        self._steps, self._first = 0, 0

    def say(self, text: str) -> None:
        if rank() == 0:
            self.console.print(text, highlight=False)

    def start(self, phase: str, first: int, steps: int) -> None:
        self._steps, self._first = steps, first
        self._started = time.monotonic()
        self._printed = 0.0
        if rank() != 0 or not self.console.is_terminal:
            return
        self._bar = RichProgress(
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._bar.start()
        self._bar.add_task(phase, total=steps, completed=first, figures="")

    def step(self, phase: str, step: int, loss: float, kept: float) -> None:
        figures = f"kept {kept:6.1%}  loss {loss:.3f}"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step + 1, figures=figures)
            return
        now = time.monotonic()
        if rank() == 0 and (now - self._printed > LINE_EVERY_S or step + 1 == self._steps):
            done = step + 1 - self._first
            left = (now - self._started) / max(1, done) * (self._steps - step - 1)
            self.console.print(f"{phase:<8} {step + 1}/{self._steps}  {figures}  left {left:.0f} s", highlight=False)
            self._printed = now

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
