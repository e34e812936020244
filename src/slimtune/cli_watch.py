"""The command ``slimtune watch``."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run (a recipe's out).", show_default=False)]
Every = Annotated[float, typer.Option("--every", metavar="SECONDS", help="Between looks at the folder.")]
Once = Annotated[bool, typer.Option("--once", help="Show it as it is now, and end.")]
Wait = Annotated[
    bool, typer.Option("--wait", help="Wait for a run that is not there yet; where output is piped, for its end too.")
]


def watch(run: Run, every: Every = 1.0, once: Once = False, wait: Wait = False) -> None:
    """Show a run while it goes on: phases, time left, curves, figures, guards, shape.

    On a terminal until the run ends; piped, once as it is. Exit code 0: finished or going on; 1: a guard is out of its
    bound at the end, or ended the run; 3: broken off.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a sign that an old terminal has not is no reason to end
        sys.stdout.reconfigure(errors="replace")
    from slimtune.watch.view import watch as show

    if code := show(run, every, once, wait):
        raise typer.Exit(code)
