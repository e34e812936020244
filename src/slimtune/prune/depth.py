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
    """The layers of least influence go, as many as the budget asks for; the next one is narrowed to meet it exactly.

    The published method removes whole layers only and so misses most budgets by up to half a layer; narrowing one lets
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
        if cost <= left + slack:
            kept[layer] = dict.fromkeys(AXES, ())
            left -= cost
            continue
        break
    else:
        layer = order[-1]
    if left > slack:
        keep = _narrowed(structure.layers[layer], left, budget, slack)
        kept[layer] = {axis: _best(scores[layer, axis], keep[axis]) for axis in AXES}
    plan = Plan.of(structure, kept)
    return plan, count(structure, plan)


def _narrowed(layer: LayerWidths, remove: float, budget: BudgetConfig, slack: float) -> dict[str, int]:
    """Units of each axis that stay when ``remove`` parameters go: channels first, as few KV groups as possible."""
    pool = MULTIPLES if budget.ffn_multiple == "auto" else (budget.ffn_multiple,)
    for multiple in pool:
        for groups in range(layer.units[KV_GROUP]):
            channels = (remove - groups * layer.unit_params[KV_GROUP]) / layer.unit_params[FFN]
            gone = min(round(channels / multiple) * multiple, layer.units[FFN] - multiple)
            if gone >= 0 and abs(channels - gone) * layer.unit_params[FFN] <= slack:
                return {KV_GROUP: layer.units[KV_GROUP] - groups, FFN: layer.units[FFN] - gone}
    raise UserError(
        f"budget.keep={budget.keep} of {budget.of} cannot be met within budget.tolerance={budget.tolerance} by dropping layers "
        f"and narrowing one with budget.ffn_multiple={budget.ffn_multiple}; use a smaller multiple or a larger tolerance"
    )


def _best(scores: Tensor, number: int) -> list[int]:
    found: list[int] = torch.sort(scores, descending=True, stable=True).indices[:number].tolist()
    return found
