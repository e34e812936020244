"""The generator of experts, and from its logits the experts themselves (ToMoE, arXiv 2501.15316, section 3).

One embedding for each layer and slot goes along the depth through a bidirectional GRU; a decoder of each layer makes logits of
all channels. ``partition``: slots are shared, expert 1..E and dropped, of which each channel takes one; ``overlap``: slots are
the experts, of which each takes or leaves a channel. Shapes: L layers, S slots, F mlp channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.prune.assign import assign, prices, widest
from slimtune.sections import MoeConfig

INPUT, HIDDEN = 32, 64
"""Of the GRU, each direction (as published)."""


class ExpertGenerator(nn.Module):
    """``forward() -> logits [L, F, S]``, fp32, prior included."""

    prior: Tensor

    def __init__(self, layers: int, channels: int, slots: int, config: MoeConfig):
        """Draw the starting weights (seed torch before)."""
        super().__init__()
        self.kind = config.generator
        if self.kind == "gru":
            self.inputs = nn.Parameter(torch.randn(layers, slots, INPUT))
            self.gru = nn.GRU(INPUT, HIDDEN, bidirectional=True)
            self.norms = nn.ModuleList(nn.LayerNorm(2 * HIDDEN) for _ in range(layers))
            self.decoders = nn.ParameterList(torch.randn(channels, 2 * HIDDEN) * 0.1 / (2 * HIDDEN) for _ in range(layers))
        else:
            # times the width, so that one learning rate moves the logits of both kinds about equally fast
            self.free = nn.Parameter(torch.zeros(layers, channels, slots))
        self.register_buffer("prior", torch.zeros(layers, channels, slots))

    def set_prior(self, prior: Tensor) -> None:
        """Start from these logits [L, F, S]."""
        self.prior.copy_(prior)

    def forward(self) -> Tensor:
        if self.kind != "gru":
            return self.prior + 2 * HIDDEN * self.free
        with torch.autocast(self.inputs.device.type, enabled=False):
            states, _ = self.gru(self.inputs)  # depth is the sequence, slots are the batch
            parts = [
                decoder @ F.gelu(norm(state)).T for decoder, norm, state in zip(self.decoders, self.norms, states, strict=True)
            ]
        return self.prior + torch.stack(parts)


def partitioned(logits: Tensor, sizes: Tensor, temperature: float) -> Tensor:
    """Each channel to one slot, each slot as full as ``sizes`` [S] says: 0/1 [L, F, S], with the gradient of softmax.

    That is of the logits at the slots' prices. What raises all logits of a slot changes nothing, so it has no gradient.
    """
    centred = logits - logits.mean(1, keepdim=True)
    hard = F.one_hot(assign(centred, sizes, temperature), logits.shape[-1]).to(logits.dtype)
    soft = torch.softmax((centred + prices(centred, sizes, temperature)[:, None]) / temperature, -1)
    return hard + (soft - soft.detach())


def topped(logits: Tensor, width: int, temperature: float) -> Tensor:
    """Each expert its ``width`` best channels: 0/1 [L, F, S], with the gradient of sigmoid above the last of them."""
    level = logits.detach().topk(width, dim=1).values[:, -1:]
    soft = torch.sigmoid((logits - level) / temperature)
    return widest(logits, width).to(logits.dtype) + (soft - soft.detach())


def union_loss(masks: Tensor) -> Tensor:
    """How far experts [L, F, S] are from having every channel: mean over layers of log(1 / covered) (arXiv 2501.15316)."""
    covered = 1 - torch.prod(1 - masks, dim=-1)
    return torch.log((1 + _FLOOR) / (covered.mean(1) + _FLOOR)).mean()


_FLOOR = 1e-3
