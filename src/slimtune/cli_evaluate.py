"""The command ``slimtune evaluate``; its options are many, so it has a file of its own beside cli.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from slimtune.errors import UserError
from slimtune.text_file import named, write_or_print

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model folder (pruned or not), hub id, or builtin:base-10m.", show_default=False)
]
Suite = Annotated[
    list[str] | None,
    typer.Option("--suite", "-s", metavar="NAME|FILE", help="healthcare, legal, general, or a file; may be repeated."),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--tasks", "-t", metavar="A,B", help="Tasks by name or file, besides those of a suite."),
]
Split = Annotated[str, typer.Option("--split", metavar="test|valid", help="Which rows.")]
Limit = Annotated[
    int | None,
    typer.Option("--limit", metavar="N", help="At most N rows of a task, evenly spaced; of a perplexity N pieces of text."),
]
MaxLength = Annotated[
    int | None,
    typer.Option("--max-length", metavar="N", help="Cut prompts to N tokens, answer included, as data.max_length in training."),
]
Data = Annotated[
    list[str] | None,
    typer.Option("--data", metavar="TASK=FILE", help="Read a task's rows from this file instead; may be repeated."),
]
Batch = Annotated[int, typer.Option("--batch", metavar="N", help="Rows in one pass.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (bfloat16 on a GPU, else float32), float32 or bfloat16.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the intervals' draws.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON; - prints it instead.")]
WriteTasks = Annotated[
    Path | None,
    typer.Option("--write-tasks", metavar="DIR", help="Write the tasks as a folder that plain lm_eval runs."),
]


def evaluate(
    model: Model,
    suite: Suite = None,
    tasks: Tasks = None,
    split: Split = "test",
    limit: Limit = None,
    max_length: MaxLength = None,
    data: Data = None,
    batch: Batch = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = 0,
    as_json: Json = None,
    write_tasks: WriteTasks = None,
) -> None:
    """Measure a model on suites of tasks, with 95% intervals.

    Through lm-evaluation-harness. Rows are read from the folder in SLIMTUNE_DATA where it holds them, else from the hub
    where they are public; a suite's tasks that can be had from neither are skipped and named.
    What a domain costs in general English is part of each suite: WikiText-2 and held-out general text.
    """
    target = named("--json", as_json)
    files = dict(_assignment(item) for item in data or ())
    from slimtune.evaluate.command import Options, evaluate_model
    from slimtune.report.counting import Counting
    from slimtune.runtime import quiet_libraries

    quiet_libraries()
    options = Options(split, limit, max_length, batch, device, dtype, seed)
    with Counting() as counting:
        found = evaluate_model(
            model, suite or (), tasks=tasks or (), data=files, write_tasks=write_tasks, options=options, say=_say, see=counting
        )
    _deliver(found, as_json, target)


def _deliver(found: dict[str, Any], as_json: str | None, target: Path | None) -> None:
    """The table on stdout, or the JSON there, or both."""
    text = json.dumps(found, indent=2, ensure_ascii=False)
    if as_json == "-":
        typer.echo(text)
        return
    from rich.console import Console

    from slimtune.report.evaluation import render

    Console().print(render(found))
    if target is not None:
        write_or_print("--json", target, text + "\n")


def _say(line: str) -> None:
    typer.secho(line, fg=typer.colors.BRIGHT_BLACK, err=True)


def _assignment(item: str) -> tuple[str, str]:
    name, sign, file = item.partition("=")
    if not sign or not name or not file:
        raise UserError(f"--data {item!r} is not of the form TASK=FILE, e.g. mednli=mli_test_v1.jsonl")
    return name, file
