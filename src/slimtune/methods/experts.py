"""Which channels make up which expert, and which tokens go where: generator, routers, their optimiser and their decision.

Shapes: L layers, F mlp channels, E experts, S slots, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.models.hooks import place_gates
from slimtune.models.sharded import share_gradients
from slimtune.prune import budget
from slimtune.prune.assign import assign, widest
from slimtune.prune.experts import ExpertGenerator, partitioned, topped, union_loss
from slimtune.prune.gates import MaskBank, Site, mean_over_ranks, of_rank_0
from slimtune.prune.router import Router
from slimtune.prune.sampling import draw_noise
from slimtune.prune.sampling import sample as draw
from slimtune.prune.shape import expert_channels, shape_of
from slimtune.prune.split import logits_of
from slimtune.structure.axes import FFN, KV_GROUP, Structure
from slimtune.structure.experts import Division, host_of
from slimtune.structure.plan import Plan
from slimtune.train.loop import hash_seed
from slimtune.train.optimizers import adamw
from slimtune.train.schedule import lr_factor, set_lr
from slimtune.train.session import Session

OFFSET = 3.0
"""Added to logits of overlapping experts without a prior, so that nearly every channel is in every one at first (published)."""
SETTLE = 0.2
"""Last part of the search, in which such experts take their best channels, as many as the Plan will give them."""


class Experts:
    """What is learned about experts.

    Args:
        session: the run.
        bank: what the gates of the model read; gets the router.
        steps: of the search; total: of the run, over which the routers learn.
    """

    def __init__(self, session: Session, bank: MaskBank, steps: int, total: int):
        self.session, self.bank, self.steps, self.total = session, bank, steps, total
        self.config, self.structure = session.recipe.moe, session.structure
        self.shape = shape_of(self.structure, session.recipe.budget, self.config)
        self.host = host_of(self.structure.family, self.shape.shares > 0)
        layers, channels = len(self.structure.layers), self.shape.channels
        torch.manual_seed(hash_seed(session.recipe.seed, "generator"))
        slots = self.shape.number if self.shape.overlap else self.shape.number + 2
        self.generator = ExpertGenerator(layers, channels, slots, self.config).to(session.device)
        self.router = Router(self.structure.hidden, layers, self.shape.number, self.shape.top_k, self.host).to(session.device)
        self.attention = all_groups(self.structure, session.device)
        self.published = self.shape.overlap and self.config.prior == "none"
        bank.router = self.router
        decoders = {id(each) for each in getattr(self.generator, "decoders", ())}
        plain = [each for each in self.generator.parameters() if id(each) not in decoders]
        decayed = [each for each in self.generator.parameters() if id(each) in decoders]
        self.optimizers = [adamw(plain, self.config.lr, 0.0)]
        if decayed:
            self.optimizers.append(adamw(decayed, self.config.lr, self.config.weight_decay))
        self.router_optimizer = adamw(self.router.parameters(), self.config.router_lr, 0.0)

    # --- masks -------------------------------------------------------------------------------------------------------

    def sample(self, step: int) -> dict[Site, Tensor]:
        """Masks of experts {site: [1 + E, F]} for ``step`` of the search, differentiable in the generator's weights."""
        self.router.train()
        self.router.noise = self.config.explore
        logits = self.generator()
        if self.config.explore:
            rng = torch.Generator().manual_seed(hash_seed(self.session.recipe.seed, "noise", step))
            logits = logits + self.config.explore * draw_noise(tuple(logits.shape), "logistic", rng, logits.device)
        return self._sites(self._masks(logits, step)) | self.attention

    @torch.no_grad()
    def masks(self, step: int) -> dict[Site, Tensor]:
        """The same without noise."""
        self.router.noise = 0.0
        return self._sites(self._masks(self.generator(), step)) | self.attention

    def _masks(self, logits: Tensor, step: int) -> Tensor:
        """0/1 [L, F, S] of logits."""
        temperature = self.temperature(step)
        if not self.shape.overlap:
            return partitioned(logits, torch.tensor(self.shape.sizes(self.part(step))), temperature)
        if self.published and step < (1 - SETTLE) * self.steps:
            return draw(logits + OFFSET, torch.zeros_like(logits), "logistic", "ste", temperature)
        return topped(logits, self.width(step), temperature)

    def _sites(self, masks: Tensor) -> dict[Site, Tensor]:
        shared = torch.zeros_like(masks[..., :1]) if self.shape.overlap else masks[..., :1]
        routed = masks if self.shape.overlap else masks[..., 1:-1]
        rows = torch.cat([shared, routed], -1).transpose(1, 2)
        return {(layer, FFN): each for layer, each in enumerate(rows)}

    def temperature(self, step: int) -> float:
        """Of the relaxed masks at ``step`` of the search; its last one where there is none."""
        first, last = self.config.temperature, self.config.final_temperature
        return float(first * (last / first) ** (step / (self.steps - 1) if 0 <= step < self.steps - 1 else 1.0))

    def target(self, step: int) -> float:
        """The part of the parameters that a token may use at ``step`` of the search."""
        recipe = self.session.recipe
        return budget.target_at(step, self.steps, recipe.search.ramp, recipe.budget.keep)

    def part(self, step: int) -> float:
        """How far it has come from all channels to the final shape, 0..1."""
        return (self.shape.channels - self._channels(step)) / max(1, self.shape.channels - self.shape.active)

    def width(self, step: int) -> int:
        """Channels of an overlapping expert."""
        return self.shape.channels - round(self.part(step) * (self.shape.channels - self.shape.width))

    def _channels(self, step: int) -> float:
        if self.target(step) <= self.session.recipe.budget.keep:
            return self.shape.active
        found = expert_channels(self.structure, self.target(step), self.session.recipe.budget.of, self.shape.groups)
        return min(max(found, self.shape.active), self.shape.channels)

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(self, step: int, sampled: dict[Site, Tensor], leaves: list[dict[Site, Tensor]]) -> dict[str, Any]:
        """Update the generator by the gradients that ``leaves`` [1 + E, F] of every micro-batch collected."""
        sampled = {site: mask for site, mask in sampled.items() if site[1] == FFN}
        gradients = mean_over_ranks(*({site: part[site] for site in sampled} for part in leaves), samples=False)
        figures: dict[str, Any] = {"target": self.target(step)}
        if self.shape.overlap:
            figures["coverage"] = torch.stack([mask.detach().amax(0).mean() for mask in sampled.values()]).mean()
        extra: list[Tensor] = []
        if self.published:
            masks = torch.stack([sampled[site][1:].T for site in sampled])
            ratio = self._sampled_ratio(masks)
            over, union = budget.budget_loss(ratio, self.target(step)), union_loss(masks)
            extra.append(self.config.budget * over + self.config.union * union)
            figures |= {"sampled": ratio.detach(), "budget": over.detach(), "union": union.detach()}
        torch.autograd.backward(
            [*sampled.values(), *extra], [*(gradients[site] for site in sampled), *map(torch.ones_like, extra)]
        )
        figures["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), self.config.clip)
        factor = lr_factor(step, self.steps, self.session.recipe.train)
        for optimizer in self.optimizers:
            set_lr(optimizer, factor)
            optimizer.step()
            optimizer.zero_grad()
        return figures

    def _sampled_ratio(self, masks: Tensor) -> Tensor:
        """Active part under masks [L, F, E], the widest expert of each layer (arXiv 2501.15316, equation of R_P)."""
        used = masks.sum(1).max(-1).values
        kept = {site: used[site[0]][None] for site in self.structure.sites() if site[1] == FFN}
        ones = budget.all_kept(self.structure, masks.device)
        return budget.kept_ratio({**ones, **kept}, self.structure, self.session.recipe.budget.of)

    def learn_router(self, step: int) -> Tensor:
        """Update the routers by the gradients that the loss left at them; ``step`` of the run."""
        parameters = list(self.router.parameters())
        if self.session.accelerator.num_processes > 1:
            share_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip)
        set_lr(self.router_optimizer, lr_factor(step, self.total, self.session.recipe.train))
        self.router_optimizer.step()
        self.router_optimizer.zero_grad()
        return norm

    # --- prior and decision ------------------------------------------------------------------------------------------

    def start(self, scores: Tensor, weights: dict[int, Tensor]) -> None:
        """Begin from the scores [L, F, 1 + E + 1] and routers of splits."""
        logits = logits_of(scores, self.config.prior_scale)
        shared = of_rank_0({(0, "prior"): logits, **{(layer, "router"): each for layer, each in weights.items()}})
        logits = shared.pop((0, "prior"))
        self.generator.set_prior(logits[..., 1:-1] if self.shape.overlap else logits)
        self.router.start({layer: each for (layer, _), each in shared.items()})

    def keep_groups(self, scores: dict[Site, Tensor]) -> None:
        """Close the gates of all KV groups but the best ones of each layer, by ``scores`` {site: [K]}."""
        for site, score in of_rank_0(scores).items():
            mask = torch.zeros_like(score)
            mask[torch.sort(score, descending=True, stable=True).indices[: self.shape.groups]] = 1.0
            self.attention[site] = mask

    @torch.no_grad()
    def plan(self) -> Plan:
        """The decision: no noise, equal widths in all layers."""
        groups = [mask.nonzero().flatten().tolist() for mask in self.attention.values()]
        logits = of_rank_0({(0, FFN): self.generator()})[0, FFN]
        if self.shape.overlap:
            layers = widest(logits, self.shape.width).cpu()
            overlapping = [Division.of([], [expert.nonzero().flatten().tolist() for expert in layer.T]) for layer in layers]
            return Plan.divided(self.structure, groups, overlapping, self.shape.top_k)
        divisions = []
        centred = logits - logits.mean(1, keepdim=True)
        found = assign(centred, torch.tensor(self.shape.sizes(1.0)), self.temperature(self.steps - 1)).cpu()
        for layer in found:
            slots = [(layer == slot).nonzero().flatten().tolist() for slot in range(self.shape.number + 1)]
            divisions.append(Division.of(slots[0], slots[1:]))
        return Plan.divided(self.structure, groups, divisions, self.shape.top_k)

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def capture(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "generator": self.generator.state_dict(),
            "router": self.router.state_dict(),
            "attention": dict(self.attention),
            "optimizers": [each.state_dict() for each in (*self.optimizers, self.router_optimizer)],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a ``capture``."""
        self.generator.load_state_dict(state["generator"])
        self.router.load_state_dict(state["router"])
        self.attention = {site: mask.to(self.session.device) for site, mask in state["attention"].items()}
        for optimizer, saved in zip((*self.optimizers, self.router_optimizer), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


@contextmanager
def routed(model: nn.Module, structure: Structure, plan: Plan, router: Router) -> Iterator[None]:
    """Inside, a plain dense ``model`` computes what its experts do."""
    bank = MaskBank()
    bank.router = router.eval()
    bank.close(masks_of(plan, next(model.parameters()).device))
    handles = place_gates(model, structure, bank.consumer, bank.base, follow=bank.follow)
    try:
        yield
    finally:
        router.forget()
        for handle in handles:
            handle.remove()


def all_groups(structure: Structure, device: torch.device) -> dict[Site, Tensor]:
    """Masks [K] of ones."""
    return {site: mask for site, mask in budget.all_kept(structure, device).items() if site[1] == KV_GROUP}


def masks_of(plan: Plan, device: torch.device) -> dict[Site, Tensor]:
    """Masks of experts {site: [1 + E, F]} of a Plan that has some."""
    found = {}
    for layer, division in enumerate(plan.experts):
        rows = torch.zeros(1 + len(division.routed), plan.full[layer][FFN])
        for row, channels in zip(rows, (division.shared, *division.routed), strict=True):
            row[list(channels)] = 1.0
        found[layer, FFN] = rows.to(device)
    return found
