"""What ``slimtune watch`` shows of a run at one moment: text that reads well in 60 columns and up, and without colours."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from slimtune.report.made import verb
from slimtune.report.run import read_run
from slimtune.report.verdict import verdict
from slimtune.report.words import clock
from slimtune.watch import panes
from slimtune.watch.follow import Watched
from slimtune.watch.pace import phases

_COLUMNS, _WIDE, _SHAPE = 124, 112, 46
"""Beyond which nothing gets wider; from which the shape stands beside the curves; and what it takes there."""
_ROOMS = ((3, 100, False), (2, 8, False), (1, 8, True), (1, 4, True), (1, 2, True))
"""Lines of bars, most figures, and whether it is tight: from much room to little."""
_STYLES = {"finished": "green", "broken off": "bold red", "stopped": "bold red", "silent": "yellow"}
_CALLED = {"stopped": "stopped by a guard", "absent": "no run yet", "silent": "nothing comes"}


def frame(watched: Watched, console: Console, height: int | None = None) -> RenderableType:
    """The run as it was at the last look, with less of what can be had elsewhere where it is more than ``height`` lines."""
    width, ascii_only = min(console.width, _COLUMNS), console.options.ascii_only
    head = _head(watched)
    found: RenderableType = ""
    for bars, figures, tight in _ROOMS:
        room = panes.Room(width, bars, figures, tight, ascii_only)
        found = Constrain(Group(head, *_parts(watched, room)), width)
        if height is None or len(console.render_lines(found, pad=False)) <= height:
            break
    return found


def _parts(watched: Watched, room: panes.Room) -> list[RenderableType]:
    """Each below an empty line, where there is room; on a wide terminal the shape stands beside curves and figures."""
    wide = room.width >= _WIDE
    left = replace(room, width=room.width - _SHAPE - 2) if wide else room
    curves, figures = panes.curves(watched, left), panes.figures(watched, left)
    shape = panes.shape(watched, replace(room, width=_SHAPE) if wide else room)
    found = [panes.progress(watched, room), curves, figures, panes.guards(watched, room), shape]
    if wide and shape is not None and (curves or figures):
        grid = Table.grid(padding=(0, 2))
        grid.add_column(width=left.width)
        grid.add_column(width=_SHAPE)
        grid.add_row(Group(*_apart([curves, figures], room.tight)[1 - room.tight :]), shape)
        found[1:] = [grid, found[3]]
    return _apart(found, room.tight)


def _apart(parts: Sequence[RenderableType | None], tight: bool) -> list[RenderableType]:
    return [line for part in parts if part is not None for line in ([] if tight else [Text()]) + [part]]


def _head(watched: Watched) -> RenderableType:
    state, recipe = watched.state, watched.recipe
    title = Text.assemble((watched.name, "bold"), "  ", (_CALLED.get(state, state), _STYLES.get(state, "bold cyan")))
    if recipe and recipe.prunes:
        of = "all parameters" if recipe.budget.of == "total" else "the blocks"
        what = "a token to use" if recipe.method == "tomoe" else "to keep"
        title.append(f"  {recipe.method}, {what} {100 * recipe.budget.keep:.4g}% of {of}", "dim")
    elif recipe:
        title.append(f"  {recipe.method}", "dim")
    return Group(title, Text(verdict(read_run(watched.folder)) if state == "finished" else _doing(watched)))


def _doing(watched: Watched) -> str:
    """What the run is at, or why it is at nothing."""
    state, age, where = watched.state, clock(watched.age), _where(watched)
    recipe = watched.recipe
    said = where[0].upper() + where[1:]
    if state == "absent":
        return f"{watched.folder} " + ("holds no run yet." if watched.folder.is_dir() else "is not there yet.")
    if state == "stopped":
        return f"{said}. A guard is out of its bound, and alarm.then=stop; go on with --resume alarm.then=warn."
    if state == "broken off":
        on = f"slimtune {verb(recipe and recipe.method)} {shlex.quote(str(watched.folder / 'recipe.yaml'))} --resume"
        return f"{said}, {age} ago. No process is at it any more; go on with {on}"
    if state == "silent":
        return f"{said}. No step for {age}, and whether a process is still at it cannot be seen from here."
    if watched.age > watched.patience:
        return f"{said}. No step for {age}; a process holds the folder."
    return f"{said}."


def _where(watched: Watched) -> str:
    """Up to where it has come."""
    last = watched.seen.last
    if not watched.claimed:
        return "recipe, data and model are being checked"
    if last is None:
        unmeasured = watched.recipe and watched.recipe.model.init == "pretrained" and "base" not in watched.stages
        return "before the first step" + (": the base is measured" if unmeasured else "")
    found = phases(watched)
    place = next(index for index, phase in enumerate(found) if (phase.stage, phase.name) == (last["stage"], last["phase"]))
    phase, later = found[place], found[place + 1 :]
    name = panes.name_of(phase)
    if phase.steps is None:
        return f"{name}, step {phase.done:,}"
    if phase.done < phase.steps:
        return f"{name}, step {phase.done:,} of {phase.steps:,}"
    if later:
        return f"{name} is done, {panes.name_of(later[0])} comes next"
    return "all steps are done; the model is written and measured"
