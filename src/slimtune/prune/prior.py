"""Logits from scores of units: their ranks by score per parameter, over the whole model or within a part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from slimtune.prune.gates import Site
from slimtune.structure.axes import AXES, Structure

Ranking = Literal["global", "axis", "layer"]
"""Who is ranked against whom: all units, those of one axis in all layers, or those of one axis in one layer."""


def prior_logits(
    scores: Mapping[Site, Tensor], structure: Structure, scale: float, ranking: Ranking = "global"
) -> dict[Site, Tensor]:
    """Normal quantiles of each unit's rank by score per parameter, ranks weighted by what a unit owns.

    So the level that keeps a share k of the prunable parameters is ``scale * Phi^-1(1 - k)`` whatever the scores' scale; with
    ``axis`` each axis keeps that share of its units, with ``layer`` each axis in each layer.

    Args:
        scores: {site: [units]}, e.g. squared-gradient Taylor scores of the gates, sums over samples of (dL/dmask)^2
            (Molchanov et al. 2019; Fisher form, per sample).
        scale: standard deviation of the result.
        ranking: see ``Ranking``.

    Returns:
        {site: logits [units]}, zero mean weighted by parameters.
    """
    sites = list(structure.sites())
    parts: list[list[Site]] = [sites]
    if ranking == "axis":
        parts = [[site for site in sites if site[1] == axis] for axis in AXES]
    elif ranking == "layer":
        parts = [[site] for site in sites]
    found: dict[Site, Tensor] = {}
    for part in parts:
        found |= _quantiles(scores, structure, part)
    return {site: scale * found[site] for site in sites}


def _quantiles(scores: Mapping[Site, Tensor], structure: Structure, sites: Sequence[Site]) -> dict[Site, Tensor]:
    given = torch.cat([scores[site].detach().double() for site in sites])  # they stay where they are: to sort takes a host long
    owned = torch.tensor([float(structure.layers[layer].unit_params[axis]) for layer, axis in sites], dtype=torch.float64)
    costs = owned.repeat_interleave(torch.tensor([len(scores[site]) for site in sites])).to(given.device)
    density = given / costs
    order = torch.argsort(density, stable=True)
    below = torch.cumsum(costs[order], 0) - costs[order] / 2
    quantile = torch.empty_like(density)
    quantile[order] = below / costs.sum()
    logits = torch.special.ndtri(quantile).float()
    return dict(zip(sites, logits.split([len(scores[site]) for site in sites]), strict=True))
