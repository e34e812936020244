"""What a method hands back to the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from slimtune.prune.router import Router
from slimtune.prune.token_masks import TokenMasks
from slimtune.structure.plan import Plan
from slimtune.train.session import Session


@dataclass
class Outcome:
    """A tuned (and cut) model.

    Attributes:
        model: LoRA still attached where LoRA was trained.
        plan: what stayed; ``Plan.uncut`` when nothing was removed.
        tokens: non-padding tokens that went through forward and backward, by turn.
        notes: figures of the method (leak, kept ratios).
        router: which experts a token uses, where the plan has some; values: which value dimensions, where it says how many.
    """

    model: nn.Module
    plan: Plan
    tokens: dict[str, int]
    notes: dict[str, Any] = field(default_factory=dict)
    router: Router | None = None
    values: TokenMasks | None = None


Method = Callable[[Session], Outcome]
