"""Least squares before a cut, on decision data and in the stream of the masked model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slimtune.methods.decide import Decider
from slimtune.methods.scores import Scorer
from slimtune.models.refit import refit, second_moments
from slimtune.prune import budget
from slimtune.prune.gates import MaskBank, Site
from slimtune.structure.plan import Plan
from slimtune.train.session import Session


def reconstruct(session: Session, model: nn.Module, bank: MaskBank, decider: Decider, plan: Plan) -> int:
    """Refit the consumers for what ``plan`` removes (``refit``); the tokens read. Leaves the gates open."""
    config = session.recipe.refit
    if not config.batches:
        return 0
    totals: dict[Site, Tensor] = {}
    scorer = Scorer(session, model, decider, config.batches)
    bank.close(budget.masks_of(plan, session.device))

    def watchers(real: Tensor) -> dict[str, Any]:
        return {"consumers": second_moments(totals, real)}

    scorer.passes(watchers)
    bank.open()
    moments = {site: session.accelerator.reduce(total) for site, total in totals.items()}
    refit(model, session.structure, plan, moments, config.damping)
    return scorer.tokens
