"""How far a count of requests has come: a bar on a terminal, a line every ten seconds elsewhere, on stderr."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class Counting:
    """Call it with what is being done, how many are through, and of how many; a new name or total is a new count."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(stderr=True)
        columns = (TextColumn("[bold]{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self.console, transient=True)
        self._now: tuple[str, int] | None = None
        self._printed = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self.console.is_terminal:
            self._line(what, done, total)
            return
        if self._now != (what, total):
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(what, total=total)
            self._bar.start()
            self._now = what, total
        self._bar.update(self._bar.task_ids[0], completed=done)

    def _line(self, what: str, done: int, total: int) -> None:
        if time.monotonic() - self._printed > LINE_EVERY_S:
            self.console.print(f"{what} {done:,}/{total:,}", highlight=False)
            self._printed = time.monotonic()

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._now:  # a bar that never began would leave an empty line
            self._bar.stop()
