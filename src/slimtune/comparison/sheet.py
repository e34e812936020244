"""A table before it is drawn, and how it is drawn: on the screen and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


@dataclass
class Sheet:
    """A table before it is drawn: texts, the best cells, and lines below."""

    kind: Literal["figures", "tasks", "means", "retention", "leads", "runs"]
    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    best: set[tuple[int, int]] = field(default_factory=set)
    """Row and column of the cells to stress."""
    notes: list[str] = field(default_factory=list)
    legend: list[str] = field(default_factory=list)
    """What its signs mean: said once, below all tables that are shown together."""


def render(found: Sequence[Sheet]) -> RenderableType:
    """For a terminal."""
    legend = [Text(f"  {line}", "dim") for line in legend_of(found)]
    return Group(*(_drawn(sheet) for sheet in found), *([Text("signs", "bold"), *legend, Text()] if legend else []))


def markdown(found: Sequence[Sheet], said: Collection[str] = ()) -> str:
    """The same as Markdown, without those lines of the legend that are ``said`` elsewhere."""
    legend = "".join(f"- {line.replace('*', chr(92) + '*')}.\n" for line in legend_of(found) if line not in said)
    return "\n".join([*map(_marked, found), *([legend] if legend else [])])


def legend_of(found: Iterable[Sheet]) -> list[str]:
    """What the signs of these tables mean, each line once."""
    return list(dict.fromkeys(line for sheet in found for line in sheet.legend))


HEADS = {"figures": " ", "tasks": r"\.(?=[a-zA-Z])| (?=\[)"}
"""Where heads of columns are broken (``task.metric [baseline]`` into three lines): no screen is wide enough else."""


def _drawn(sheet: Sheet) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(sheet.columns):
        left = index == 0 or name == "seeds"
        head = re.sub(HEADS[sheet.kind], "\n", name) if sheet.kind in HEADS else name
        table.add_column(Text(head), justify="left" if left else "right", no_wrap=index == 0)
    for number, row in enumerate(sheet.rows):
        best = [(number, column) in sheet.best for column in range(len(row))]
        cells = [row[0], *(cell.replace(" [", "\n[") for cell in row[1:])]  # an interval below its figure, as in the heads
        table.add_row(*(Text(f"▸ {cell}", "bold green") if it else Text(cell) for cell, it in zip(cells, best, strict=True)))
    return Group(
        Text(sheet.title, "bold"),
        table,
        *(Text(f"  {note}", "yellow" if note[:10].isupper() else "dim") for note in sheet.notes),
        Text(),
    )


def _marked(sheet: Sheet) -> str:
    lines = [f"**{sheet.title}**", "", _line(sheet.columns), _line("---" for _ in sheet.columns)]
    for number, row in enumerate(sheet.rows):
        lines.append(_line(f"**{cell}**" if (number, column) in sheet.best else cell for column, cell in enumerate(row)))
    return "\n".join([*lines, "", *(f"{note.replace('*', chr(92) + '*')}.\n" for note in sheet.notes)])


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
