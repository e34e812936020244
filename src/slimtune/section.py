"""What the sections of a recipe have in common: frozen, checked, variables and paths read as text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator

from slimtune.errors import UserError


class Section(BaseModel):
    """Frozen; unknown keys are errors; attribute docstrings are the reference of ``slimtune recipe``.

    Attributes:
        literal: keys whose text keeps its ``${NAME}``: secrets, which are not to be written down.
        earlier: {earlier name of a key: its name}, which recipes that runs keep may have.
    """

    literal: ClassVar[frozenset[str]] = frozenset()
    earlier: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return expand(raw)
        if twice := next((old for old, new in cls.earlier.items() if old in raw and new in raw), None):
            raise UserError(f"recipe: {twice} is the earlier name of {cls.earlier[twice]}; give one of the two")
        named = {cls.earlier.get(key, key): value for key, value in raw.items()}
        return {key: value if key in cls.literal else expand(value) for key, value in named.items()}


def expand(value: Any) -> Any:
    """``value`` with ``${NAME}`` in every string replaced by the environment variable, and paths as strings.

    Raises:
        UserError: a variable is not set.
    """
    if isinstance(value, dict):
        return {key: expand(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [expand(item) for item in value]
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return re.sub(r"\$\{(\w+)\}", _variable, value) if isinstance(value, str) else value


def _variable(match: re.Match[str]) -> str:
    name = match.group(1)
    if name not in os.environ:
        raise UserError(f"the recipe uses ${{{name}}} but the environment variable {name} is not set; export {name}=...")
    return os.environ[name]
