"""The generator of experts, and from its logits the experts themselves (ToMoE, arXiv 2501.15316, section 3).

One embedding for each layer and slot goes along the depth through a bidirectional GRU; a decoder of each layer makes logits of
all channels. ``partition``: slots are shared, expert 1..E and dropped, of which each channel takes one; ``overlap``: slots are
the experts, of which each takes or leaves a channel. Shapes: L layers, S slots, F mlp channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.prune.assign import assign, prices
from slimtune.sections import MoeConfig
from slimtune.structure.heads import STATE

INPUT, HIDDEN = 32, 64
"""Of the GRU, each direction (as published)."""


@dataclass(frozen=True)
class Made:
    """Logits of channels [L, F, S], of rotary pairs [L, P], and what masks of tokens begin with (u) [L, STATE].

    The latter two have no numbers a layer where attention has no masks inside heads.
    """

    channels: Tensor
    pairs: Tensor
    states: Tensor


class ExpertGenerator(nn.Module):
    """``forward() -> logits [L, F, S]``, fp32, prior included; ``made()``: those of attention too.

    Args:
        pairs: P, rotary pairs that have logits. With some the GRU goes through attention and MLP of every layer by turns, as
            published; what it says of attention is the mean over slots.
    """

    prior: Tensor
    pair_prior: Tensor

    def __init__(self, layers: int, channels: int, slots: int, config: MoeConfig, pairs: int = 0):
        """Draw the starting weights (seed torch before)."""
        super().__init__()
        self.kind, self.pairs = config.generator, pairs
        if self.kind == "gru":
            self.inputs = nn.Parameter(torch.randn(layers * (2 if pairs else 1), slots, INPUT))
            self.gru = nn.GRU(INPUT, HIDDEN, bidirectional=True)
            self.norms = nn.ModuleList(nn.LayerNorm(2 * HIDDEN) for _ in range(layers))
            self.decoders = nn.ParameterList(torch.randn(channels, 2 * HIDDEN) * 0.1 / (2 * HIDDEN) for _ in range(layers))
        else:
            # times the width, so that one learning rate moves the logits of both kinds about equally fast
            self.free = nn.Parameter(torch.zeros(layers, channels, slots))
        self.register_buffer("prior", torch.zeros(layers, channels, slots))
        if pairs:
            self._add_pairs(layers, pairs)

    def _add_pairs(self, layers: int, pairs: int) -> None:
        if self.kind == "gru":
            self.pair_norms = nn.ModuleList(nn.LayerNorm(STATE) for _ in range(layers))
            self.pair_decoders = nn.ParameterList(torch.randn(pairs, STATE) * 0.1 / STATE for _ in range(layers))
        else:
            self.free_pairs = nn.Parameter(torch.zeros(layers, pairs))
            self.free_states = nn.Parameter(torch.zeros(layers, STATE))
        self.register_buffer("pair_prior", torch.zeros(layers, pairs))

    def set_prior(self, prior: Tensor) -> None:
        """Start from these logits [L, F, S]."""
        self.prior.copy_(prior)

    def forward(self) -> Tensor:
        """Logits of the channels [L, F, S], fp32."""
        return self.made().channels

    def made(self) -> Made:
        """Everything, of one pass."""
        if self.kind != "gru":
            found = self.prior + 2 * HIDDEN * self.free
            if not self.pairs:
                return Made(found, found.new_zeros(len(found), 0), found.new_zeros(len(found), 0))
            return Made(found, self.pair_prior + 2 * HIDDEN * self.free_pairs, self.free_states)
        with torch.autocast(self.inputs.device.type, enabled=False):
            states, _ = self.gru(self.inputs)  # depth is the sequence, slots are the batch
            heads = states[::2].mean(1) if self.pairs else states[:, 0, :0]
            mlp = states[1::2] if self.pairs else states
            channels = self.prior + torch.stack(
                [self._decoded(*each) for each in zip(self.decoders, self.norms, mlp, strict=True)]
            )
            if not self.pairs:
                return Made(channels, heads, heads)
            parts = [self._decoded(*each) for each in zip(self.pair_decoders, self.pair_norms, heads[:, None], strict=True)]
        return Made(channels, self.pair_prior + torch.stack(parts)[..., 0], heads)

    @staticmethod
    def _decoded(decoder: Tensor, norm: nn.Module, state: Tensor) -> Tensor:
        return decoder @ F.gelu(norm(state)).T


def partitioned(logits: Tensor, sizes: Tensor, temperature: float) -> Tensor:
    """Each channel to one slot, each slot as full as ``sizes`` [S] says: 0/1 [L, F, S], with the gradient of softmax.

    That is of the logits at the slots' prices. What raises all logits of a slot changes nothing, so it has no gradient.
    """
    centred = logits - logits.mean(1, keepdim=True)
    hard = F.one_hot(assign(centred, sizes, temperature), logits.shape[-1]).to(logits.dtype)
    soft = torch.softmax((centred + prices(centred, sizes, temperature)[:, None]) / temperature, -1)
    return hard + (soft - soft.detach())


def union_loss(masks: Tensor) -> Tensor:
    """How far experts [L, F, S] are from having every channel: mean over layers of log(1 / covered) (arXiv 2501.15316)."""
    covered = 1 - torch.prod(1 - masks, dim=-1)
    return torch.log((1 + _FLOOR) / (covered.mean(1) + _FLOOR)).mean()


_FLOOR = 1e-3
