"""The ``decide`` turn: teach the generator which units the model can live without, on rows that LoRA does not see.

(``search.decide_on`` may say otherwise.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.models.modes import quiet
from slimtune.prune import budget
from slimtune.prune.gates import MaskBank, Masks, Site, mean_over_ranks, of_rank_0, squares_over_ranks
from slimtune.prune.generator import Generator
from slimtune.prune.prior import prior_logits
from slimtune.prune.sampling import draw_noise, sample
from slimtune.prune.solve import solve
from slimtune.structure.plan import Counts, Plan
from slimtune.train.loop import hash_seed
from slimtune.train.objective import Batch, accumulate, loss_sum
from slimtune.train.optimizers import adamw
from slimtune.train.schedule import generator_factor, set_lr
from slimtune.train.session import Session


class Decider:
    """Generator, its optimiser and the stream of decision batches.

    Args:
        session: the run.
        model: the gated model, LoRA attached.
        bank: what its gates read.
        wrapped: gives the model as it is called (DDP wrapper or itself).
    """

    def __init__(self, session: Session, model: nn.Module, bank: MaskBank, wrapped: Callable[[], nn.Module]):
        self.session, self.model, self.bank, self.wrapped = session, model, bank, wrapped
        self.recipe, self.structure = session.recipe, session.structure
        torch.manual_seed(hash_seed(self.recipe.seed, "generator"))
        uniform = self.recipe.budget.layout == "uniform"
        self.generator = Generator(self.structure, self.recipe.generator, uniform).to(session.device)
        config = self.recipe.generator
        self.optimizer = adamw(self.generator.parameters(), config.lr, config.weight_decay)
        windows = session.splits.train if self.recipe.search.decide_on == "train" else session.splits.decision
        self.batches = session.batches(windows, "decision", self.recipe.search.batch or self.recipe.train.batch)
        self.scores: dict[Site, Any] = {}
        self.still: dict[Site, Any] = {}
        self._still_logits: dict[Site, Tensor] = {}
        self.tokens = {"prior": 0, "decide": 0}

    def turn(self, step: int) -> dict[str, Any]:
        """Generator step: full mask on base + LoRA, LoRA frozen, decision data (specification 1.7, 5.4)."""
        sampled = self.sample(step)
        turn = step // self.recipe.search.decide_every
        loss, leaves = self._backward_to_gates(self.batches.at(turn), sampled)
        self.tokens["decide"] += self.batches.tokens(turn)
        return {"loss": loss, **self.learn(step, sampled, leaves)}

    def learn(self, step: int, sampled: Masks, leaves: list[dict[Site, Tensor]]) -> dict[str, Any]:
        """Update the generator.

        Args:
            step: of the search.
            sampled: what ``sample`` gave.
            leaves: of every micro-batch of B samples, detached copies {site: [B, units]} with the gradients of the loss.

        Returns:
            The sampled and the wanted ratio, the budget loss and the norm of the generator's gradient.
        """
        search, config = self.recipe.search, self.recipe.generator
        set_lr(self.optimizer, generator_factor(step, search.steps))
        gradients = mean_over_ranks(*leaves)
        ratio = budget.kept_ratio(sampled, self.structure, self.recipe.budget.of)
        over = budget.budget_loss(ratio, self.target(step))
        weight = 0.0 if config.calibrate else search.alpha  # calibrated, what is left of it is sampling noise
        torch.autograd.backward(
            [*sampled.values(), weight * over], [*(gradients[site] for site in sampled), torch.ones_like(over)]
        )
        norm = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if config.prior in ("running", "mixed"):
            self._refresh_prior(leaves)
        return {"sampled": ratio.detach(), "target": self.target(step), "budget": over.detach(), "grad_norm": norm}

    def sample(self, step: int) -> dict[Site, Tensor]:
        """Hard gates {site: [units]} drawn for ``step`` of the search, differentiable in the generator's weights."""
        config = self.recipe.generator
        rng = torch.Generator().manual_seed(hash_seed(self.recipe.seed, "noise", step))
        found, sampled = self.generator(), {}
        if config.calibrate:
            level = budget.sampling_level(found, self.structure, self.target(step), self.recipe.budget.of, config.noise).float()
            found = {site: logits - level for site, logits in found.items()}
        for site, logits in found.items():
            noise = draw_noise(tuple(logits.shape), config.noise, rng, logits.device)
            sampled[site] = sample(logits, noise, config.noise, config.estimator, config.temperature)
        return sampled

    def _backward_to_gates(self, parts: list[Any], masks: Masks) -> tuple[Tensor, list[dict[Site, Tensor]]]:
        """Cross-entropy on ``parts`` under ``masks``, differentiated with respect to one leaf a sample and gate alone.

        Returns:
            The mean loss, and for every micro-batch the leaves {site: [B, units]} with their gradients.
        """
        wrapped = self.wrapped()
        leaves: list[dict[Site, Tensor]] = []
        with quiet(self.model):
            value = accumulate(wrapped, parts, self.session.accelerator, self.gated_loss(masks, leaves), sync=False)
        return value, leaves

    def gated_loss(self, masks: Masks, leaves: list[dict[Site, Tensor]]) -> Callable[[Batch], Tensor]:
        """Summed cross-entropy of a batch of B samples under ``masks`` {site: [units]}; ``leaves`` gains {site: [B, units]}."""

        def loss(batch: Batch) -> Tensor:
            size = len(batch["input_ids"])
            leaves.append(self.bank.leaves({site: mask.expand(size, -1) for site, mask in masks.items()}))
            return loss_sum(self.wrapped(), batch)

        return loss

    def set_prior(self, taylor: dict[Site, Tensor], wanda: dict[Site, Tensor]) -> None:
        """Starting logits from either score {site: [units]}, or the mean of both's; an empty one is none."""
        self.scores, self.still, self._still_logits = taylor, wanda, {}
        self._use_scores()

    def taylor(self, batches: int) -> dict[Site, Tensor]:
        """Mean over ``batches`` of the squared gradients of per-sample gates at one: {site: [units]}."""
        scores: dict[Site, Any] = {}
        ones = budget.all_kept(self.structure, self.session.device)
        for step in range(batches):
            self.tokens["prior"] += self.batches.tokens(step)
            squares = self._squares(self._backward_to_gates(self.batches.at(step), ones)[1])
            scores = {site: scores.get(site, 0.0) + value / batches for site, value in squares.items()}
        self.bank.open()
        return scores

    def _refresh_prior(self, leaves: list[dict[Site, Tensor]]) -> None:
        """Follow the scores as LoRA adapts and units go: pruned units have a gradient too."""
        config = self.recipe.generator
        for site, value in self._squares(leaves).items():
            self.scores[site] = config.prior_decay * self.scores[site] + (1 - config.prior_decay) * value
        self._use_scores()

    def _squares(self, leaves: list[dict[Site, Tensor]]) -> dict[Site, Tensor]:
        """Squared per-sample gradients, summed over the samples of a step of N windows, times N.

        The loss is a mean over the step, so each of the N squares is smaller by N^2: steps of different sizes then compare.
        """
        here = sum(len(next(iter(part.values()))) for part in leaves)
        # N is here x ranks, and gradients are larger by ranks (``accumulate``): masks take their mean, squares do not
        scale = here / self.session.accelerator.num_processes
        return {site: value * scale for site, value in squares_over_ranks(*leaves).items()}

    def _use_scores(self) -> None:
        config = self.recipe.generator
        if self.still and not self._still_logits:
            # Wanda's scores do not compare between layers: ranked over the model they empty whole layers
            self._still_logits = prior_logits(self.still, self.structure, config.prior_scale, "layer")
        parts = [self._still_logits] if self.still else []
        if self.scores:
            parts.append(prior_logits(self.scores, self.structure, config.prior_scale, config.prior_ranking))
        self.generator.set_prior({site: torch.stack([part[site] for part in parts]).mean(0) for site in parts[0]})

    def target(self, step: int) -> float:
        """The ratio the budget asks for at ``step`` of the search."""
        search = self.recipe.search
        return budget.target_at(step, search.steps, search.ramp, self.recipe.budget.keep)

    @torch.no_grad()
    def masks(self, step: int) -> dict[Site, Tensor]:
        """Deterministic masks at the present target."""
        wanted = self.recipe.budget
        return budget.threshold_masks(
            of_rank_0(self.generator()), self.structure, self.target(step), wanted.of, uniform=wanted.layout == "uniform"
        )

    @torch.no_grad()
    def plan(self) -> tuple[Plan, Counts]:
        """The decision."""
        return solve(of_rank_0(self.generator()), self.structure, self.recipe.budget)

    def capture(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "generator": self.generator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scores": dict(self.scores),
            "still": dict(self.still),
            "tokens": dict(self.tokens),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a ``capture``."""
        self.generator.load_state_dict(state["generator"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scores, self.still = (
            {site: value.to(self.session.device) for site, value in state[name].items()} for name in ("scores", "still")
        )
        self.tokens.update(state["tokens"])
