"""What is found of validation figures as they come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slimtune.errors import UserError


class Breach(UserError):
    """A figure left its bound, and the recipe says that the run ends then."""

    exit_code = 1
    shared = True


@dataclass(frozen=True)
class Judgement:
    """Of one evaluation.

    Attributes:
        breached: names of the guards whose figures are out of their bounds.
        stop: what to raise once a checkpoint is written; None: go on.
    """

    breached: tuple[str, ...] = ()
    stop: Breach | None = None


def not_judged(figures: Mapping[str, float], phase: str, step: int) -> Judgement:
    """Of figures that are held to nothing."""
    return Judgement()
