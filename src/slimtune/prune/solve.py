"""The Plan that meets the budget exactly: deterministic, rounded for the hardware, no layer empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from slimtune.errors import UserError
from slimtune.prune.budget import allowance
from slimtune.prune.gates import Site
from slimtune.sections import BudgetConfig
from slimtune.structure.axes import AXES, FFN, KV_GROUP, Structure
from slimtune.structure.plan import Counts, Plan, count

MULTIPLES = (128, 64, 32, 16, 8, 4)
_TRADES = 8
"""KV groups that a Plan may keep more or fewer than the scores say, to meet the budget with whole blocks."""


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
    cost, because the budget pulls on each in proportion to what it owns. MLP widths are rounded to ``ffn_multiple``;
    every layer keeps at least one KV group and one rounding block.

    Raises:
        UserError: the budget cannot be met; names the reachable range or the rounding that could.
    """
    keep = budget.keep
    slack = budget.tolerance
    pool = MULTIPLES if budget.ffn_multiple == "auto" else (budget.ffn_multiple,)
    fill = _fill_uniform if budget.layout == "uniform" else _fill_free
    best: tuple[float, float] | None = None
    for multiple in pool:
        plan = fill(scores, structure, keep, budget.of, multiple, slack)
        if plan is None:
            continue
        counts = count(structure, plan)
        ratio = counts.total_ratio if budget.of == "total" else counts.block_ratio
        error = abs(ratio - keep)
        if best is None or error < best[0]:
            best = error, ratio
        if error <= slack:
            return plan, counts
    lowest = smallest_ratio(structure, budget.of, min(pool))
    if keep < lowest:
        wide = min(pool) > min(MULTIPLES)
        raise UserError(
            f"budget.keep={keep} of {budget.of} cannot be met: embeddings, norms and the least every layer must keep (a KV "
            f"group and {min(pool)} channels) are already {lowest:.3f}; ask for more than that"
            + (", lower budget.ffn_multiple" if wide else "")
            + (", or use budget.of=block" if budget.of == "total" else "")
        )
    nearest = f"the nearest is {best[1]:.4f}" if best else "no plan exists"
    raise UserError(
        f"budget.keep={keep} cannot be met within budget.tolerance={budget.tolerance} with "
        f"budget.ffn_multiple={budget.ffn_multiple} and budget.layout={budget.layout} ({nearest}); "
        "use a smaller multiple or a larger tolerance"
    )


def check_budget(structure: Structure, budget: BudgetConfig) -> None:
    """Raise UserError where no Plan meets the budget, whatever a search will find."""
    solve({site: torch.zeros(structure.layers[site[0]].units[site[1]]) for site in structure.sites()}, structure, budget)


def smallest_ratio(structure: Structure, of: str, multiple: int) -> float:
    """The ratio with one KV group and one rounding block in every layer."""
    least = sum(
        layer.unit_params[KV_GROUP] + min(multiple, layer.units[FFN]) * layer.unit_params[FFN] for layer in structure.layers
    )
    if of == "block":
        return least / structure.prunable_params
    return (least + structure.constant_params) / structure.total_params


def _items(scores: Mapping[Site, Tensor], structure: Structure, multiple: int) -> tuple[list[_Item], list[_Item]]:
    """(what every layer must keep, the rest), each site's units in falling order of score, in rounding blocks."""
    must: list[_Item] = []
    rest: list[_Item] = []
    for site in structure.sites():
        layer, axis = site
        ranked = torch.sort(scores[site].detach().double().cpu(), descending=True, stable=True)
        order, size = ranked.indices.tolist(), multiple if axis == FFN else 1
        whole = len(order) // size * size
        means = ranked.values[:whole].view(-1, size).mean(1).tolist()  # of all blocks at once: an 8B model has thousands
        if whole < len(order):
            means.append(float(ranked.values[whole:].mean()))
        for number, score in enumerate(means):
            units = tuple(order[number * size : (number + 1) * size])
            item = _Item(score, len(units) * structure.layers[layer].unit_params[axis], site, units)
            (must if number == 0 else rest).append(item)
    return must, rest


def _fill_free(
    scores: Mapping[Site, Tensor], structure: Structure, keep: float, of: str, multiple: int, slack: float
) -> Plan | None:
    must, rest = _items(scores, structure, multiple)
    left = allowance(structure, keep, of) - sum(item.cost for item in must)
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
            chosen, left = over, left_over
    whole = structure.total_params if of == "total" else structure.prunable_params
    if abs(left) > slack * whole:
        taken = set(map(id, chosen))
        out = [item for item in rest if id(item) not in taken]
        chosen = _trade(chosen, out, len(must), left, slack * whole) or chosen
    return _plan(structure, chosen)


