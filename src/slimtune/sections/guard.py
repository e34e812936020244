"""What a run's figures must be, and what happens when they are not; how its speed is measured."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from slimtune.condition import Condition
from slimtune.errors import UserError
from slimtune.section import Section
from slimtune.sections.bounds import Positive


def _flat(value: Any) -> Any:
    """``{"a": {"b": "< 1"}}``, as an override ``guard.a.b`` gives it, is ``{"a.b": "< 1"}``."""
    if not isinstance(value, Mapping):
        raise UserError(f"guard={value!r} is no mapping of figures to conditions, e.g. guard: {{ppl: '<= 1.2 x dense'}}")
    found: dict[str, Any] = {}
    for key, item in value.items():
        inner = _flat(item) if isinstance(item, Mapping) else item
        nested = isinstance(inner, dict) and inner
        found |= {f"{key}.{name}": each for name, each in inner.items()} if nested else {str(key): _text(inner)}
    return found


def _text(value: Any) -> Any:
    """A bare number, or nothing, as text: what is wrong with it is told as of any other condition."""
    return "" if value is None else str(value) if isinstance(value, (int, float)) else value


def _checked(value: dict[str, str]) -> dict[str, str]:
    for name, text in value.items():
        for word in Condition.of(text, f"guard.{name}", known=("dense", "base", "dense_lora")).words:
            if word in ("baseline", "noise"):
                raise UserError(f"guard.{name}: a run does not know {word!r}; it knows dense (its base) and dense_lora")
    return value


Guard = Annotated[dict[str, str], BeforeValidator(_flat), AfterValidator(_checked)]
"""``{figure: condition}``."""


def _words(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(shlex.split(value))
    return tuple(map(_path, value)) if isinstance(value, (list, tuple)) else value


def _path(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class AlarmConfig(Section):
    """What happens when a figure leaves its bound in ``guard``, once each time it does."""

    literal: ClassVar[frozenset[str]] = frozenset({"command", "webhook"})

    then: Literal["warn", "stop"] = "warn"
    """``warn``: a line, and the run goes on. ``stop``: a checkpoint is written and the run ends with exit code 1; after the
    last evaluation, when the model is written, with that code alone."""
    begin: Literal["search", "recover", "end"] = "search"
    """The phase from which on figures are held to their bounds: while gates close quality falls, and comes back later."""
    command: Annotated[tuple[str, ...], BeforeValidator(_words)] = ()
    """Program and arguments, run with the event as JSON on its standard input (docs/guard.md). ``${NAME}`` is read when the run
    begins, and stands unreplaced in what it writes."""
    webhook: str = ""
    """Address that the event is posted to as JSON, ``https://...``. ``${NAME}`` as in ``command``."""
    timeout: Annotated[float, Field(gt=0.0, le=600.0)] = 10.0
    """Seconds that either may take; one that fails is told, and stops nothing."""


class SpeedConfig(Section):
    """Whether the written model is timed beside its base (``slimtune bench``), and how."""

    measure: Literal["auto"] | bool = "auto"
    """``auto``: where ``guard`` names a figure of speed."""
    batches: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1,)
    """Rows at once."""
    prompt: Positive = 512
    """Tokens of a prompt."""
    context: Positive = 512
    """Tokens in the cache before decode steps."""
    steps: Annotated[int, Field(ge=2)] = 32
    """Decode steps of one measurement."""
    repeats: Positive = 5
    """Turns."""
