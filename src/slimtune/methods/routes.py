"""Passes over tokens for experts: what a split and its routers begin from, and which experts the tokens go to in the end."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.methods.experts import Experts
from slimtune.methods.heads import HeadScores
from slimtune.methods.masked import all_groups
from slimtune.methods.passes import Passes
from slimtune.models.modes import quiet
from slimtune.models.surgery import linears_of
from slimtune.models.weights import dense
from slimtune.prune.cmoe import cmoe_split
from slimtune.prune.gates import MaskBank, Site, squares_over_ranks
from slimtune.prune.split import split
from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.structure.plan import Plan
from slimtune.train.loop import hash_seed
from slimtune.train.objective import Batch, accumulate, loss_sum
from slimtune.train.session import Batches, Session


@torch.no_grad()
def prior_of(session: Session, model: nn.Module, bank: MaskBank, batches: Batches, experts: Experts) -> int:
    """Choose KV groups, split the channels and fit the routers, on decision batches of the base; the tokens read."""
    config, shape = session.recipe.moe, experts.shape
    bank.open()
    passes = Passes(session, model, batches, config.prior_steps)
    if shape.groups < session.structure.layers[0].units[KV_GROUP]:
        session.progress.say(f"{shape.groups} KV groups a layer stay, by squared gradients on {config.prior_steps} batches")
        experts.keep_groups(_squares(session, model, bank, passes))
    if config.prior == "none":
        return passes.tokens
    session.progress.say(f"prior: channels split by what they add on {config.prior_steps} batches")
    heads = HeadScores(session.structure) if experts.heads else None
    parts = -(-batches.batch // (session.recipe.train.micro_batch or batches.batch))
    energies, inputs = _read(session, model, passes, max(1, config.prior_tokens // (config.prior_steps * parts)), heads)
    sizes = torch.tensor(shape.sizes(1.0)) if not shape.overlap else torch.tensor([0, *[shape.width] * shape.number, 0])
    scores, weights = [], {}
    for layer in range(len(session.structure.layers)):
        seed = hash_seed(session.recipe.seed, "split", layer) % 2**31
        if config.prior == "cmoe":
            found = cmoe_split(energies.pop(layer), inputs.pop(layer), sizes)
        else:
            found = split(energies.pop(layer), inputs.pop(layer), sizes, shape.top_k, seed, shape.overlap)
        scores.append(found.scores)
        weights[layer] = found.weight
    experts.start(torch.stack(scores), weights)
    if heads:
        experts.start_heads(*heads.scores(model))
    return passes.tokens


def _squares(session: Session, model: nn.Module, bank: MaskBank, passes: Passes) -> dict[Site, Tensor]:
    """Squared gradients of per-sample gates of KV groups at one, summed over samples: {site: [K]} (Molchanov et al. 2019)."""
    ones, found = all_groups(session.structure, session.device), dict[Site, Tensor]()
    for step in range(passes.count):
        leaves = list[dict[Site, Tensor]]()

        def loss(batch: Batch, leaves: list[dict[Site, Tensor]] = leaves) -> Tensor:
            leaves.append(bank.leaves({site: mask.expand(len(batch["input_ids"]), -1) for site, mask in ones.items()}))
            return loss_sum(model, batch)

        with torch.enable_grad(), quiet(model):
            accumulate(model, passes.batches.at(step), session.accelerator, loss, sync=False)
        for site, value in squares_over_ranks(*leaves).items():
            found[site] = found.get(site, 0) + value
        passes.tokens += passes.batches.tokens(step)
    bank.open()
    return found


def _read(
    session: Session, model: nn.Module, passes: Passes, most: int, heads: HeadScores | None = None
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Of every layer what each channel adds for each token, squared [T, F], and the input of the MLP [T, D].

    Args:
        most: tokens of what is read at once, evenly spread over it.
        heads: sees what q, k and v give for all of them.
    """
    norms, weighted = dict[int, Tensor](), session.recipe.moe.prior == "energy"
    for layer, row, module in linears_of(model, session.structure):
        if row.into and row.into.axis == FFN:
            weight: Any = getattr(module, "base_layer", module).weight
            norms[layer] = dense(weight).float().square().sum(0) if weighted else torch.ones(weight.shape[1]).to(weight.device)
    energies: dict[int, list[Tensor]] = {}
    inputs: dict[int, list[Tensor]] = {}

    def watchers(real: Tensor) -> dict[str, Any]:
        at = real.flatten().nonzero().flatten()
        at = at[torch.linspace(0, len(at) - 1, min(most, len(at)), device=at.device).long()]

        def see(layer: int, axis: str, values: Tensor) -> None:
            if axis == FFN:
                found = values.flatten(0, 1)[at].float().square() * norms[layer]
                energies.setdefault(layer, []).append(found.to(torch.bfloat16))

        def read(layer: int, axis: str, x: Tensor) -> None:
            if axis == FFN:
                inputs.setdefault(layer, []).append(x.flatten(0, 1)[at])

        return {"consumers": see, "producers": read, **({"outputs": partial(heads.see, real)} if heads else {})}

    passes.run(watchers, whole=True)  # what is clustered must be the same in all processes
    return {layer: torch.cat(each) for layer, each in energies.items()}, {
        layer: torch.cat(each) for layer, each in inputs.items()
    }


@torch.no_grad()
def shares_of(
    session: Session, model: nn.Module, bank: MaskBank, experts: Experts, masks: dict[Site, Tensor]
) -> list[list[float]]:
    """The part of a layer's choices that each expert gets on validation rows: [L][E], each layer adds up to one.

    Nothing where there are none.
    """
    if not len(session.splits.valid):
        return []
    router = experts.router
    bank.close(masks)
    router.eval()
    router.counts = torch.zeros(len(router.weights), router.number, device=session.device, dtype=torch.long)
    session.valid_figures(model)
    counts = session.accelerator.reduce(router.counts)
    router.counts = None
    router.forget()
    if experts.values:
        experts.values.forget()
    found: list[list[float]] = (counts / counts.sum(1, keepdim=True).clamp(min=1)).tolist()
    return found


LEAST = 0.01
"""The part of the tokens that an expert should get at least."""


def starved(shares: list[list[float]], top_k: int) -> str:
    """What to tell of experts that hardly any token uses; empty where there are none."""
    few = [(each * top_k, layer, at) for layer, parts in enumerate(shares) for at, each in enumerate(parts)]
    few = sorted(each for each in few if each[0] < LEAST)
    if not few:
        return ""
    named = ", ".join(f"{at} of layer {layer} ({part:.2%})" for part, layer, at in few[:3])
    return (
        f"{len(few)} of {sum(map(len, shares))} experts are used by less than {LEAST:.0%} of the validation tokens: {named}"
        f"{' and others' if len(few) > 3 else ''}; raise moe.balance, or recover.steps"
    )


ALIKE = 0.95
"""The part of a layer's channels in experts that one of them has alone, from which on a token's choice hardly matters."""


def alike(plan: Plan) -> str:
    """What to tell of layers whose experts are the same channels over again; empty where there are none."""
    parts = [each.used(1) / len(each.union) for each in plan.experts]
    if not (few := [part for part in parts if part >= ALIKE]):
        return ""
    return (
        f"in {len(few)} of {len(parts)} layers experts are alike: one has {min(few):.0%} or more of the channels that all have "
        "together, so hardly anything depends on the route; give moe.prior, a longer search, or cut with method=atp"
    )