def _trade(chosen: list[_Item], out: list[_Item], fixed: int, left: float, slack: float) -> list[_Item] | None:
    """A few KV groups more or fewer, then MLP blocks, until ``left`` is within ``slack``; None where no such trade exists.

    So whether wide blocks can meet a budget hardly depends on the scores, and what holds before a search holds after it.

    Args:
        chosen: what is kept, the first ``fixed`` for good, then best first.
        out: what is not, best first.
    """
    drop = {axis: [item for item in reversed(chosen[fixed:]) if item.site[1] == axis] for axis in AXES}
    add = {axis: [item for item in out if item.site[1] == axis] for axis in AXES}
    if not (drop[FFN] or add[FFN]):
        return None
    block = (drop[FFN] or add[FFN])[0].cost
    for groups in sorted(range(-_TRADES, _TRADES + 1), key=abs):
        first = _move(add[KV_GROUP], drop[KV_GROUP], groups)
        then = _move(add[FFN], drop[FFN], round((left - first.cost) / block)) if first else None
        if first and then and abs(left - first.cost - then.cost) <= slack:
            gone = set(map(id, first.gone + then.gone))
            return [item for item in chosen if id(item) not in gone] + first.come + then.come
    return None


@dataclass(frozen=True)
class _Move:
    """Items that come in and items that go, and what that adds to the cost."""

    come: list[_Item]
    gone: list[_Item]

    @property
    def cost(self) -> int:
        return sum(item.cost for item in self.come) - sum(item.cost for item in self.gone)


def _move(add: list[_Item], drop: list[_Item], number: int) -> _Move | None:
    """The first ``number`` of ``add`` come, or as many of ``drop`` go when it is negative; None where they are too few."""
    if number > len(add) or -number > len(drop):
        return None
    return _Move(add[: max(0, number)], drop[: max(0, -number)])


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


def _fill_uniform(
    scores: Mapping[Site, Tensor], structure: Structure, keep: float, of: str, multiple: int, slack: float
) -> Plan | None:
    """Equal widths: for each head count the width nearest to the budget; the pair that keeps the highest scores.

    Pairs within ``slack`` go before those that rounding merely allows, then head counts that the stock config takes.
    """
    first = structure.layers[0]
    if any(layer.units != first.units for layer in structure.layers):
        raise UserError("budget.layout=uniform needs a base whose layers are all alike; use layout=per-layer")
    order = {site: torch.sort(scores[site].detach().double().cpu(), descending=True, stable=True) for site in structure.sites()}
    per_layer = allowance(structure, keep, of) / len(structure.layers)
    whole = structure.total_params if of == "total" else structure.prunable_params
    best: tuple[bool, bool, float, int, int] | None = None
    for groups in range(1, first.units[KV_GROUP] + 1):
        channels = (per_layer - groups * first.unit_params[KV_GROUP]) / first.unit_params[FFN]
        width = min(first.units[FFN], round(channels / multiple) * multiple)
        if abs(channels - first.units[FFN]) < abs(channels - width):
            width = first.units[FFN]  # the full width need not be a multiple
        if width < min(multiple, first.units[FFN]):
            continue
        cost = groups * first.unit_params[KV_GROUP] + width * first.unit_params[FFN]
        if abs(cost - per_layer) > 0.5 * multiple * first.unit_params[FFN]:
            continue
        value = sum(
            float(torch.sigmoid(order[layer, axis].values[:n]).sum()) * first.unit_params[axis]
            for layer in range(len(structure.layers))
            for axis, n in ((KV_GROUP, groups), (FFN, width))
        )
        meets = abs(cost - per_layer) * len(structure.layers) <= slack * whole
        if best is None or (meets, structure.stock(groups), value) > best[:3]:
            best = meets, structure.stock(groups), value, groups, width
    if best is None:
        return None
    widths = {KV_GROUP: best[3], FFN: best[4]}
    kept = [
        {axis: order[layer, axis].indices[: widths[axis]].tolist() for axis in AXES} for layer in range(len(structure.layers))
    ]
    return Plan.of(structure, kept)


def _plan(structure: Structure, chosen: list[_Item]) -> Plan:
    kept: list[dict[str, list[int]]] = [{axis: [] for axis in AXES} for _ in structure.layers]
    for item in chosen:
        kept[item.site[0]][item.site[1]].extend(item.units)
    return Plan.of(structure, kept)
