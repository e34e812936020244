"""The command ``slimtune bench``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from slimtune.errors import UserError
from slimtune.text_file import named, write_or_print

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Folder of a run or of a model, pruned or not, or a GGUF file.", show_default=False),
]
Against = Annotated[
    str | None, typer.Option("--against", metavar="DENSE", help="Another, timed by turns with it.", show_default=False)
]
Batch = Annotated[str, typer.Option("--batch", metavar="N,N", help="Rows at once.")]
Prompt = Annotated[int, typer.Option("--prompt", metavar="N", min=1, help="Tokens of a prompt.")]
Context = Annotated[int, typer.Option("--context", metavar="N", min=1, help="Tokens in the cache before decode steps.")]
Steps = Annotated[int, typer.Option("--steps", metavar="N", min=2, help="Decode steps of one measurement.")]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Turns.")]
Compile = Annotated[bool, typer.Option("--compile", help="Also decode through torch.compile (a GPU; a minute a model).")]
Random = Annotated[bool, typer.Option("--random", help="Draw the weights: a folder needs config.json only.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (bfloat16 on a GPU, else float32), float32, bfloat16 or float16.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON; - prints it instead.")]


def bench(
    model: Model,
    against: Against = None,
    batch: Batch = "1,8,32",
    prompt: Prompt = 512,
    context: Context = 512,
    steps: Steps = 32,
    repeats: Repeats = 5,
    compiled: Compile = False,
    random: Random = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = None,
) -> None:
    """Time a model here: prompts, the first token, decode steps.

    Against another one, both are timed by turns, and held to what the bytes and operations that were saved allow.
    On a GPU decode steps run as generate launches them and as a CUDA graph.
    A GGUF file runs in llama.cpp, on the CPU, one row at a time.
    """
    batches = _batches(batch)
    target = named("--json", as_json)

    from slimtune.bench.command import bench_model
    from slimtune.bench.measure import Settings
    from slimtune.runtime import quiet_libraries

    quiet_libraries()
    hows = ("eager", "graph", *(["compiled graph"] if compiled else []))
    settings = Settings(batches, prompt, context, steps, repeats, hows)
    found = bench_model(model, against=against, settings=settings, device=device, dtype=dtype, random=random, say=_say)
    text = json.dumps(found, indent=2)
    if as_json == "-":
        typer.echo(text)
        return
    from rich.console import Console

    from slimtune.report.speed import render

    Console().print(render(found))
    if target:
        write_or_print("--json", target, text + "\n")


def _batches(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UserError(f"--batch {text} is no list of numbers of rows; give e.g. --batch 1,8,32")
    return found


def _say(line: str) -> None:
    typer.secho(line, fg=typer.colors.BRIGHT_BLACK, err=True)
