"""Units to slots of fixed sizes: each unit to one slot, each slot full, the sum of scores as large as prices can make it.

Sinkhorn's iteration (Cuturi 2013) finds a price for each slot at which about as many units want it as it holds; what still
wants a full slot goes to its next best one, those that lose least by it first. Deterministic: ties go to the lower index.
Shapes: L layers, F units, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

SWEEPS = 40


@torch.no_grad()
def prices(scores: Tensor, sizes: Tensor, temperature: float, sweeps: int = SWEEPS) -> Tensor:
    """What to add to ``scores`` [L, F, S] so that softmax over slots fills ``sizes`` [S] in expectation: [L, S].

    A slot of no size has the price minus infinity.
    """
    wanted = sizes.to(scores).log()[None]
    scaled = scores / temperature
    price = torch.zeros_like(scores[:, 0])
    for _ in range(sweeps):
        rows = torch.logsumexp(scaled + price[:, None], dim=2, keepdim=True)
        price = wanted - torch.logsumexp(scaled - rows, dim=1)
    return price * temperature


@torch.no_grad()
def assign(scores: Tensor, sizes: Tensor, temperature: float = 0.05, sweeps: int = SWEEPS) -> Tensor:
    """The slot of each unit, [L, F].

    Args:
        scores: [L, F, S], larger is better.
        sizes: [S], how many units each slot holds; they add up to F.
        temperature: of the prices, in units of the scores.
    """
    own = scores + prices(scores, sizes, temperature, sweeps)[:, None]
    layers, units, slots = scores.shape
    room = sizes.to(own.device).expand(layers, slots).clone()
    found = torch.full((layers, units), -1, dtype=torch.long, device=own.device)
    for _ in range(slots):
        open_ = own.masked_fill((room <= 0)[:, None], -torch.inf)
        best = open_.topk(min(2, slots), dim=2)
        choice = best.indices[..., 0].masked_fill(found >= 0, slots)  # slot number S: nothing wanted any more
        regret = (best.values[..., 0] - best.values[..., -1]).nan_to_num(posinf=torch.finfo(own.dtype).max)
        accepted = _first(choice, regret, room, slots)
        found = torch.where(accepted, choice, found)
        room = room - torch.zeros_like(room).scatter_add_(1, choice.clamp(max=slots - 1), accepted.long())
    return found


def widest(logits: Tensor, width: int) -> Tensor:
    """Of each layer and expert the ``width`` channels of the largest logits: boolean [L, F, S]."""
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices[:, :width]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, True)


def _first(choice: Tensor, regret: Tensor, room: Tensor, slots: int) -> Tensor:
    """Which units [L, F] are among the ``room`` [L, S] of largest ``regret`` of those that want the same slot."""
    by_regret = torch.sort(regret, dim=1, descending=True, stable=True).indices
    by_slot = torch.sort(choice.gather(1, by_regret), dim=1, stable=True)
    order = by_regret.gather(1, by_slot.indices)
    counts = torch.zeros(len(choice), slots + 1, dtype=torch.long, device=choice.device)
    counts.scatter_add_(1, choice, torch.ones_like(choice))
    starts = counts.cumsum(1) - counts
    place = torch.arange(choice.shape[1], device=choice.device)[None] - starts.gather(1, by_slot.values)
    rooms = torch.cat([room, torch.zeros_like(room[:, :1])], dim=1)
    inside = place < rooms.gather(1, by_slot.values)
    return torch.zeros_like(inside).scatter_(1, order, inside)
