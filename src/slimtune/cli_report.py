"""The commands ``slimtune report`` and ``slimtune check``."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from slimtune.errors import UserError
from slimtune.text_file import named, write

Runs = Annotated[list[str], typer.Argument(metavar="RUN", help="Folders of runs (a recipe's out).", show_default=False)]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="By default report.html, in the folder of one run, here of several."),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or one with its summary.json.", show_default=False)]
Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="RUN2", help="Another run that gates may be relative to.", show_default=False),
]
Gates = Annotated[
    str | None, typer.Option("--gates", metavar="FILE", help="Gates in YAML, FIGURE: CONDITION a line.", show_default=False)
]
Gate = Annotated[
    list[str] | None,
    typer.Option(
        "--gate", metavar="FIGURE=CONDITION", help="e.g. 'ppl=<= 1.02 x baseline'; may be repeated.", show_default=False
    ),
]
Junit = Annotated[str | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML.", show_default=False)]
Markdown = Annotated[
    str | None, typer.Option("--markdown", metavar="FILE", help="Write Markdown; - prints it instead.", show_default=False)
]
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write JSON; - prints it instead.", show_default=False)
]


def report(runs: Runs, out: Out = None) -> None:
    """Write one HTML file of a run, or of several side by side, that opens offline.

    What slimtune bench --json and slimtune evaluate --json wrote into a run's folder is part of it.
    """
    from slimtune.report.page import report as write

    typer.echo(str(write(runs, out)))


def check(
    run: Run,
    baseline: Baseline = None,
    gates: Gates = None,
    gate: Gate = None,
    junit: Junit = None,
    markdown: Markdown = None,
    as_json: Json = None,
) -> None:
    """Hold a finished run to gates; exit code 1 when one fails.

    Gates are those given; else the guard of the run's recipe and, with a baseline, that no figure is worse than its own
    beyond noise.
    """
    if [junit, markdown, as_json].count("-") > 1 or junit == "-":
        raise UserError("one of --markdown and --json can be printed with -; JUnit XML and others need a file")
    asked = {"--junit": junit, "--markdown": markdown, "--json": as_json}
    files = {option: named(option, value) for option, value in asked.items()}
    from slimtune.report import verdicts
    from slimtune.report.check import check as hold

    try:
        found = hold(run, baseline, _gates(gate or ()), gates)
    except Exception as error:
        if files["--junit"]:  # a CI server that reads it sees why, and no file of an earlier check
            write("--junit", files["--junit"], verdicts.junit_error(Path(run).name, str(error) or repr(error)))
        if isinstance(error, UserError):
            raise
        traceback.print_exc()  # ours to mend; but 1 would say that a gate failed
        raise typer.Exit(2) from None
    texts = {
        "--junit": verdicts.junit(found),
        "--markdown": verdicts.markdown(found),
        "--json": json.dumps(found.to_dict(), indent=2) + "\n",
    }
    for option, target in files.items():
        if target:
            write(option, target, texts[option])
    if "-" in (markdown, as_json):
        typer.echo(texts["--markdown" if markdown == "-" else "--json"], nl=False)
    else:
        _print(verdicts.render(found))
    if found.failed:
        raise typer.Exit(1)


def _print(table: Any) -> None:
    """On a terminal within its width; in a log, which has no edge, a line a row."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    if not console.is_terminal:
        needed = Measurement.get(console, console.options.update(width=1000), table).maximum
        console = Console(width=max(console.width, needed))
    console.print(table)


def _gates(items: Iterable[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, condition in map(_gate, items):
        if name in given:
            raise UserError(f"--gate {name} is given twice; give one condition a figure")
        given[name] = condition
    return given


def _gate(item: str) -> tuple[str, str]:
    name, sign, condition = item.partition("=")
    if not sign or not name.strip() or not condition.strip():
        raise UserError(f"--gate {item!r} is not of the form FIGURE=CONDITION, e.g. 'ppl=<= 1.02 x baseline'")
    return name.strip(), condition.strip()
