"""The budget while searching: the differentiable ratio and its loss, the level of samples, masks of the present target.

Counts come from the structure table and are fp32 (bf16 loses 0.4%). ``total`` counts every parameter of the model (tied
embeddings once), ``block`` those that belong to units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slimtune.prune.gates import Masks, Site
from slimtune.prune.sampling import Noise, keep_probability
from slimtune.structure.axes import AXES, Structure
from slimtune.structure.plan import Plan


def kept_ratio(masks: Masks, structure: Structure, of: str) -> Tensor:
    """Kept part of the parameters, differentiable in the masks (specification 5.8)."""
    owned = torch.stack(
        [masks[layer, axis].sum() * float(structure.layers[layer].unit_params[axis]) for layer, axis in structure.sites()]
    ).sum()
    if of == "block":
        return owned / structure.prunable_params
    return (owned + structure.constant_params) / structure.total_params


def budget_loss(ratio: Tensor, target: float) -> Tensor:
    """|log(kept / target)| (specification 1.5)."""
    return torch.log(ratio / target).abs()


def target_at(step: int, steps: int, ramp: float, keep: float) -> float:
    """Geometric warm-up of the target from 1 to ``keep`` over the first ``ramp`` part of the search."""
    part = 1.0 if ramp == 0 else min(1.0, (step + 1) / max(1.0, ramp * steps))
    return float(keep**part)


def allowance(structure: Structure, keep: float, of: str) -> float:
    """Parameters that units may own."""
    if of == "block":
        return keep * structure.prunable_params
    return keep * structure.total_params - structure.constant_params


def all_kept(structure: Structure, device: torch.device) -> dict[Site, Tensor]:
    """Masks [units] of ones."""
    return {(layer, axis): torch.ones(structure.layers[layer].units[axis], device=device) for layer, axis in structure.sites()}


def masks_of(plan: Plan, device: torch.device | str = "cpu") -> dict[Site, Tensor]:
    """The Plan as 0/1 masks, fp32."""
    masks = {}
    for layer, kept in enumerate(plan.kept):
        for axis in AXES:
            mask = torch.zeros(plan.full[layer][axis])
            mask[list(kept[axis])] = 1.0
            masks[layer, axis] = mask.to(device)
    return masks


@torch.no_grad()
def threshold_masks(logits: Masks, structure: Structure, keep: float, of: str, uniform: bool = False) -> dict[Site, Tensor]:
    """0/1 masks of the units above the one level that keeps ``keep``; unrounded, at least one unit a site.

    With ``uniform`` every layer keeps the mean number of units of the axis, its best ones.

    What ``adapt`` turns see while searching: deterministic and always at the present target, so LoRA learns on the model
    that is about to be cut out and not on the noise of the sampler.
    """
    sites = list(structure.sites())
    flat = torch.cat([logits[site].float() for site in sites])
    costs = torch.cat(
        [torch.full_like(logits[site], structure.layers[site[0]].unit_params[site[1]], dtype=torch.float64) for site in sites]
    )
    order = torch.sort(flat, descending=True, stable=True).indices
    kept = torch.zeros_like(flat)
    kept[order[torch.cumsum(costs[order], 0) <= allowance(structure, keep, of) + 0.5]] = 1.0
    masks = dict(zip(sites, (part.clone() for part in kept.split([len(logits[site]) for site in sites])), strict=True))
    if uniform:
        masks = {site: _best(logits[site], _mean_width(masks, site[1])) for site in sites}
    for site, mask in masks.items():
        mask[logits[site].argmax()] = 1.0
    return masks


def sampling_level(logits: Masks, structure: Structure, keep: float, of: str, noise: Noise) -> Tensor:
    """The level c at which samples of ``logits - c`` keep ``keep`` of the parameters in expectation (fp64 scalar).

    Differentiable in the logits, as the implicit function it is: dc/dz_i = w_i p'_i / sum_j w_j p'_j with the cost w and the
    keep probability p of a unit. So a logit that rises takes from the others in proportion to what its unit owns, and
    trained logits are prices a parameter. Bisection on the device: the expectation falls in c, and nothing is read back.
    """
    sites = list(structure.sites())
    flat = torch.cat([logits[site].double() for site in sites])
    costs = torch.cat(
        [torch.full_like(logits[site], structure.layers[site[0]].unit_params[site[1]], dtype=torch.float64) for site in sites]
    )
    with torch.no_grad():
        wanted = allowance(structure, keep, of)
        low, high = flat.min() - 40.0, flat.max() + 40.0  # everything is kept at one end and nothing at the other
        for _ in range(60):
            middle = (low + high) / 2
            many = (costs * keep_probability(flat - middle, noise)).sum() > wanted
            low, high = torch.where(many, middle, low), torch.where(many, high, middle)
    if not flat.requires_grad:
        return high
    kept = (costs * keep_probability(flat - high, noise)).sum()
    (slopes,) = torch.autograd.grad(kept, flat, retain_graph=True)
    return high + (kept - kept.detach()) / slopes.sum().clamp(min=1e-300)


def _mean_width(masks: Masks, axis: str) -> int:
    widths = [float(mask.sum()) for (_, other), mask in masks.items() if other == axis]
    return round(sum(widths) / len(widths))


def _best(logits: Tensor, count: int) -> Tensor:
    mask = torch.zeros_like(logits)
    mask[torch.sort(logits, descending=True, stable=True).indices[:count]] = 1.0
    return mask
