"""The command line. Nothing heavy is imported until a command needs it: ``slimtune --help`` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from slimtune.cli_bench import bench
from slimtune.cli_evaluate import evaluate
from slimtune.cli_export import apply, export, verify
from slimtune.cli_report import check, report
from slimtune.comparison.command import compare
from slimtune.errors import UserError, nearest, out_of_memory
from slimtune.version import __version__

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table


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
            _complain(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            _complain("interrupted" + ("; continue with --resume" if ctx.invoked_subcommand == "tune" else ""))
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
    pass


@app.command()
def tune(
    recipe: RecipeFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the output folder.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")] = False,
) -> None:
    """Tune and prune a model as a recipe says."""
    from slimtune.recipe import load

    loaded = load(recipe, overrides or [])
    from slimtune import pipeline
    from slimtune.runtime import leave_group, quiet_libraries

    quiet_libraries()
    pipeline.tune(loaded, resume=resume, overwrite=overwrite)
    leave_group()


app.command()(evaluate)
app.command()(compare)
app.command()(export)
app.command()(verify)
app.command()(apply)
app.command()(bench)
app.command()(report)
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


@app.command()
def families(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL_FOLDER", help="Say whether this model is supported.")] = None,
) -> None:
    """Model families: what is supported, what is refused and why."""
    from slimtune.structure.families import FAMILIES, REFUSED

    if model is not None:
        _supported(model)
        return
    _print(
        _table("Supported", ["model_type", "what is cut", "notes"], [_family_row(row) for row in FAMILIES.values()]),
        _table("Refused", ["model_type", "because"], REFUSED.items()),
    )


def _family_row(family: Any) -> tuple[str, str, str]:
    from slimtune.structure.axes import FFN, KV_GROUP

    heads, channels = (family.consumer(axis).path.rpartition(".")[2] for axis in (KV_GROUP, FFN))
    return family.model_type, f"KV groups ({heads}), MLP channels ({channels})", family.note


def _supported(model: Path) -> None:
    """Say what can be cut in the model of a folder. Raises UserError with the reason when nothing can."""
    import json

    from slimtune.structure.families import family_of

    file = model / "config.json"
    if not file.is_file():
        remedy = "give a Hugging Face model folder (a hub id: slimtune estimate RECIPE model.path=org/name)"
        raise UserError(f"{str(model)!r} has no config.json; {remedy}")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(file)!r} is not JSON: {error}") from error
    # the table answers before transformers is asked, which may not know the model_type at all
    family_of(str(raw.get("model_type")) if isinstance(raw, dict) else "")
    from slimtune.models.load import load_config, structure_of
    from slimtune.sections import ModelConfig

    structure = structure_of(load_config(ModelConfig(path=str(model))))
    total, prunable = structure.total_params, structure.prunable_params
    typer.echo(
        f"{model}: supported ({structure.family.model_type}, {len(structure.layers)} layers, {total:,} parameters, "
        f"{prunable:,} of them in prunable units); see also: slimtune estimate"
    )


@app.command(name="recipe")
def reference(
    section: Annotated[str | None, typer.Argument(help="Only this section, e.g. budget.")] = None,
) -> None:
    """Every key of a recipe: type, default and meaning."""
    from slimtune.recipe import Recipe
    from slimtune.sections import Source

    sections: dict[str, type[BaseModel]] = {
        name: field.annotation
        for name, field in Recipe.model_fields.items()
        if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields")
    }
    general = {name for name in Recipe.model_fields if name not in sections}
    pages: dict[str, Table] = {"recipe": _keys("recipe", Recipe, "", general)}
    for name, model in sections.items():
        pages[name] = _keys(name, model, f"{name}.", set(model.model_fields))
    pages["source"] = _keys("source: an item of data.train or another list of rows", Source, "", set(Source.model_fields))
    if section is None:
        _print(*pages.values())
    elif section in pages:
        _print(pages[section])
    else:
        raise UserError(f"section {section!r} is unknown.{nearest(section, pages)} Sections: {', '.join(pages)}")


def _keys(title: str, model: type[BaseModel], prefix: str, names: set[str]) -> Table:
    """The rows of one section. Types and defaults are written as YAML would have them."""
    rows, summary = [], " ".join((model.__doc__ or "").replace("``", "`").split())
    for name, field in model.model_fields.items():
        if name in names:
            default = "required" if field.is_required() else _yaml(field.default)
            rows.append((prefix + name, _type(field), default, " ".join((field.description or "").replace("``", "`").split())))
    return _table(f"{title}: {summary}", ["key", "type", "default", "meaning"], rows)


def _type(field: Any) -> str:
    """A field's type in words: ``float >= 0``, ``'a' | 'b'``, ``list of sources``."""
    import types
    from typing import Literal, Union, get_args, get_origin

    def words(annotation: Any) -> str:
        origin, args = get_origin(annotation), get_args(annotation)
        if origin is Annotated:
            return _limits(words(args[0]), getattr(args[1], "metadata", []))
        if origin is Literal:
            return " | ".join(str(value) for value in args)
        if origin in (Union, types.UnionType):
            return " | ".join(words(arg) for arg in args if arg is not type(None))
        if origin is tuple:
            return f"list of {words(args[0]).lower()}"
        return "mapping" if origin is dict else {"str": "text"}.get(annotation.__name__, annotation.__name__)

    return _limits(words(field.annotation), field.metadata)


def _limits(word: str, metadata: Any) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [f"{sign} {getattr(item, key):g}" for item in metadata for key, sign in signs.items() if hasattr(item, key)]
    return f"{word} {', '.join(bounds)}".strip()


def _yaml(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return "[]" if value == () else str(value)


def _table(title: str, columns: list[str], rows: Any) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        table.add_column(name, no_wrap=index == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a bracket in a value is no markup
    return table


def _print(*tables: Table) -> None:
    if os.environ.get("RANK", "0") == "0":
        from rich.console import Console

        console = Console()
        for table in tables:
            console.print(table)


def main() -> None:
    """The entry point of the ``slimtune`` script."""
    sys.exit(app())
