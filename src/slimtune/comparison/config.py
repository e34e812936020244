"""The comparison file: what all runs share, and what each method changes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator

from slimtune.errors import UserError, nearest
from slimtune.recipe import Recipe
from slimtune.section import Section
from slimtune.yaml_file import read_yaml

Keep = Annotated[float, Field(gt=0.0, le=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
"""A name that may stand in a folder's name."""


def _as_items(value: Any) -> Any:
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if len({str(item) for item in items}) < len(items):
        raise ValueError("an item stands there twice")
    return items


Keeps = Annotated[tuple[Keep, ...], BeforeValidator(_as_items), Field(min_length=1)]

RESERVED = {
    "seed": "the comparison's `seeds` give it",
    "out": "the comparison's `out` gives it",
    "budget.keep": "the comparison's `keep`, or the method's own `keep`, gives it",
    "evaluate.dense_lora": "a method `dense_lora: {method: finetune}` runs that reference once a seed",
}


class Method(Section):
    """A method: the budgets it stands for, and what it changes of the recipe."""

    keep: Keeps | None = None
    """Budgets; default: those of the comparison, and none for ``method: finetune``, which cuts nothing."""
    changes: dict[str, Any] = {}
    """Keys of the recipe, with dots, and their values. In a text ``{keep}`` becomes the budget, ``{seed}`` the seed and
    ``{out}`` the folder of the runs."""

    @model_validator(mode="before")
    @classmethod
    def _parted(cls, raw: Any) -> Any:
        raw = {} if raw is None else raw
        if not isinstance(raw, dict):
            raise ValueError("it must be a mapping of recipe keys to values, or {}")
        changes = {key: value for key, value in raw.items() if key != "keep"}
        return {**({"keep": raw["keep"]} if "keep" in raw else {}), "changes": _flat(changes)}


class First(Section):
    """A model that methods start from and that is made first: a recipe of its own."""

    recipe: str
    """Relative to the comparison's file."""
    out: Annotated[str, Field(min_length=1)]
    """Its folder. A finished run there is taken as it is."""
    changes: dict[str, Any] = {}
    """Keys of that recipe, with dots, and their values."""

    @model_validator(mode="before")
    @classmethod
    def _parted(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            raise ValueError("it must be a mapping with recipe and out")
        own = {key: raw[key] for key in ("recipe", "out") if key in raw}
        return {**own, "changes": _flat({key: value for key, value in raw.items() if key not in own})}


class Comparison(Section):
    """Methods, budgets and seeds of one recipe."""

    recipe: str
    """The recipe that all runs share, relative to this file."""
    base: Name
    """Name of the base model in the rows."""
    domain: Name
    """Name of the domain in the rows."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_items), Field(min_length=1)] = (0, 1, 2)
    """Each method runs with each of them."""
    keep: Keeps = (0.6,)
    """Budgets: ``budget.keep`` of the runs."""
    out: Annotated[str, Field(min_length=1)]
    """Folder of the runs, rows.json, table.md and figure.svg."""
    set: dict[str, Any] = {}
    """Keys of the recipe that every run changes."""
    first: tuple[First, ...] = ()
    """Models that methods name as ``model.path`` or ``distill.teacher``: made before them, where they are not there yet."""
    methods: Annotated[dict[Name, Method], Field(min_length=1)]
    """A name for each method, and what it changes of the recipe."""

    @field_validator("set", mode="before")
    @classmethod
    def _flat_set(cls, raw: Any) -> Any:
        return _flat(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _free(self) -> Comparison:
        for index, item in enumerate(self.first):
            if "{" in item.out or item.out in [other.out for other in self.first[:index]]:
                raise ValueError(f"first.{index}: out={item.out!r} must be a folder of its own, without braces")
        for where, changes in (("set", self.set), *((f"methods.{name}", it.changes) for name, it in self.methods.items())):
            for key in changes:
                if key in RESERVED:
                    raise ValueError(f"{where}: {key} cannot stand there: {RESERVED[key]}")
        return self

    @model_validator(mode="wrap")
    @classmethod
    def _told(cls, raw: Any, validate: ModelWrapValidatorHandler[Comparison]) -> Comparison:
        try:
            return validate(raw)
        except ValidationError as error:
            raise UserError(_explain(error)) from error


def load(path: str | Path) -> Comparison:
    """Read a comparison file. Its ``recipe`` comes back as a path from here.

    Raises:
        UserError: the file is missing or not a mapping, a key is unknown, a value is invalid or a variable unset.
    """
    raw = read_yaml(path, "comparison", "recipes/compare/health.yaml")
    if not raw.keys() & {"recipe", "methods"} and raw.keys() & (Recipe.model_fields.keys() - Comparison.model_fields.keys()):
        needs = [name for name, it in Comparison.model_fields.items() if it.is_required()]
        raise UserError(
            f"comparison: {str(path)!r} is a recipe for slimtune tune; a comparison names it as its recipe and holds "
            f"{', '.join(needs)}, e.g. recipes/compare/health.yaml (docs/compare.md)"
        )
    comparison = Comparison.model_validate(raw)
    first = tuple(
        item.model_copy(update={"recipe": _beside(path, item.recipe, f"first.{index}.recipe")})
        for index, item in enumerate(comparison.first)
    )
    return comparison.model_copy(update={"recipe": _beside(path, comparison.recipe, "recipe"), "first": first})


def _beside(path: str | Path, recipe: str, key: str) -> str:
    file = Path(path).parent / recipe
    if not file.is_file():
        raise UserError(f"comparison: {key}={recipe!r} does not exist beside {str(path)!r} ({file})")
    return str(file)


def _flat(changes: dict[str, Any]) -> dict[str, Any]:
    """``{lora: {rank: 8}}`` as ``{lora.rank: 8}``: a section's other keys stay as the recipe has them."""
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        nested = isinstance(value, dict) and "." not in str(key)
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if nested else {str(key): value}
    return flat


def _explain(error: ValidationError) -> str:
    errors = error.errors()
    first = next((it for it in errors if it["type"] == "extra_forbidden"), errors[0])  # a misspelt key is missing as well
    loc = [str(part) for part in first["loc"] if part != "[key]"]
    where, known = ".".join(loc), list(Comparison.model_fields)
    if first["type"] == "extra_forbidden":
        return f"comparison: unknown key {where!r}.{nearest(where, known) or ' Known: ' + ', '.join(known)}"
    if first["type"] == "missing":
        return f"comparison: the key {where!r} is missing"
    reason = re.sub("^Value error, ", "", first["msg"])
    return f"comparison: {where}={first['input']!r} is not valid: {reason}" if where else f"comparison: {reason}"
