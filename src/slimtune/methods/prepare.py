"""Before a search: the starting logits of the generator, and the consumers that compensate, from the same decision batches."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimtune.methods.compensation import Compensation, Fit, compensation_of, diagonals
from slimtune.methods.decide import Decider
from slimtune.methods.passes import Passes
from slimtune.methods.scores import Scorer
from slimtune.prune import budget
from slimtune.prune.gates import MaskBank, Site
from slimtune.prune.moments import Moments
from slimtune.train.session import Session

FEW = 3
"""Tokens an input of the widest consumer below which a warning is due: at one the solve does more harm than good."""


def prepare(session: Session, model: nn.Module, bank: MaskBank, decider: Decider, fresh: bool) -> Compensation | None:
    """Read what the recipe's prior and compensation need, on the base as it is.

    Args:
        session: the run.
        model: gated, LoRA attached and still without effect.
        bank: what its gates read; follows nothing yet, and is followed by the compensation, if any, when this returns.
        decider: gets its prior.
        fresh: a search that begins; else the prior is in the checkpoint, and nothing that was read counts once more.
    """
    config, wanted = session.recipe.generator, session.recipe.compensate
    moments: dict[Site, Moments] = {}
    bank.open()
    if wanted.weights != "none":
        session.progress.say(
            f"second moments of the consumers' inputs from {config.prior_steps} {session.recipe.search.decide_on} batches"
        )
        passes = Passes(session, model, decider.batches, config.prior_steps)
        moments = passes.second_moments(torch.device("cpu") if wanted.offload else session.device)
        decider.tokens["prior"] += passes.tokens if fresh else 0
        widest = max((total.size for total in moments.values()), default=0)
        if passes.tokens < FEW * widest:
            session.progress.say(
                f"[yellow]second moments of {widest} inputs from {passes.tokens:,} tokens: what compensates may be noise; "
                "raise generator.prior_steps[/yellow]"
            )
    if fresh and config.prior != "none":
        _set_prior(session, model, decider, moments)
    if wanted.weights == "none":
        return None
    loaded = next(model.parameters()).dtype  # what a model computes in outside autocast
    dtype = torch.bfloat16 if session.accelerator.mixed_precision == "bf16" else loaded
    fit = Fit(wanted.damping, wanted.weights == "decide", dtype, wanted.matrices)
    compensation = compensation_of(session, model, moments, fit)
    bank.follower = compensation
    if compensation.judge:  # by innovations from the first turn on
        bank.close(budget.all_kept(session.structure, session.device))
    return compensation


def _set_prior(session: Session, model: nn.Module, decider: Decider, moments: dict[Site, Moments]) -> None:
    config = session.recipe.generator
    kinds = {"wanda": "Wanda", "mixed": "Taylor and Wanda"}
    named = kinds.get(config.prior, "Taylor")
    session.progress.say(f"prior: {named} scores from {config.prior_steps} {session.recipe.search.decide_on} batches")
    wanda: dict[Site, Tensor] = {}
    if config.prior in kinds:
        scorer = Scorer(session, model, decider, config.prior_steps)
        known = session.recipe.compensate.weights != "none"
        wanda = scorer.wanda(diagonals(session, moments) if known else None)
        decider.tokens["prior"] += scorer.tokens
    taylor = decider.taylor(config.prior_steps) if config.prior != "wanda" else {}
    decider.set_prior(taylor, wanda)
