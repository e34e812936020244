"""The command line. Nothing heavy is imported until a command needs it: ``slimtune --help`` answers at once."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from slimtune.cli_bench import bench
from slimtune.cli_evaluate import evaluate
from slimtune.cli_export import apply, export, verify
from slimtune.cli_reference import families, reference
from slimtune.cli_report import check, report
from slimtune.cli_watch import watch
from slimtune.comparison.command import compare
from slimtune.errors import UserError, nearest, out_of_memory
from slimtune.version import __version__


class _Group(TyperGroup):
    """Turns a UserError into one line and exit code 2, and an interrupt into the way to go on."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Refuse a command that there is not in one line as well."""
        if args[0] not in self.commands:
            known = ", ".join(self.commands)
            _complain(f"error: there is no command {args[0]!r}.{nearest(args[0], self.commands)} Commands: {known}")
            raise typer.Exit(2)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command of ``ctx``."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            if os.environ.get("SLIMTUNE_DEBUG") == "1":
                raise
            if not error.shared or os.environ.get("RANK", "0") == "0":
                _complain(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _complain("interrupted" + ("; continue with --resume" if ctx.invoked_subcommand in ("tune", "convert") else ""))
            raise typer.Exit(130) from None
        except Exception as error:
            if os.environ.get("SLIMTUNE_DEBUG") == "1" or not (told := out_of_memory(error)):
                raise
            _complain(f"error: {told}")
            raise typer.Exit(1) from None


def _complain(message: str) -> None:
    """One red line on stderr. Other ranks name themselves: an error of theirs alone must not be lost."""
    rank = os.environ.get("RANK", "0")
    prefix = "" if rank == "0" else f"[rank {rank}] "
    typer.secho(prefix + " ".join(message.split()), fg=typer.colors.RED, err=True)


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # boxes take as long as all else of a help text
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    help="Tune and prune a language model in one stage.",
    epilog="SLIMTUNE_DEBUG=1 shows the traceback of an error.",
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, e.g. budget.keep=0.6 out=runs/x.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    # of a faster kernel for 4-bit weights on a CPU, which no command uses; told as libraries are imported, with or without such
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@app.command()
def tune(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Tune and prune a model as a recipe says."""
    from slimtune.recipe import load

    _run(load(recipe, overrides or []), resume, overwrite)


@app.command()
def convert(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Turn a dense model into a mixture of experts as a recipe says (method: tomoe).

    What a cut would delete is divided among experts: each token uses the part that budget.keep says (of the blocks alone
    with budget.of=block). Of Llama, Mistral, Qwen2 and Qwen3; the written folder is a Mixtral, Qwen2-MoE, Qwen3-MoE,
    GLM4-MoE or Dots1, which stock software loads. Keys: slimtune recipe moe.
    """
    from slimtune.recipe import load

    loaded = load(recipe, overrides or [])
    if loaded.method != "tomoe":
        raise UserError(
            f"method={loaded.method} makes no experts: add method=tomoe, or start {str(recipe)!r} with slimtune tune"
        )
    _run(loaded, resume, overwrite)


def _run(loaded: Any, resume: bool, overwrite: bool) -> None:
    from slimtune import pipeline
    from slimtune.runtime import leave_group, quiet_libraries
    from slimtune.train.judgement import Breach

    quiet_libraries()
    try:
        pipeline.tune(loaded, resume=resume, overwrite=overwrite)
    except Breach:  # which all processes come to
        leave_group()
        raise
    leave_group()


app.command()(evaluate)
app.command()(compare)
app.command()(export)
app.command()(verify)
app.command()(apply)
app.command()(bench)
app.command()(report)
app.command()(watch)
app.command()(check)


@app.command()
def estimate(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="Tell the times of this GPU, by its data sheet: h100, h200, a100, ...")] = "",
    processes: Annotated[int | None, typer.Option(min=1, help="That torchrun would start.", show_default="1")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """What a run will cost: parameters, memory, steps, time. Needs config.json only; reads no data."""
    from slimtune.recipe import load

    if processes:
        os.environ["WORLD_SIZE"] = str(processes)  # as torchrun tells it
    loaded = load(recipe, overrides or [])
    from slimtune.estimate import estimate as build
    from slimtune.estimate import render
    from slimtune.runtime import quiet_libraries

    quiet_libraries()
    result = build(loaded, gpu=gpu or None)
    if os.environ.get("RANK", "0") == "0":
        if as_json:
            import json

            typer.echo(json.dumps(result.to_dict(), indent=2))
        else:
            render(result, loaded)
    if result.problem:
        raise UserError(result.problem)


app.command()(families)
app.command(name="recipe")(reference)


def main() -> None:
    """The entry point of the ``slimtune`` script."""
    sys.exit(app())
