"""Logits from scores of units: over the whole model by score per parameter, or within each layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from slimtune.prune.gates import Site
from slimtune.structure.axes import Structure


def layer_logits(scores: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """Ranks within each site, spread evenly over (0, 1): every layer and axis then keeps the same share of its units."""
    found = {}
    for site, values in scores.items():
        ranks = torch.empty(len(values), dtype=torch.float64)
        ranks[torch.argsort(values.detach().double().cpu(), stable=True)] = torch.arange(len(values), dtype=torch.float64)
        found[site] = ((ranks + 0.5) / len(values)).float()
    return found


def prior_logits(scores: Mapping[Site, Tensor], structure: Structure, scale: float) -> dict[Site, Tensor]:
    """Normal quantiles of each unit's rank by score per parameter, ranks weighted by what a unit owns.

    So the level that keeps a share k of the prunable parameters is ``scale * Phi^-1(1 - k)`` whatever the scores' scale.

    Args:
        scores: {site: [units]}, e.g. squared-gradient Taylor scores of the gates, sums over samples of (dL/dmask)^2
            (Molchanov et al. 2019; Fisher form, per sample).
        scale: standard deviation of the result.

    Returns:
        {site: logits [units]}, zero mean weighted by parameters.
    """
    sites = list(structure.sites())
    costs = torch.cat(
        [torch.full((len(scores[site]),), float(structure.layers[site[0]].unit_params[site[1]])) for site in sites]
    ).double()
    density = torch.cat([scores[site].detach().double().cpu() for site in sites]) / costs
    order = torch.argsort(density, stable=True)
    below = torch.cumsum(costs[order], 0) - costs[order] / 2
    quantile = torch.empty_like(density)
    quantile[order] = below / costs.sum()
    logits = scale * torch.special.ndtri(quantile).float()
    parts = logits.split([len(scores[site]) for site in sites])
    return dict(zip(sites, parts, strict=True))
