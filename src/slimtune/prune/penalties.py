"""Group lasso over the LoRA entries of pruned units (LoRA-aware semantics): a loss, or a proximal step.

A unit's group is joint over all coupled matrices (specification 5.8): for an MLP channel rows of B of gate and up and the
column of A of down; for a KV group rows of B of q, k, v and columns of A of o. Groups come from ``models.surgery.lora_slices``
as objects with ``tensor``, ``dim`` and ``rows``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from slimtune.prune.gates import Masks, Site


class Slice(Protocol):
    """Entries of one LoRA factor, ``rows`` of them along ``dim`` for every unit."""

    @property
    def tensor(self) -> Tensor: ...
    @property
    def dim(self) -> int: ...
    @property
    def rows(self) -> int: ...


Groups = Mapping[Site, Sequence[Slice]]
EPS = 1e-20


def group_norms(groups: Groups) -> dict[Site, Tensor]:
    """The 2-norm of every unit's group: {site: [units]}, differentiable."""
    norms = {}
    for site, slices in groups.items():
        squares = [_by_unit(item).square().sum(dim=1) for item in slices]
        norms[site] = torch.stack([square.float() for square in squares]).sum(0).add(EPS).sqrt()
    return norms


def _by_unit(item: Slice) -> Tensor:
    """[units, rows * other]."""
    flat = item.tensor if item.dim == 0 else item.tensor.t()
    return flat.reshape(flat.shape[0] // item.rows, -1)


def lasso_loss(groups: Groups, masks: Masks) -> Tensor:
    """Mean over layers of the summed norms of pruned groups (specification 1.6a)."""
    layers = len({layer for layer, _ in groups})
    norms = group_norms(groups)
    total = torch.stack([(norms[site] * (1 - masks[site])).sum() for site in groups]).sum()
    return total / layers


@torch.no_grad()
def proximal(groups: Groups, masks: Masks, strength: float, share: float = 0.0) -> Tensor:
    """Proximal step of the group lasso on pruned groups: ``n -> max(n - tau, 0)`` (specification 1.6b).

    ``tau`` is ``strength`` times the median norm of the kept groups of the site: relative to the model's own scale; but at
    least ``share`` times the largest pruned norm. With a share of 1/(steps left) the last step leaves exactly zero.
    Nothing is read back from the device on the way.

    Returns:
        The largest norm left in a pruned group, a scalar on the groups' device; 0 where nothing is pruned.
    """
    left = []
    for site, norms in group_norms(groups).items():
        pruned = masks[site] < 0.5
        # of the kept ones: where most are pruned, the median of all falls with them and they would never reach zero
        kept = torch.where(pruned, math.nan, norms).nanmedian()
        tau = strength * torch.where(kept.isnan(), norms.median(), kept)
        tau = torch.maximum(tau, share * torch.where(pruned, norms, 0.0).max())
        factor = torch.where(pruned, (norms - tau).clamp(min=0) / norms, 1.0)
        for item in groups[site]:
            _scale(item, factor)
        left.append(torch.where(pruned, norms * factor, 0.0).max())
    return torch.stack(left).max()


def _scale(item: Slice, factor: Tensor) -> None:
    spread = factor.repeat_interleave(item.rows).to(item.tensor.dtype)
    item.tensor.mul_(spread[:, None] if item.dim == 0 else spread[None, :])
