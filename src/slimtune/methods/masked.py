"""The masks of a Plan with experts, and a dense model that computes what they say.

Shapes: E experts, F mlp channels, K KV groups, P rotary pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from slimtune.models.head_hooks import place_head_masks
from slimtune.models.hooks import place_gates
from slimtune.prune import budget
from slimtune.prune.gates import MaskBank, Site
from slimtune.prune.router import Router
from slimtune.prune.token_masks import TokenMasks
from slimtune.structure.axes import FFN, KV_GROUP, Structure
from slimtune.structure.heads import PAIR, VALUE
from slimtune.structure.plan import Plan


@contextmanager
def routed(
    model: nn.Module, structure: Structure, plan: Plan, router: Router, values: TokenMasks | None = None
) -> Iterator[None]:
    """Inside, a plain dense ``model`` computes what its experts do, under the masks inside heads."""
    bank, device = MaskBank(), next(model.parameters()).device
    bank.router, bank.values = router.eval(), values
    if values:
        values.configure(plan.values, values.temperature)
    bank.close(masks_of(plan, device) | head_masks(plan, structure, device))
    handles = place_gates(model, structure, bank.consumer, bank.base, follow=bank.follow)
    if plan.pairs or plan.values:
        handles += place_head_masks(model, structure, bank.head)
    try:
        yield
    finally:
        router.forget()
        if values:
            values.forget()
        for handle in handles:
            handle.remove()


def all_groups(structure: Structure, device: torch.device) -> dict[Site, Tensor]:
    """Masks [K] of ones."""
    return {site: mask for site, mask in budget.all_kept(structure, device).items() if site[1] == KV_GROUP}


def masks_of(plan: Plan, device: torch.device) -> dict[Site, Tensor]:
    """Masks of experts {site: [1 + E, F]} of a Plan that has some."""
    found = {}
    for layer, division in enumerate(plan.experts):
        rows = torch.zeros(1 + len(division.routed), plan.full[layer][FFN])
        for row, channels in zip(rows, (division.shared, *division.routed), strict=True):
            row[list(channels)] = 1.0
        found[layer, FFN] = rows.to(device)
    return found


def head_masks(plan: Plan, structure: Structure, device: torch.device) -> dict[Site, Tensor]:
    """Masks inside heads of a Plan: of pairs [P]; of values nothing, for which the module takes its own state."""
    found: dict[Site, Tensor] = {}
    for layer, kept in enumerate(plan.pairs):
        mask = torch.zeros(structure.head_dim // 2)
        mask[list(kept)] = 1.0
        found[layer, PAIR] = mask.to(device)
    if plan.values:
        found |= {(layer, VALUE): torch.empty(0, device=device) for layer in range(len(plan.kept))}
    return found
