"""A split without training, as the rival CMoE makes it (Pei et al. 2025, arXiv 2502.04416), with a router that can be stored.

A channel is active for a token whose ``ACTIVE`` largest |h| it is among. The channels that are active most often are shared,
the others are clustered by the tokens for which they are active, into experts of one size. CMoE routes by the hidden values of
the channels nearest to the experts' centres, which no stock class can; here a linear router is fitted to what the experts'
channels hold, which catches more than one that is fitted to those nearest channels.
Shapes: T tokens, F mlp channels, D model, E experts, S slots (1 + E + 1).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from slimtune.prune.assign import assign
from slimtune.prune.split import Split, lead, ridge

ACTIVE = 50
"""Published: 10 of 11,008 channels. On a base of 1,408 the split catches more of what its channels add with 50."""
_ROUNDS = 10


@torch.no_grad()
def cmoe_split(squares: Tensor, x: Tensor, sizes: Tensor) -> Split:
    """Split the channels of a layer.

    Args:
        squares: h^2 [T, F] of the MLP's hidden values; x: its inputs [T, D].
        sizes: of the slots [S]: shared, experts, left out.
    """
    number, channels = len(sizes) - 2, squares.shape[1]
    active = torch.zeros(squares.shape, device=squares.device)
    active.scatter_(1, squares.topk(min(ACTIVE, channels), 1).indices, 1.0)
    order = torch.sort(active.mean(0), descending=True, stable=True).indices
    shared, rest = order[: int(sizes[0])], order[int(sizes[0]) : channels - int(sizes[-1])]
    columns = active[:, rest].T  # of each channel the tokens for which it is active
    centres = columns[:number]
    belongs = torch.zeros(len(rest), dtype=torch.long, device=x.device)
    for _ in range(_ROUNDS):
        near = -torch.cdist(columns, centres).square()
        belongs = assign((near / near.std().clamp(min=1e-6))[None], sizes[1:-1])[0]
        members = F.one_hot(belongs, number).to(columns)
        centres = members.T @ columns / sizes[1].clamp(min=1)
    slots = torch.full((channels,), number + 1, device=x.device)
    slots[shared], slots[rest] = 0, belongs + 1
    masks = F.one_hot(slots, number + 2).float()
    squares = squares.float() / squares.float().sum(1).mean().clamp(min=1e-30)
    return Split(masks, ridge(x.float(), lead(squares, masks[:, 1:-1])))
