"""The budget: a differentiable ratio while searching, an exact deterministic Plan at the end.

Counts come from the structure table and are fp32 (bf16 loses 0.4%). ``total`` counts every parameter of the model (tied
embeddings once), ``block`` those that belong to units.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimtune.errors import UserError
from slimtune.prune.gates import Masks, Site
from slimtune.prune.sampling import Noise, keep_probability
from slimtune.sections import BudgetConfig
from slimtune.structure.axes import AXES, FFN, KV_GROUP, Structure
from slimtune.structure.plan import Counts, Plan, count

MULTIPLES = (128, 64, 32, 16, 8, 4)


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


@dataclass(frozen=True)
class _Item:
    """A rounding block of units of one site, taken or left as a whole."""

    score: float
    cost: int
    site: Site
    units: tuple[int, ...]


def solve(scores: Mapping[Site, Tensor], structure: Structure, budget: BudgetConfig) -> tuple[Plan, Counts]:
    """The Plan that keeps the best-scored units within the exact budget. No sampling; ties go to the lower index.

    A unit is kept when its score (the generator's logit) is above one common level: logits already weigh a unit against its
    cost, because the budget loss pulls on each in proportion to what it owns. MLP widths are rounded to ``ffn_multiple``;
    every layer keeps at least one KV group and one rounding block.

    Raises:
        UserError: the budget cannot be met; names the reachable range or the rounding that could.
    """
    keep = budget.keep
    pool = MULTIPLES if budget.ffn_multiple == "auto" else (budget.ffn_multiple,)
    fill = _fill_uniform if budget.layout == "uniform" else _fill_free
    best: tuple[float, float] | None = None
    for multiple in pool:
        plan = fill(scores, structure, keep, budget.of, multiple)
        if plan is None:
            continue
        counts = count(structure, plan)
        ratio = counts.total_ratio if budget.of == "total" else counts.block_ratio
        error = abs(ratio - keep)
        if best is None or error < best[0]:
            best = error, ratio
        if error <= budget.tolerance:
            return plan, counts
    lowest = smallest_ratio(structure, budget.of, min(pool))
    if keep < lowest:
        raise UserError(
            f"budget.keep={keep} of {budget.of} cannot be met: embeddings, norms and one unit a layer are already "
            f"{lowest:.3f}; ask for more than that, or use budget.of=block"
        )
    nearest = f"the nearest is {best[1]:.4f}" if best else "no plan exists"
    raise UserError(
        f"budget.keep={keep} cannot be met within budget.tolerance={budget.tolerance} with "
        f"budget.ffn_multiple={budget.ffn_multiple} and budget.layout={budget.layout} ({nearest}); "
        "use a smaller multiple or a larger tolerance"
    )


def smallest_ratio(structure: Structure, of: str, multiple: int) -> float:
    """The ratio with one KV group and one rounding block in every layer."""
    least = sum(
        layer.unit_params[KV_GROUP] + min(multiple, layer.units[FFN]) * layer.unit_params[FFN] for layer in structure.layers
    )
    if of == "block":
        return least / structure.prunable_params
    return (least + structure.constant_params) / structure.total_params


def _allowance(structure: Structure, keep: float, of: str) -> float:
    """Parameters that units may own."""
    if of == "block":
        return keep * structure.prunable_params
    return keep * structure.total_params - structure.constant_params


def _items(scores: Mapping[Site, Tensor], structure: Structure, multiple: int) -> tuple[list[_Item], list[_Item]]:
    """(what every layer must keep, the rest), each site's units in falling order of score, in rounding blocks."""
    must: list[_Item] = []
    rest: list[_Item] = []
    for site in structure.sites():
        layer, axis = site
        values = scores[site].detach().double().cpu()
        order = torch.sort(values, descending=True, stable=True).indices.tolist()
        size = multiple if axis == FFN else 1
        chunks = [order[start : start + size] for start in range(0, len(order), size)]
        for number, units in enumerate(chunks):
            score = float(values[units].mean())
            item = _Item(score, len(units) * structure.layers[layer].unit_params[axis], site, tuple(units))
            (must if number == 0 else rest).append(item)
    return must, rest


def _fill_free(scores: Mapping[Site, Tensor], structure: Structure, keep: float, of: str, multiple: int) -> Plan | None:
    must, rest = _items(scores, structure, multiple)
    left = _allowance(structure, keep, of) - sum(item.cost for item in must)
    if left < 0:
        return None
    chosen, closed = list(must), set[Site]()
    rest.sort(key=lambda item: (-item.score, item.site, item.units))
    skipped: _Item | None = None
    for item in rest:
        # a site's blocks are taken best first; once one does not fit, its worse ones stay out too
        if item.site in closed:
            continue
        if item.cost <= left:
            chosen.append(item)
            left -= item.cost
        else:
            closed.add(item.site)
            if skipped is None or item.cost < skipped.cost:
                skipped = item
    if skipped:
        # one item over the budget, then back by the worst MLP blocks: when every block is in and KV groups are what is
        # left, whole groups alone would miss the budget by up to half a group
        over, left_over = _give_back([*chosen, skipped], len(must), left - skipped.cost)
        if abs(left_over) < left:
            chosen = over
    return _plan(structure, chosen)


def _give_back(chosen: list[_Item], fixed: int, left: float) -> tuple[list[_Item], float]:
    """Drop the worst MLP blocks (never the first ``fixed`` items) as long as that brings ``left`` nearer to zero."""
    kept = list(chosen)
    for number in range(len(chosen) - 2, fixed - 1, -1):  # the last one was just added
        item = chosen[number]
        if item.site[1] != FFN:
            continue
        if abs(left + item.cost) >= abs(left):
            break
        del kept[number]
        left += item.cost
    return kept, left


def _fill_uniform(scores: Mapping[Site, Tensor], structure: Structure, keep: float, of: str, multiple: int) -> Plan | None:
    """Equal widths: for each head count the width that meets the budget; the pair that keeps the highest scores."""
    first = structure.layers[0]
    if any(layer.units != first.units for layer in structure.layers):
        raise UserError("budget.layout=uniform needs a base whose layers are all alike; use layout=per-layer")
    order = {site: torch.sort(scores[site].detach().double().cpu(), descending=True, stable=True) for site in structure.sites()}
    allowance = _allowance(structure, keep, of) / len(structure.layers)
    best: tuple[float, int, int] | None = None
    for groups in range(1, first.units[KV_GROUP] + 1):
        channels = (allowance - groups * first.unit_params[KV_GROUP]) / first.unit_params[FFN]
        width = min(first.units[FFN], round(channels / multiple) * multiple)
        if abs(channels - first.units[FFN]) < abs(channels - width):
            width = first.units[FFN]  # the full width need not be a multiple
        if width < min(multiple, first.units[FFN]):
            continue
        cost = groups * first.unit_params[KV_GROUP] + width * first.unit_params[FFN]
        if abs(cost - allowance) > 0.5 * multiple * first.unit_params[FFN]:
            continue
        value = sum(
            float(torch.sigmoid(order[layer, axis].values[:n]).sum()) * first.unit_params[axis]
            for layer in range(len(structure.layers))
            for axis, n in ((KV_GROUP, groups), (FFN, width))
        )
        if best is None or value > best[0]:
            best = value, groups, width
    if best is None:
        return None
    widths = {KV_GROUP: best[1], FFN: best[2]}
    kept = [
        {axis: order[layer, axis].indices[: widths[axis]].tolist() for axis in AXES} for layer in range(len(structure.layers))
    ]
    return Plan.of(structure, kept)


def _plan(structure: Structure, chosen: list[_Item]) -> Plan:
    kept: list[dict[str, list[int]]] = [{axis: [] for axis in AXES} for _ in structure.layers]
    for item in chosen:
        kept[item.site[0]][item.site[1]].extend(item.units)
    return Plan.of(structure, kept)


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
    kept[order[torch.cumsum(costs[order], 0) <= _allowance(structure, keep, of) + 0.5]] = 1.0
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
        wanted = _allowance(structure, keep, of)
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
