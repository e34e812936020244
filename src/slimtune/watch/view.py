"""``slimtune watch``: a run's folder looked at until the run ends, on a terminal as a view that is drawn anew."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from slimtune.errors import UserError
from slimtune.watch.bounds import breached
from slimtune.watch.follow import Watched
from slimtune.watch.frame import frame

FINE, BREACHED, BROKEN_OFF, INTERRUPTED = 0, 1, 3, 130
"""Exit codes: well or going on; a guard out of its bound at the end; nobody at it any more; Ctrl-C. Bad input is 2."""
_ENDS = ("SIGTERM", "SIGHUP")
"""Signals that end it with the terminal as it was, and with exit code 128 and their number."""
_REDRAWN = 1.0
"""Seconds after which a terminal that has another size is drawn anew, whatever ``every`` is."""
_LONGEST = 3600.0


def watch(run: str | Path, every: float = 1.0, once: bool = False, wait: bool = False, console: Console | None = None) -> int:
    """Show a run: on a terminal until it ends, elsewhere as it is now.

    Args:
        run: its folder.
        every: seconds between looks.
        once: show it as it is now on a terminal, too.
        wait: for a run that is not there yet, and off a terminal for its end.

    Returns:
        The exit code: ``FINE``, ``BREACHED``, ``BROKEN_OFF`` or ``INTERRUPTED``.

    Raises:
        UserError: there is no run, or ``every`` is no time to wait.
    """
    if not 0.05 <= every <= _LONGEST:
        raise UserError(f"--every {every:g} is no time between looks; give seconds from 0.05 to {_LONGEST:.0f}, e.g. --every 5")
    if once and wait:
        raise UserError("--once and --wait exclude each other: what is not there yet cannot be shown now")
    console = console or Console()
    folder = Path(run).expanduser()
    folder = folder.parent if folder.name in ("summary.json", "recipe.yaml") and folder.is_file() else folder
    watched = Watched(folder)
    try:
        _look(watched, wait)
        if console.is_terminal and not console.is_dumb_terminal and not once:
            _view(watched, every, wait, console)
        while wait and not watched.over:
            time.sleep(every)
            watched.look()
    except KeyboardInterrupt:
        return INTERRUPTED
    _print(watched, console)
    return _code(watched)


def _view(watched: Watched, every: float, wait: bool, console: Console) -> None:
    """Until the run is over: drawn on the terminal's other screen, which leaves what was there as it was."""
    if watched.over:
        return
    live = Live(Text(), console=console, screen=True, auto_refresh=False, vertical_overflow="crop")
    with _ended_by_signals(), live:
        due = time.monotonic() + every
        while not watched.over:
            live.update(frame(watched, console, console.height), refresh=True)
            time.sleep(max(0.0, min(due - time.monotonic(), _REDRAWN)))
            if time.monotonic() >= due:
                due = time.monotonic() + every
                _look(watched, wait)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Inside, signals that would end the process at once leave what is open first."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may ask for signals
        yield
        return
    names = [getattr(signal, name) for name in _ENDS if hasattr(signal, name)]
    before = {name: signal.signal(name, end) for name in names if signal.getsignal(name) is signal.SIG_DFL}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _look(watched: Watched, wait: bool) -> None:
    """Look again. Raises UserError where there is no run, nor one that begins, and none is waited for."""
    watched.look()
    folder = watched.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"RUN {str(folder)!r} is no folder; give the folder of a run (its recipe's out)")
    if wait or watched.state != "absent":
        return
    if not folder.is_dir():
        raise UserError(f"RUN {str(folder)!r} does not exist; give the folder of a run (its recipe's out), or --wait for it")
    if folder.name == "model" and (folder.parent / "recipe.yaml").is_file():
        raise UserError(f"RUN {str(folder)!r} is a run's model: give {str(folder.parent)!r}")
    raise UserError(f"RUN {str(folder)!r} holds no run; give the folder of a run (its recipe's out), or --wait for one in it")


def _print(watched: Watched, console: Console) -> None:
    """The whole frame; off a terminal as lines that end where their text does."""
    if console.is_terminal:
        console.print(frame(watched, console))
        return
    with console.capture() as captured:
        console.print(frame(watched, console))
    console.out("\n".join(line.rstrip() for line in captured.get().splitlines()), highlight=False)


def _code(watched: Watched) -> int:
    if breached(watched):
        return BREACHED
    return BROKEN_OFF if watched.state == "broken off" else FINE
