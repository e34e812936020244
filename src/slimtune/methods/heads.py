"""Masks inside heads while experts are found: rotary pairs of q and k, and every token's value dimensions (ToMoE, section 3.3).

Shapes: L layers, K KV groups, G query heads of one, h head_dim, P = h / 2 rotary pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slimtune.models.surgery import linears_of
from slimtune.models.weights import dense
from slimtune.prune.experts import Made
from slimtune.prune.gates import MaskBank, Site, of_rank_0
from slimtune.prune.sampling import topped
from slimtune.prune.shape import Shape
from slimtune.prune.token_masks import TokenMasks, head_logits
from slimtune.structure.axes import FFN, KV_GROUP, QUERY, Linear, Structure
from slimtune.structure.heads import PAIR, VALUE, attention_params, module_params
from slimtune.train.loop import hash_seed
from slimtune.train.session import Session

OFFSET = 3.0
"""Added to logits without a prior where widths are free, so that nearly everything is kept at first (published)."""


class Heads:
    """What is learned about heads beside the generator.

    Attributes:
        values: makes every token's mask; None: of pairs alone.
        spare: what attention has at first and will lose, in channels of a layer.
    """

    def __init__(self, session: Session, bank: MaskBank, shape: Shape):
        self.config, self.structure, self.shape = session.recipe.moe, session.structure, shape
        self.budget, first = session.recipe.budget, session.structure.layers[0]
        whole = attention_params(self.structure, first, shape.groups)
        self.spare = (whole - attention_params(self.structure, first, shape.groups, shape.pairs, shape.values)) / (
            first.unit_params[FFN]
        )
        self.values: TokenMasks | None = None
        if shape.values:
            torch.manual_seed(hash_seed(session.recipe.seed, "values"))
            layers = len(self.structure.layers)
            self.values = TokenMasks(self.structure.hidden, layers, self.structure.head_dim).to(session.device)
        bank.values = self.values

    def sites(self, made: Made, part: float, temperature: float, free: bool, noise: float = 0.0) -> dict[Site, Tensor]:
        """Masks of pairs [P], and what the module makes those of values with.

        Args:
            part: how far it has come from all of attention to its final size, 0..1.
            free: as many as have a logit above nothing (published).
        """
        every = self.structure.head_dim // 2, self.structure.head_dim
        pairs, values = (
            full - round(part * (full - last)) for full, last in zip(every, (self.shape.pairs, self.shape.values), strict=True)
        )
        masks = topped(made.pairs, 0 if free else pairs, temperature, offset=OFFSET)
        found = {(layer, PAIR): each for layer, each in enumerate(masks)}
        if self.values:
            self.values.configure(0 if free else values, temperature, noise, OFFSET)
            found |= {(layer, VALUE): each for layer, each in enumerate(made.states)}
        return found

    def press(self, parts: int) -> None:
        """Give the widest token of each layer the price that the budget's penalty would have at its target.

        Args:
            parts: micro-batches of a step.
        """
        if self.values:
            whole = self.structure.total_params if self.budget.of == "total" else self.structure.prunable_params
            owned = self.shape.values * self.structure.layers[0].value_params
            self.values.price = self.config.budget * owned / (self.budget.keep * whole) / parts
            self.values.target = self.shape.values

    def lost(self, sampled: dict[Site, Tensor]) -> Tensor:
        """Parameters of attention that a token does without: pairs as sampled, values as they will be (they have a price).

        Less those of the modules, which come on top.
        """
        every = self.structure.head_dim // 2
        lost = [
            (every - mask.sum()) * self.structure.layers[layer].pair_params
            for (layer, axis), mask in sampled.items()
            if axis == PAIR
        ]
        kept = self.shape.values or self.structure.head_dim
        modules = len(self.structure.layers) * module_params(self.structure) if self.values else 0
        return (
            torch.stack(lost).sum()
            - modules
            + sum((self.structure.head_dim - kept) * each.value_params for each in self.structure.layers)
        )

    def start(self, pairs: Tensor, values: Tensor) -> Tensor:
        """Begin from scores of pairs [L, P] and of value dimensions [L, h]; the logits of pairs."""
        shared = of_rank_0({(0, PAIR): pairs.flatten(), (0, VALUE): values.flatten()})
        if self.values:
            logits = head_logits(shared[0, VALUE].view_as(values), self.config.prior_scale)
            self.values.start(dict(enumerate(logits)))
        return head_logits(shared[0, PAIR].view_as(pairs), self.config.prior_scale)

    def decided(self, made: Made) -> dict[str, Any]:
        """The Plan's pairs and values; what the generator says of tokens becomes the module's own."""
        found = topped(of_rank_0({(0, PAIR): made.pairs})[0, PAIR], self.shape.pairs, 1.0)
        if self.values:
            self.values.settle(of_rank_0({(0, VALUE): made.states})[0, VALUE])
        return {"pairs": [mask.nonzero().flatten().tolist() for mask in found.cpu()], "values": self.shape.values}


class HeadScores:
    """What pairs and value dimensions are worth on decision rows of the base: sums over heads and tokens.

    Of pair i ``sum |q_i|^2 sum |k_i|^2`` in each KV group (turning leaves the length of a pair as it is); of dimension d
    ``sum v_d^2 |W_o,d|^2``.
    """

    def __init__(self, structure: Structure):
        self.structure = structure
        self.squares: dict[tuple[int, str], Tensor] = {}
        self.kinds: dict[str, Linear] = {}

    def see(self, real: Tensor, layer: int, row: Linear, output: Tensor) -> None:
        """Add what a producer gives [B, T, out] at the real positions [B, T]."""
        if row.out and row.out.axis == KV_GROUP:
            found = output.flatten(0, 1)[real.flatten()].float().square().sum(0)
            site = layer, row.path
            self.squares[site] = self.squares[site] + found if site in self.squares else found
            self.kinds[row.path] = row

    def scores(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Of pairs [L, P] and of value dimensions [L, h]."""
        pairs, values = [], []
        columns = {layer: _columns(module) for layer, row, module in linears_of(model, self.structure) if _reads_heads(row)}
        for layer in range(len(self.structure.layers)):
            q, k, v = (self._grouped(self.squares[layer, path]) for path in self._paths())
            halves = (each.unflatten(-1, (2, -1)).sum(-2) for each in (q, k))
            query, key = halves
            pairs.append((query * key).sum(0))
            values.append((v * self._grouped(columns[layer])).sum(0))
        return torch.stack(pairs), torch.stack(values)

    def _paths(self) -> tuple[str, str, str]:
        query = next(path for path, row in self.kinds.items() if row.rotary and row.out == QUERY)
        key = next(path for path, row in self.kinds.items() if row.rotary and row.out != QUERY)
        return query, key, next(path for path, row in self.kinds.items() if not row.rotary)

    def _grouped(self, entries: Tensor) -> Tensor:
        """Sums over the heads of each KV group: [K, h] of [heads * h]."""
        groups = self.structure.layers[0].units[KV_GROUP]
        return entries.view(groups, -1, self.structure.head_dim).sum(1)


def _reads_heads(row: Linear) -> bool:
    return row.into is not None and row.into.axis == KV_GROUP


def _columns(module: Any) -> Tensor:
    """Squared norms of the columns of a linear."""
    return dense(getattr(module, "base_layer", module).weight).float().square().sum(0)
