"""Whole layers out, by how little each changes the residual stream (ShortGPT, Men et al. 2024, arXiv 2403.03853)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slimtune.errors import UserError
from slimtune.prune.gates import Site
from slimtune.prune.solve import MULTIPLES
from slimtune.sections import BudgetConfig
from slimtune.structure.axes import AXES, FFN, KV_GROUP, LayerWidths, Structure
from slimtune.structure.plan import Counts, Plan, count


def drop_layers(
    influence: Sequence[float], scores: Mapping[Site, Tensor], structure: Structure, budget: BudgetConfig
) -> tuple[Plan, Counts]:
    """The layers of least influence go, as many as the budget asks for; the next one or two are narrowed to meet it exactly.

    The published method removes whole layers only and so misses most budgets by up to half a layer; narrowing lets
    methods be compared at the same size.

    Args:
        influence: of each layer, 1 - mean cosine similarity of what goes in and what comes out.
        scores: which units of the narrowed layer stay.

    Raises:
        UserError: the narrowed layer cannot be rounded to meet ``budget.tolerance``.
    """
    whole = structure.total_params if budget.of == "total" else structure.prunable_params
    left = (1 - budget.keep) * whole
    slack = budget.tolerance * whole
    kept: list[dict[str, Sequence[int]]] = [{axis: range(layer.units[axis]) for axis in AXES} for layer in structure.layers]
    order = sorted(range(len(influence)), key=lambda layer: (influence[layer], layer))
    for layer in order[:-1]:
        widths = structure.layers[layer]
        cost = widths.params - (0 if budget.of == "total" else widths.fixed_params)
        if cost > left + slack:
            break
        kept[layer] = dict.fromkeys(AXES, ())
        left -= cost
    for layer in [layer for layer in order if kept[layer][FFN]]:
        if left <= slack:
            break
        keep, left = _narrowed(structure.layers[layer], left, budget, slack)
        kept[layer] = {axis: _best(scores[layer, axis], keep[axis]) for axis in AXES}
    plan = Plan.of(structure, kept)
    counts = count(structure, plan)
    if abs((counts.total_ratio if budget.of == "total" else counts.block_ratio) - budget.keep) > budget.tolerance:
        raise UserError(
            f"budget.keep={budget.keep} of {budget.of} cannot be met within budget.tolerance={budget.tolerance} by dropping "
            f"layers and narrowing others with budget.ffn_multiple={budget.ffn_multiple}; use a smaller multiple or a larger "
            "tolerance"
        )
    return plan, counts


def _narrowed(layer: LayerWidths, remove: float, budget: BudgetConfig, slack: float) -> tuple[dict[str, int], float]:
    """Units of each axis that stay when ``remove`` parameters go, and what is still to go: channels first, few KV groups.

    What a layer cannot lose without being empty is left for the next one.
    """
    pool = MULTIPLES if budget.ffn_multiple == "auto" else (budget.ffn_multiple,)
    for multiple in pool:
        for groups in range(layer.units[KV_GROUP]):
            channels = (remove - groups * layer.unit_params[KV_GROUP]) / layer.unit_params[FFN]
            gone = min(round(channels / multiple) * multiple, layer.units[FFN] - multiple)
            left = (channels - gone) * layer.unit_params[FFN]
            if gone >= 0 and abs(left) <= slack:
                return {KV_GROUP: layer.units[KV_GROUP] - groups, FFN: layer.units[FFN] - gone}, left
    least = min(pool[0], layer.units[FFN])
    removed = (layer.units[KV_GROUP] - 1) * layer.unit_params[KV_GROUP] + (layer.units[FFN] - least) * layer.unit_params[FFN]
    return {KV_GROUP: 1, FFN: least}, remove - removed


def _best(scores: Tensor, number: int) -> list[int]:
    found: list[int] = torch.sort(scores, descending=True, stable=True).indices[:number].tolist()
    return found
