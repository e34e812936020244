"""Scores of units on the untuned base: what the published prune-then-tune methods rank by.

Each criterion on whole KV groups and MLP channels; its docstring says where that differs from the paper or its code, and
docs/method.md says it in words. All read the same batches of the base as it is: none is taken again on a model that is half
cut. A score is of a unit; ``ranked`` makes logits that one common level cuts, as ``prune.solve`` does with those of the
generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimtune.methods.decide import Decider
from slimtune.methods.passes import Passes
from slimtune.models.sharded import whole
from slimtune.models.surgery import linears_of
from slimtune.models.weights import dense
from slimtune.prune.gates import Site
from slimtune.prune.prior import Ranking, prior_logits
from slimtune.structure.axes import KV_GROUP
from slimtune.train.loop import hash_seed
from slimtune.train.session import Session

Scores = dict[Site, Tensor]


class Scorer:
    """A base model with open gates, decision batches, and what was read of them.

    Args:
        batches: how many decision batches to read; default: ``twostage.batches``.

    Attributes:
        means: of each entry of the consumers' inputs, where a criterion took them (FLAP compensates with them).
    """

    def __init__(self, session: Session, model: nn.Module, decider: Decider, batches: int | None = None):
        self.session, self.model, self.decider = session, model, decider
        self.structure = session.structure
        self.passes = Passes(session, model, decider.batches, batches or session.recipe.twostage.batches)
        self.means: Scores = {}

    @property
    def tokens(self) -> int:
        """Read so far."""
        return self.passes.tokens

    def random(self) -> Scores:
        """Uniform noise."""
        rng = torch.Generator().manual_seed(hash_seed(self.session.recipe.seed, "random scores"))
        return {site: torch.rand(self._units(site), generator=rng) for site in self.structure.sites()}

    @torch.no_grad()
    def magnitude(self) -> Scores:
        """Sum of squares of all weights a unit owns."""
        scores: Scores = {}
        for layer, row, module in linears_of(self.model, self.structure):
            weight: Any = getattr(module, "base_layer", module).weight
            for dim, side in ((0, row.out), (1, row.into)):
                if side:
                    squares = whole(dense(weight)).float().square().sum(1 - dim).view(-1, self.structure.rows(side)).sum(1)
                    site = (layer, side.axis)
                    scores[site] = scores[site] + squares if site in scores else squares
        return scores

    def taylor(self) -> Scores:
        """Squared gradients of the gates, per sample: the loss change in Fisher form (Molchanov et al. 2019).

        LLM-Pruner (Ma et al. 2023) estimates the same change from the gradients of the single weights and sums their absolute
        values over a unit.
        """
        scores = self.decider.taylor(self.passes.count)
        self.passes.tokens += self.decider.tokens.pop("prior")
        self.decider.tokens["prior"] = 0
        return scores

    def wanda(self, squares: Scores | None = None) -> Scores:
        """Weight times input norm, sum over a unit's columns of the consumer: sum_ij |W_ij| * ||x_j||_2.

        Wanda (Sun et al. 2024) scores single weights; summed over units it is the Wanda-sp of An et al. 2024, which goes from
        layer to layer on inputs that are pruned already.

        Args:
            squares: ||x_j||^2 of all entries, where they are known already.
        """
        squares = squares or self._inputs()[1]
        entries = self._by_columns({site: value.sqrt() for site, value in squares.items()}, power=1)
        return {site: value.view(self._units(site), -1).sum(1).float() for site, value in entries.items()}

    def flap(self) -> Scores:
        """Fluctuation of the input times weight, Var(x_j) * ||W_:j||^2 (An et al. 2024, "WIFV").

        In the order of the authors' code: squared once more in attention, standardised over the entries of a layer and axis,
        then averaged over a unit's entries.
        """
        sums, squares, count = self._inputs()
        self.means = {site: value / count for site, value in sums.items()}
        spread = {site: (squares[site] / count - self.means[site].square()).clamp(min=0) for site in squares}
        scores = {}
        for site, entries in self._by_columns(spread, power=2).items():
            value = entries.square() if site[1] == KV_GROUP else entries
            value = (value - value.mean()) / value.std().clamp(min=1e-30)
            scores[site] = value.view(self._units(site), -1).mean(1).float()
        return scores

    def influence(self) -> list[float]:
        """1 - mean cosine similarity of each block's input and output (ShortGPT, Men et al. 2024, equation 1)."""
        totals = torch.zeros(len(self.structure.layers), dtype=torch.float64, device=self.session.device)
        count = torch.zeros((), dtype=torch.float64, device=self.session.device)

        def see(real: Tensor, layer: int, before: Tensor, after: Tensor) -> None:
            totals[layer] += F.cosine_similarity(before[real].float(), after[real].float(), dim=-1).double().sum()

        for real in self.passes.run(lambda real: {"blocks": lambda *args: see(real, *args)}):
            count += real.sum()
        totals, count = (self.session.accelerator.reduce(value) for value in (totals, count))
        similar: list[float] = (totals / count).tolist()
        return [1 - value for value in similar]

    def _inputs(self) -> tuple[Scores, Scores, Tensor]:
        """Sum and sum of squares of each entry of the consumers' inputs, fp64, and the number of tokens."""
        sums: Scores = {}
        squares: Scores = {}
        count = torch.zeros((), dtype=torch.float64, device=self.session.device)

        def see(real: Tensor, layer: int, axis: str, values: Tensor) -> None:
            found, site = values[real].double(), (layer, axis)
            sums[site] = sums.get(site, 0) + found.sum(0)
            squares[site] = squares.get(site, 0) + found.square().sum(0)

        for real in self.passes.run(lambda real: {"consumers": lambda *args: see(real, *args)}):
            count += real.sum()
        reduce = self.session.accelerator.reduce
        sums, squares = ({site: reduce(value) for site, value in part.items()} for part in (sums, squares))
        return sums, squares, reduce(count)

    def _by_columns(self, values: Scores, power: int) -> Scores:
        """values_j * sum_i |W_ij|^power for each input entry j, W of the consumer; the entries of a unit lie together."""
        scores = {}
        for layer, row, module in linears_of(self.model, self.structure):
            if row.into:
                weight: Any = getattr(module, "base_layer", module).weight
                columns = whole(dense(weight)).double().abs().pow(power).sum(0)
                site = (layer, row.into.axis)
                scores[site] = columns * values[site]
        return scores

    def _units(self, site: Site) -> int:
        return self.structure.layers[site[0]].units[site[1]]


CRITERIA: dict[str, Callable[[Scorer], Scores]] = {
    "random": Scorer.random,
    "magnitude": Scorer.magnitude,
    "taylor": Scorer.taylor,
    "wanda": Scorer.wanda,
    "flap": Scorer.flap,
}
_RANKING: dict[str, Ranking | None] = {
    "random": "layer",
    "magnitude": "layer",
    "wanda": "layer",
    "taylor": "axis",
    "flap": None,
}


def ranked(scores: Scores, session: Session) -> Scores:
    """Logits for ``prune.solve``, see ``TwoStageConfig.ranking``."""
    config = session.recipe.twostage
    ranking = _RANKING[config.scores]
    if ranking is not None and config.ranking != "auto":
        ranking = config.ranking
    return scores if ranking is None else prior_logits(scores, session.structure, 1.0, ranking)
