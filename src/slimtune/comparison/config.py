"""The comparison file: what all runs share, and what each method changes of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator

from slimtune.errors import UserError, nearest
from slimtune.recipe import read_yaml
from slimtune.section import Section

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
    """Keys of the recipe, with dots, and their values. ``{keep}`` in a text becomes the budget."""

    @model_validator(mode="before")
    @classmethod
    def _parted(cls, raw: Any) -> Any:
        raw = {} if raw is None else raw
        if not isinstance(raw, dict):
            raise ValueError("it must be a mapping of recipe keys to values, or {}")
        changes = {key: value for key, value in raw.items() if key != "keep"}
        return {**({"keep": raw["keep"]} if "keep" in raw else {}), "changes": _flat(changes)}


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
    methods: Annotated[dict[Name, Method], Field(min_length=1)]
    """A name for each method, and what it changes of the recipe."""

    @field_validator("set", mode="before")
    @classmethod
    def _flat_set(cls, raw: Any) -> Any:
        return _flat(raw) if isinstance(raw, dict) else raw

    @model_validator(mode="after")
    def _free(self) -> Comparison:
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
    comparison = Comparison.model_validate(read_yaml(path, "comparison", "recipes/compare/health.yaml"))
    recipe = Path(path).parent / comparison.recipe
    if not recipe.is_file():
        raise UserError(f"comparison: recipe={comparison.recipe!r} does not exist beside {str(path)!r} ({recipe})")
    return comparison.model_copy(update={"recipe": str(recipe)})


def _flat(changes: dict[str, Any]) -> dict[str, Any]:
    """``{lora: {rank: 8}}`` as ``{lora.rank: 8}``: a section's other keys stay as the recipe has them."""
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        nested = isinstance(value, dict) and "." not in str(key)
        flat |= {f"{key}.{inner}": item for inner, item in value.items()} if nested else {str(key): value}
    return flat


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"] if part != "[key]"]
    where, known = ".".join(loc), list(Comparison.model_fields)
    if first["type"] == "extra_forbidden":
        return f"comparison: unknown key {where!r}.{nearest(where, known) or ' Known: ' + ', '.join(known)}"
    if first["type"] == "missing":
        return f"comparison: the key {where!r} is missing"
    reason = re.sub("^Value error, ", "", first["msg"])
    return f"comparison: {where}={first['input']!r} is not valid: {reason}" if where else f"comparison: {reason}"
