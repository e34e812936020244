"""Which experts a token uses, and how much of each: linear routers as stock classes have them (ToMoE, arXiv 2501.15316, 3.2).

A router's logits are z = W x of the MLP's input x. The weights of the k = ``top_k`` experts of the largest logits are
k e^z / sum e^z (``softmax``) or k s(z) / sum s(z) (``sigmoid``), sums over the chosen ones: k in all, and one where k is one.
In training an expert that was not chosen has a gradient too: that of k p, p the share of all experts.
Shapes: B batch, T tokens, D model, E experts, F mlp channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.structure.axes import FFN
from slimtune.structure.experts import Host


class Router(nn.Module):
    """Routers of all layers, fp32: ``weights`` [E, D] of each, small and random until ``start``.

    Args:
        hidden: D; number: E.
        top_k: experts of a token.
        host: the stock class, which says how logits become weights.

    Attributes:
        counts: how often each expert was chosen [layers, E], where somebody counts; None: nobody.
        temperature: of the shares.
        noise: factor of Gumbel noise on the logits, while training; 0: none.
        balance: factor of the load balance, whose gradient joins that of the loss; 0: none.
        real: which positions [B, T] of the present batch are no padding; None: all. Balance and counts are of those.
    """

    def __init__(self, hidden: int, layers: int, number: int, top_k: int, host: Host):
        super().__init__()
        self.number, self.top_k, self.host, self.axis = number, top_k, host, FFN
        self.weights = nn.ParameterList(torch.randn(number, hidden) * 0.02 for _ in range(layers))
        self.temperature, self.noise, self.balance = 1.0, 0.0, 0.0
        self.routed: dict[int, Tensor] = {}
        self.counts: Tensor | None = None
        self.real: Tensor | None = None

    def follow(self, layer: int, x: Tensor) -> None:
        """Take the input [B, T, D] of the MLP of ``layer``, which a forward pass has come to."""
        self.routed[layer] = self.combined(layer, x)

    def mask(self, layer: int, experts: Tensor) -> Tensor:
        """What multiplies the channels [B, T, F], of the last input; ``experts`` [1 + E, F]: the shared one first."""
        weights = self.routed[layer]
        return weights.to(experts.dtype) @ experts[1:] + experts[0]

    def combined(self, layer: int, x: Tensor) -> Tensor:
        """Weights [B, T, E] of the experts, zero for those that are not chosen."""
        logits = self.logits(layer, x)
        chosen, weights = self.choose(logits)
        hard = torch.zeros_like(logits).scatter(-1, chosen, weights)
        if self.counts is not None:
            self.counts[layer] += self._counted(chosen)
        if not torch.is_grad_enabled():
            return hard
        share = self.shares(logits)
        if self.balance and self.training:
            used = self._mean(torch.zeros_like(logits).scatter(-1, chosen, 1.0)) / self.top_k
            loss = self.balance * self.number * (used * self._mean(share)).sum()
            hard = WithLoss.apply(hard, loss)
        soft = self.top_k * share
        return hard + (soft - soft.detach())

    def _mean(self, values: Tensor) -> Tensor:
        """Over the real positions: [E] of [B, T, E]."""
        if self.real is None:
            return values.flatten(0, 1).mean(0)
        real = self.real.to(values.dtype)
        return (values * real[..., None]).sum((0, 1)) / real.sum().clamp(min=1.0)

    def _counted(self, chosen: Tensor) -> Tensor:
        """How often each expert is among ``chosen`` [B, T, top_k] of real positions: [E]."""
        if self.real is None:
            return torch.bincount(chosen.flatten(), minlength=self.number)
        weights = self.real[..., None].expand_as(chosen).flatten().double()
        return torch.bincount(chosen.flatten(), weights=weights, minlength=self.number).long()

    def logits(self, layer: int, x: Tensor) -> Tensor:
        """[B, T, E] fp32, in the precision of the stock class, noise included where there is some."""
        weight = self.weights[layer]
        with torch.autocast(x.device.type, enabled=False):
            own = x.float() if self.host.wide_router else x
            found = F.linear(own, weight.to(own.dtype)).float()
        if self.noise and self.training:
            uniform = torch.rand_like(found).clamp_(1e-9, 1 - 1e-7)
            found = found - self.noise * torch.log(-torch.log(uniform))
        return found

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts [B, T, top_k] and their weights, which add up to ``top_k``."""
        if self.host.score == "softmax":
            values, chosen = torch.softmax(logits, -1).topk(self.top_k, -1)
        else:
            values, chosen = torch.sigmoid(logits).topk(self.top_k, -1)
        return chosen, self.top_k * values / values.sum(-1, keepdim=True)

    def shares(self, logits: Tensor) -> Tensor:
        """Of all experts [B, T, E]: they add up to one."""
        if self.host.score == "softmax":
            return torch.softmax(logits / self.temperature, -1)
        values = torch.sigmoid(logits)
        return values / values.sum(-1, keepdim=True)

    def start(self, weights: Mapping[int, Tensor]) -> None:
        """Begin from ``weights`` {layer: [E, D]}."""
        with torch.no_grad():
            for layer, weight in weights.items():
                self.weights[layer].copy_(weight)

    @torch.no_grad()
    def rounded(self, dtype: torch.dtype) -> Router:
        """Itself, its weights as they are after they were stored in ``dtype``."""
        for weight in self.weights:
            weight.copy_(weight.to(dtype))
        return self

    def forget(self) -> None:
        """Let go of the last inputs' routing."""
        self.routed.clear()


class WithLoss(torch.autograd.Function):
    """``value`` as it is; ``loss`` is differentiated along, in activation checkpointing too, where no list would hold it."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        return gradients[0], torch.ones((), device=gradients[0].device)
