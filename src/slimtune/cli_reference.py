"""The commands ``slimtune families`` and ``slimtune recipe``: what there is, from the tables that the program itself reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimtune.errors import UserError, nearest

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.table import Table


def families(
    model: Annotated[Path | None, typer.Argument(metavar="MODEL_FOLDER", help="Say whether this model is supported.")] = None,
) -> None:
    """Model families: what is supported, what is refused and why."""
    from slimtune.structure.families import FAMILIES, REFUSED

    if model is not None:
        _supported(model)
        return
    known = ["model_type", "what is cut", "experts as", "notes"]
    _print(
        _table("Supported", known, [_family_row(row) for row in FAMILIES.values()]),
        _table("Refused", ["model_type", "because"], REFUSED.items()),
    )


def _family_row(family: Any) -> tuple[str, ...]:
    from slimtune.structure.axes import FFN, KV_GROUP

    heads, channels = (family.consumer(axis).path.rpartition(".")[2] for axis in (KV_GROUP, FFN))
    hosts = ", ".join(family.experts or ()) or "none"  # of slimtune convert
    return family.model_type, f"KV groups ({heads}), MLP channels ({channels})", hosts, family.note


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
    section = "recipe" if section in general else section
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
    if _width() < _NARROW:  # in four columns a meaning would be a ribbon of three words a line
        stacked = ((f"{key}\n  {kind}\n  default: {default}", meaning) for key, kind, default, meaning in rows)
        return _table(f"{title}: {summary}", ["key", "meaning"], stacked, least=max(len(row[0]) for row in rows))
    return _table(f"{title}: {summary}", ["key", "type", "default", "meaning"], rows)


_NARROW = 110
"""Columns of a terminal."""


_LONG = 34
"""Columns of a first one that may be wrapped."""


def _width() -> int:
    from rich.console import Console

    return Console().width


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
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)


def _table(title: str, columns: list[str], rows: Any, least: int | None = None) -> Table:
    """A table; ``least``: columns that the first one takes at least, where it may be wrapped."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        if index == 0 and least:
            table.add_column(name, min_width=least, max_width=_LONG)
        else:
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
