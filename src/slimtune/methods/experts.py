"""Which channels make up which expert, and which tokens go where: generator, routers, their optimiser and their decision.

Shapes: L layers, F mlp channels, E experts, S slots, B batch, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.methods.heads import OFFSET, Heads
from slimtune.methods.masked import all_groups, head_masks, masks_of
from slimtune.models.sharded import share_gradients
from slimtune.prune import budget
from slimtune.prune.assign import assign, widest
from slimtune.prune.experts import ExpertGenerator, Made, partitioned, union_loss
from slimtune.prune.gates import MaskBank, Site, mean_over_ranks, of_rank_0
from slimtune.prune.router import Router
from slimtune.prune.sampling import draw_noise, topped
from slimtune.prune.sampling import sample as draw
from slimtune.prune.shape import expert_channels, shape_of
from slimtune.prune.split import logits_of
from slimtune.structure.axes import FFN
from slimtune.structure.experts import Division, host_of
from slimtune.structure.heads import PAIR, VALUE
from slimtune.structure.plan import Plan
from slimtune.train.loop import hash_seed
from slimtune.train.optimizers import adamw
from slimtune.train.schedule import lr_factor, set_lr
from slimtune.train.session import Session

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
        pairs = self.structure.head_dim // 2 if self.shape.pairs else 0
        self.generator = ExpertGenerator(layers, channels, slots, self.config, pairs).to(session.device)
        self.router = Router(self.structure.hidden, layers, self.shape.number, self.shape.top_k, self.host).to(session.device)
        self.attention = all_groups(self.structure, session.device)
        self.published = self.shape.overlap and self.config.prior == "none"
        self.router.temperature = self.config.temperature if self.published else 1.0  # arXiv 2501.15316, of routing as of masks
        bank.router = self.router
        self.heads = Heads(session, bank, self.shape) if self.shape.pairs else None
        self.values = self.heads.values if self.heads else None
        self.spare = self.heads.spare if self.heads else 0
        names = ("decoders", "pair_decoders")
        decoders = {id(each) for name in names for each in getattr(self.generator, name, ())}
        plain = [each for each in self.generator.parameters() if id(each) not in decoders]
        decayed = [each for each in self.generator.parameters() if id(each) in decoders]
        self.optimizers = [adamw(plain, self.config.lr, 0.0)]
        if decayed:
            self.optimizers.append(adamw(decayed, self.config.lr, self.config.weight_decay))
        self.router_optimizer = adamw(self._routing(), self.config.router_lr, 0.0)

    def _routing(self) -> list[nn.Parameter]:
        return [*self.router.parameters(), *(self.values.parameters() if self.values else ())]

    def see(self, inputs: dict[str, Any]) -> None:
        """Before a forward pass of ``inputs``: which positions are padding, of batches that say so."""
        mask = inputs.get("attention_mask")
        for each in (self.router, *([self.values] if self.values else ())):
            each.real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def forget(self) -> None:
        """Let go of what the last forward pass left: its graph would stay until the next one."""
        self.router.forget()
        if self.values:
            self.values.forget()

    def press(self, parts: int) -> None:
        """What routers and masks of tokens are to heed beside the loss, of a step of so many micro-batches."""
        self.router.balance = self.config.balance / parts
        if self.heads and self.published:
            self.heads.press(parts)

    # --- masks -------------------------------------------------------------------------------------------------------

    def sample(self, step: int) -> dict[Site, Tensor]:
        """Masks of experts {site: [1 + E, F]} for ``step`` of the search, differentiable in the generator's weights."""
        self.router.train()
        self.router.noise = self.config.explore
        made, explore = self.generator.made(), self.config.explore
        if explore:
            rng = torch.Generator().manual_seed(hash_seed(self.session.recipe.seed, "noise", step))
            drawn = [draw_noise(tuple(each.shape), "logistic", rng, each.device) for each in (made.channels, made.pairs)]
            made = replace(made, channels=made.channels + explore * drawn[0], pairs=made.pairs + explore * drawn[1])
        return self._sites(self._masks(made.channels, step)) | self.attention | self._inside(made, step, explore)

    @torch.no_grad()
    def masks(self, step: int) -> dict[Site, Tensor]:
        """The same without noise."""
        self.router.noise, made = 0.0, self.generator.made()
        return self._sites(self._masks(made.channels, step)) | self.attention | self._inside(made, step)

    def _inside(self, made: Made, step: int, noise: float = 0.0) -> dict[Site, Tensor]:
        """Masks inside heads, where there are some."""
        return self.heads.sites(made, self.part(step), self.temperature(step), self._free(step), noise) if self.heads else {}

    def _free(self, step: int) -> bool:
        """Whether widths are what comes of the logits, for which the budget's penalty cares."""
        return self.published and step < (1 - SETTLE) * self.steps

    def _masks(self, logits: Tensor, step: int) -> Tensor:
        """0/1 [L, F, S] of logits."""
        temperature = self.temperature(step)
        if not self.shape.overlap:
            return partitioned(logits, torch.tensor(self.shape.sizes(self.part(step))), temperature)
        if self._free(step):
            return draw(logits + OFFSET, torch.zeros_like(logits), "logistic", "ste", temperature)
        return topped(logits, self.width(step), temperature, dim=1)

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
        every = self.shape.channels + self.spare
        return (every - self._channels(step)) / max(1, every - self.shape.active)

    def width(self, step: int) -> int:
        """Channels of an overlapping expert."""
        return self.shape.channels - round(self.part(step) * (self.shape.channels - self.shape.width))

    def _channels(self, step: int) -> float:
        if self.target(step) <= self.session.recipe.budget.keep:
            return self.shape.active
        attention = (self.shape.groups, self.shape.pairs, self.shape.values)
        found = expert_channels(self.structure, self.target(step), self.session.recipe.budget.of, *attention)
        return min(max(found, self.shape.active), self.shape.channels + self.spare)

    # --- learning ----------------------------------------------------------------------------------------------------

    def learn(self, step: int, sampled: dict[Site, Tensor], leaves: list[dict[Site, Tensor]]) -> dict[str, Any]:
        """Update the generator by the gradients that ``leaves`` [1 + E, F] of every micro-batch collected."""
        sampled = {site: mask for site, mask in sampled.items() if site[1] in (FFN, PAIR, VALUE)}
        gradients = mean_over_ranks(*({site: part[site] for site in sampled} for part in leaves), samples=False)
        figures: dict[str, Any] = {"target": self.target(step)}
        if self.shape.overlap:
            covered = [mask.detach().amax(0).mean() for (_, axis), mask in sampled.items() if axis == FFN]
            figures["coverage"] = torch.stack(covered).mean()
        extra: list[Tensor] = []
        if self.published:
            masks = torch.stack([mask[1:].T for (_, axis), mask in sampled.items() if axis == FFN])
            ratio = self._sampled_ratio(masks, sampled)
            over, union = budget.budget_loss(ratio, self.target(step)), union_loss(masks)
            if self._free(step):  # where widths are given its slope is what stays the same, and would outweigh that of the loss
                extra.append(self.config.budget * over)
                figures["budget"] = over.detach()
            extra.append(self.config.union * union)
            figures |= {"sampled": ratio.detach(), "union": union.detach()}
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

    def _sampled_ratio(self, masks: Tensor, sampled: dict[Site, Tensor]) -> Tensor:
        """Active part under masks [L, F, E], the widest expert of each layer (arXiv 2501.15316, equation of R_P).

        Router and attention are counted as they will be: ``shape.active_ratio`` of the shape that is looked for.
        """
        used, of = masks.sum(1).max(-1).values, self.session.recipe.budget.of
        kept = {site: used[site[0]][None] for site in self.structure.sites() if site[1] == FFN}
        ones = budget.all_kept(self.structure, masks.device)
        whole = self.structure.total_params if of == "total" else self.structure.prunable_params
        beside: Any = len(self.structure.layers) * self.host.extra(self.structure.hidden, self.shape.number)
        beside = beside - (self.heads.lost(sampled) if self.heads else 0)
        return budget.kept_ratio({**ones, **self.attention, **kept}, self.structure, of) + beside / whole

    def learn_router(self, step: int) -> Tensor:
        """Update routers, and what makes masks of tokens, by the gradients that the loss left at them; ``step`` of the run."""
        parameters = self._routing()
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

    def start_heads(self, pairs: Tensor, values: Tensor) -> None:
        """Begin from scores of rotary pairs [L, P] and of value dimensions [L, head_dim]."""
        assert self.heads is not None
        self.generator.pair_prior.copy_(self.heads.start(pairs, values))

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
        made = self.generator.made()
        logits = of_rank_0({(0, FFN): made.channels})[0, FFN]
        heads = self.heads.decided(made) if self.heads else {}
        if self.shape.overlap:
            layers = widest(logits, self.shape.width).cpu()
            overlapping = [Division.of([], [expert.nonzero().flatten().tolist() for expert in layer.T]) for layer in layers]
            return Plan.divided(self.structure, groups, overlapping, self.shape.top_k, **heads)
        divisions = []
        centred = logits - logits.mean(1, keepdim=True)
        found = assign(centred, torch.tensor(self.shape.sizes(1.0)), self.temperature(self.steps - 1)).cpu()
        for layer in found:
            slots = [(layer == slot).nonzero().flatten().tolist() for slot in range(self.shape.number + 1)]
            divisions.append(Division.of(slots[0], slots[1:]))
        return Plan.divided(self.structure, groups, divisions, self.shape.top_k, **heads)

    def fixed(self, plan: Plan) -> dict[Site, Tensor]:
        """The masks that are in force from the decision on."""
        self.router.noise = 0.0
        if self.values:
            self.values.configure(plan.values, self.config.final_temperature)
        device = self.session.device
        return masks_of(plan, device) | head_masks(plan, self.structure, device)

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def capture(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "generator": self.generator.state_dict(),
            "router": self.router.state_dict(),
            "attention": dict(self.attention),
            **({"values": self.values.state_dict()} if self.values else {}),
            "optimizers": [each.state_dict() for each in (*self.optimizers, self.router_optimizer)],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a ``capture``."""
        self.generator.load_state_dict(state["generator"])
        self.router.load_state_dict(state["router"])
        if self.values:
            self.values.load_state_dict(state["values"])
        self.attention = {site: mask.to(self.session.device) for site, mask in state["attention"].items()}
        for optimizer, saved in zip((*self.optimizers, self.router_optimizer), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
