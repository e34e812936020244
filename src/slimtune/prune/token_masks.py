"""Which value dimensions a token has: a small module a layer (ToMoE, arXiv 2501.15316, section 3.3).

The logits of token t are ``a_t = b + W_a GELU(LN(W_x x_t + u))``, of what q, k and v read; on are its ``width`` largest, in
training, in evaluation and in what is written. They multiply the token's values (all KV heads) and, as those of the query, what
o_proj reads (all query heads): dimensions that either of two tokens lacks add nothing. While experts are found u is the mean of
the generator's states; then it is the module's own and learns with the rest. Shapes: B batch, T tokens, D model, h head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.prune.router import WithLoss
from slimtune.prune.sampling import topped
from slimtune.structure.heads import STATE


class TokenMasks(nn.Module):
    """Modules of all layers, fp32.

    Attributes:
        width: dimensions that a token has; 0: all whose logit, ``offset`` added, is above nothing.
        temperature: of the relaxed masks, whose gradient the hard ones have.
        noise: factor of logistic noise on the logits, while training; 0: none.
        offset: see ``width``.
        real: which positions [B, T] of the present batch are no padding; None: all.
        price, target: of a penalty ``price |log(dimensions of the widest token / target)|`` a layer, where there is no width.
    """

    def __init__(self, hidden: int, layers: int, head_dim: int):
        """Draw the starting weights (seed torch before)."""
        super().__init__()
        self.reads = nn.ParameterList(torch.randn(STATE, hidden) * 0.02 for _ in range(layers))
        self.states = nn.ParameterList(torch.zeros(STATE) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(STATE) for _ in range(layers))
        self.makes = nn.ParameterList(torch.randn(head_dim, STATE) * 0.1 / STATE for _ in range(layers))
        self.biases = nn.ParameterList(torch.zeros(head_dim) for _ in range(layers))
        self.width, self.temperature, self.noise, self.offset = head_dim, 1.0, 0.0, 0.0
        self.price, self.target = 0.0, head_dim
        self.masks: dict[int, Tensor] = {}
        self.real: Tensor | None = None

    def follow(self, layer: int, x: Tensor, state: Tensor) -> None:
        """Take what q, k and v of ``layer`` are about to read [B, T, D]; ``state`` [STATE] is u, or empty: the module's own."""
        self.masks[layer] = self.mask(layer, x, state if len(state) else self.states[layer])

    def mask(self, layer: int, x: Tensor, state: Tensor) -> Tensor:
        """0/1 [B, T, h], with the gradient of the relaxed mask."""
        logits = self.logits(layer, x, state)
        if self.noise and self.training:
            uniform = torch.rand_like(logits).clamp_(1e-9, 1 - 1e-7)
            logits = logits + self.noise * uniform.logit()
        mask = topped(logits, self.width, self.temperature, offset=self.offset)
        if not torch.is_grad_enabled():
            return mask
        if self.price and self.training and not self.width:
            widths = mask.sum(-1)
            widest = (widths if self.real is None else widths * self.real).max()
            mask = WithLoss.apply(mask, self.price * (widest.clamp(min=1.0) / self.target).log().abs())
        return mask

    def logits(self, layer: int, x: Tensor, state: Tensor) -> Tensor:
        """[B, T, h] fp32, whatever the model's type is: as the written class computes them."""
        norm: Any = self.norms[layer]
        with torch.autocast(x.device.type, enabled=False):
            mixed = F.layer_norm(F.linear(x.float(), self.reads[layer]) + state, (STATE,), norm.weight, norm.bias, norm.eps)
            return F.linear(F.gelu(mixed), self.makes[layer], self.biases[layer])

    def configure(self, width: int, temperature: float, noise: float = 0.0, offset: float = 0.0) -> None:
        """What masks are made by from here on; see the attributes."""
        self.width, self.temperature, self.noise, self.offset = width, temperature, noise, offset

    @torch.no_grad()
    def start(self, biases: Mapping[int, Tensor]) -> None:
        """Begin from ``biases`` {layer: [h]}."""
        for layer, bias in biases.items():
            self.biases[layer].copy_(bias)

    @torch.no_grad()
    def settle(self, states: Tensor) -> None:
        """Take u of all layers [L, STATE] over from the generator."""
        for own, state in zip(self.states, states, strict=True):
            own.copy_(state)

    @torch.no_grad()
    def rounded(self, dtype: torch.dtype) -> TokenMasks:
        """Itself, its weights as they are after they were stored in ``dtype``."""
        for parameter in self.parameters():
            parameter.copy_(parameter.to(dtype))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Its weights by layer and the names of the written class."""
        found: dict[str, Tensor] = {}
        for layer in range(len(self.reads)):
            norm: Any = self.norms[layer]
            parts = (self.states[layer], self.reads[layer], norm.weight, norm.bias, self.makes[layer], self.biases[layer])
            found |= {f"{layer}.{name}": part.detach() for name, part in zip(NAMES, parts, strict=True)}
        return found

    def forget(self) -> None:
        """Let go of the last inputs' masks."""
        self.masks.clear()


NAMES = ("state", "read.weight", "norm.weight", "norm.bias", "make.weight", "make.bias")
"""Of a layer's weights in a file."""


def head_logits(scores: Tensor, scale: float) -> Tensor:
    """Logits [L, n] from scores [L, n] of at least nothing, with a standard deviation of ``scale`` in each layer.

    Logarithms, for what pairs and dimensions add differs by powers of ten.
    """
    spread = (scores / scores.mean(1, keepdim=True).clamp(min=1e-30)).clamp(min=math.exp(-20)).log()
    centred = spread - spread.mean(1, keepdim=True)
    return scale * centred / centred.std(1, keepdim=True).clamp(min=1e-12)
