"""``slimtune compare``. Nothing heavy is imported before the command runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from slimtune.comparison.jobs import Job, Part
    from slimtune.comparison.order import Order
    from slimtune.comparison.rows import Row

ComparisonFiles = Annotated[
    list[Path] | None,
    typer.Argument(metavar="COMPARISON", help="Comparison files (YAML), e.g. recipes/compare/health.yaml.", show_default=False),
]
Jobs = Annotated[int | None, typer.Option(metavar="N", help="Runs side by side.", show_default="1, or one a GPU")]
Gpus = Annotated[
    str | None, typer.Option(metavar="0,1", help="GPUs to deal the runs out to.", show_default="each run sees all")
]
Threads = Annotated[int | None, typer.Option(metavar="N", help="CPU threads of a run.", show_default="cores / jobs")]
Only = Annotated[str | None, typer.Option(metavar="NAME,NAME", help="Only these methods.", show_default="all")]
Keeps = Annotated[
    str | None, typer.Option(metavar="0.6,0.5", help="Only these budgets, and what is not cut.", show_default="all")
]
Seeds = Annotated[str | None, typer.Option(metavar="0,1", help="Only these seeds.", show_default="all")]
Rows = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Raw rows; those it has are kept.", show_default="OUT/rows.json")
]
Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="Of runs, table and figure.", show_default="the comparison's out")
]
TableOnly = Annotated[
    bool,
    typer.Option("--table", help="Run nothing: table and figure of the rows there, or of a part: --only, --keep, --seeds."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Run nothing: list runs, steps and tokens.")]


def compare(
    comparison: ComparisonFiles = None,
    jobs: Jobs = None,
    gpus: Gpus = "",
    threads: Threads = None,
    only: Only = None,
    keep: Keeps = None,
    seeds: Seeds = None,
    rows: Rows = None,
    out: Out = None,
    table: TableOnly = False,
    dry_run: DryRun = False,
) -> None:
    """Methods, budgets and seeds of one recipe: a table and a figure.

    Runs that the same words and the same program have made are taken as they
    are: stop the command and give it again, or make the table in several
    calls and on several machines. Several comparisons share the GPUs and the
    FILE of --rows. --table --rows FILE alone prints any file of rows.
    """
    if table and dry_run:
        raise UserError("--table and --dry-run exclude each other; give one of them")
    from slimtune.comparison.jobs import Part

    part = Part(_items(only, str, "--only"), _items(keep, float, "--keep"), _items(seeds, int, "--seeds"))
    if not comparison:
        if not (table and rows):
            raise UserError("give a comparison file, e.g. recipes/compare/health.yaml, or --table --rows FILE to print rows")
        _show(_there(rows, part), [], [out] if out else [], part)
        return
    from slimtune.comparison.order import order
    from slimtune.comparison.run import side_by_side

    asked = order(comparison, only=part.only, keep=part.keep, seeds=part.seeds, rows=rows, out=out)
    if table:
        _show(_there(asked.rows, part, some=True), asked.jobs, asked.outs, part)
        return
    cards = list(_items(gpus or None, str, "--gpus"))
    many = side_by_side(jobs, cards, threads)
    _warn_of_figure()
    if dry_run:
        _list(asked)
        return
    _execute(asked, many, cards, threads)


def _execute(asked: Order, jobs: int, gpus: list[str], threads: int | None) -> None:
    from slimtune.comparison.jobs import ALL
    from slimtune.comparison.launch import Launcher
    from slimtune.comparison.program import program
    from slimtune.comparison.rows import has_run, key_of
    from slimtune.comparison.run import run

    launcher = Launcher(jobs, gpus, threads)
    try:
        found = run(asked.work, asked.rows, launcher, typer.echo)
    except KeyboardInterrupt:
        typer.secho("interrupted; the same command goes on with the runs that are left", fg=typer.colors.RED, err=True)
        raise typer.Exit(130) from None
    failed = _failed(found, asked.work)  # told before a figure that may not come about
    _show(found, asked.jobs, asked.outs, ALL)
    now, told = program(), {key_of(row) for row in found if row["metric"] == "failed"}  # an older row is no result
    lost = [job.label for job in asked.work if job.key not in told and not has_run(found, job, now)]
    if lost:
        typer.secho(f"no result of {', '.join(lost)}: see above", fg=typer.colors.RED, err=True)
    if failed or lost:
        raise typer.Exit(1)


def _items(text: str | None, kind: Callable[[str], Any], option: str) -> tuple[Any, ...]:
    """What an option lists; nothing where it is not given. An empty list would mean all: it is a variable that is not set."""
    if text is None:
        return ()
    try:
        found = tuple(kind(item.strip()) for item in text.split(",") if item.strip())
    except ValueError as error:
        raise UserError(f"{option} {text!r} is not a list such as {'0.6,0.5' if kind is float else '0,1'}") from error
    if not found:
        raise UserError(f"{option} {text!r} names nothing; give a list, or leave the option out")
    return found


def _there(file: Path, part: Part, some: bool = False) -> list[Row]:
    from slimtune.comparison.rows import check_part, read

    if not (found := read(file)):
        raise UserError(f"there are no rows in {str(file)!r} yet; run the comparison without --table, or give another --rows")
    check_part(found, part, file, some)
    return found


def _warn_of_figure() -> None:
    """Before hours of runs, not after them. They go on: what they are for are the figures of the table."""
    from slimtune.comparison.figure import NEEDS, installed

    if not installed():
        told = f"no figure will be drawn: it {NEEDS} (also later, for --table draws it)"
        typer.secho(told, fg=typer.colors.YELLOW, err=True)


def _show(rows: list[Row], asked: list[Job], outs: list[Path], part: Part) -> None:
    """The table on the screen; into each of ``outs`` the table as Markdown and the figure."""
    from slimtune.comparison.figure import NEEDS, draw, drawable, installed
    from slimtune.comparison.rows import put
    from slimtune.comparison.sheet import markdown, render
    from slimtune.comparison.table import sheets

    found = sheets(rows, asked, part)
    _wide().print(render(found))
    for out in outs:
        put(out / "table.md", markdown(found))
        typer.echo(f"table: {out / 'table.md'}")
        if not installed():
            told = f"no figure: it {NEEDS}, then the same command with --table draws it"
            typer.secho(told, fg=typer.colors.YELLOW, err=True)
        elif drawable(rows, asked, part):
            draw(rows, out / "figure.svg", asked, part)
            typer.echo(f"figure: {out / 'figure.svg'}")
        else:
            typer.echo("no figure: no method has a perplexity at a budget below 1 yet")


def _list(asked: Order) -> None:
    """What would be run. The base need not be here for that."""
    from slimtune.comparison.budgets import check_budgets
    from slimtune.comparison.made import check_ours
    from slimtune.comparison.run import needed, present
    from slimtune.comparison.sheet import render
    from slimtune.comparison.table import listing

    there = present(asked.work, asked.rows)
    todo = [job for job in asked.work if job not in there]
    before = needed(todo)
    check_ours([*before, *todo])
    check_budgets([*before, *todo], absent=True)
    _wide().print(render([listing(asked.work, there, before)]))


def _wide() -> Console:
    """A terminal as it is; a file or a pipe as wide as the tables."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=200)


def _failed(rows: list[Row], work: list[Job]) -> bool:
    from slimtune.comparison.rows import key_of

    asked = {job.key for job in work}
    failed = [row for row in rows if row["metric"] == "failed" and key_of(row) in asked]
    if failed:
        last = str(failed[-1]["value"]).strip().splitlines()[-1]
        typer.secho(f"{len(failed)} of {len(work)} runs failed, the last with: {last}", fg=typer.colors.RED, err=True)
    return bool(failed)
