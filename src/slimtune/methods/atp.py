"""ATP: tune and prune in one stage (arXiv 2412.14426; leaf masks and the exact budget are ours, see docs/method.md).

search   ``decide`` turns teach the generator on decision data, ``adapt`` turns teach LoRA on training data
settle   only for ``lora_aware``: the Plan is fixed, the lasso empties the LoRA entries of pruned units
cut      the model is made physically smaller, optimiser moments are sliced along
recover  ``adapt`` turns on the small model
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.methods.outcome import Outcome
from slimtune.models.load import attach_lora, enable_checkpointing, load_model
from slimtune.models.surgery import cut, lora_slices, place_gates, quiet
from slimtune.prune import budget, penalties
from slimtune.prune.gates import MaskBank, Site, mean_over_ranks
from slimtune.prune.generator import Generator
from slimtune.prune.prior import prior_logits
from slimtune.prune.sampling import draw_noise, sample
from slimtune.runtime import pick_dtype
from slimtune.structure.plan import Plan
from slimtune.train import checkpoint
from slimtune.train.loop import Phase, Turn, checkpoint_path, hash_seed, run_phase
from slimtune.train.objective import Batch, accumulate, cross_entropy_sum, distillation_sum, forward
from slimtune.train.optimizers import adamw
from slimtune.train.schedule import generator_factor, set_lr
from slimtune.train.session import Figures, Session
from slimtune.train.tuner import Tuner

LEAK_LIMIT = 1e-5
"""Largest relative logit difference between the LoRA-aware forward and the pruned one before the cut."""


def run(session: Session) -> Outcome:
    """Search, (settle,) cut, recover."""
    return _Atp(session).run()


class _Atp:
    def __init__(self, session: Session):
        self.session, self.recipe, self.structure = session, session.recipe, session.structure
        recipe = self.recipe
        self.aware = recipe.lora.semantics == "lora_aware"
        settle = round(recipe.lora.settle * recipe.search.steps) if self.aware else 0
        self.settle_steps = min(settle, recipe.recover.steps)
        self.recover_steps = recipe.recover.steps - self.settle_steps
        base = load_model(recipe.model, str(session.device), pick_dtype(recipe.model.dtype, str(session.device)))
        torch.manual_seed(hash_seed(recipe.seed, "lora"))
        self.model = attach_lora(base, self.structure, recipe.lora)
        enable_checkpointing(self.model, recipe.model.checkpointing)
        self.bank = MaskBank()
        self.handles = place_gates(self.model, self.structure, self.bank.consumer, self.bank.base)
        self.groups = lora_slices(self.model, self.structure)
        torch.manual_seed(hash_seed(recipe.seed, "generator"))
        uniform = recipe.budget.layout == "uniform"
        self.generator = Generator(self.structure, recipe.generator, uniform).to(session.device)
        self.decider = adamw(self.generator.parameters(), recipe.generator.lr, recipe.generator.weight_decay)
        self.tuner = Tuner(session, self.model, recipe.search.steps + recipe.recover.steps)
        self.decision = session.batches(session.splits.decision, "decision")
        self.tokens = {"prior": 0, "decide": 0}
        self.masks: dict[Site, Tensor] = {}
        self.teacher: nn.Module | None = None
        self.plan: Plan | None = None
        self.notes: dict[str, Any] = {}

    def run(self) -> Outcome:
        saved = checkpoint.load(checkpoint_path(self.session), self.session.device) if self.session.resume else None
        name, step = (saved["phase"], saved["step"]) if saved else ("search", 0)
        if saved:
            self._restore(saved)
        elif self.recipe.generator.prior == "taylor":
            self._set_prior()
        if name == "search":
            run_phase(self.session, self._phase("search", self._search_turns(), self.recipe.search.steps), step)
            self._freeze()
            name, step = "settle", 0
        if name == "settle":
            if self.settle_steps:
                first = self.recipe.search.steps
                turns = [Turn("adapt", lambda step: self._adapt(first + step, (step + 1) / self.settle_steps))]
                run_phase(self.session, self._phase("settle", turns, self.settle_steps), step)
            self._cut()
            step = 0
        first = self.recipe.search.steps + self.settle_steps
        turns = [Turn("adapt", lambda step: self._adapt(first + step))]
        run_phase(self.session, self._phase("recover", turns, self.recover_steps), step)
        assert self.plan is not None
        return Outcome(self.model.eval(), self.plan, {**self.tokens, "adapt": self.tuner.tokens}, self.notes)

    # --- turns -------------------------------------------------------------------------------------------------------

    def _search_turns(self) -> list[Turn]:
        return [Turn("decide", self._decide, self.recipe.search.decide_every), Turn("adapt", self._search_adapt)]

    def _decide(self, step: int) -> dict[str, Any]:
        """Generator step: full mask on base + LoRA, LoRA frozen, decision data (specification 1.7, 5.4)."""
        search, generator = self.recipe.search, self.recipe.generator
        set_lr(self.decider, generator_factor(step, search.steps))
        rng = torch.Generator().manual_seed(hash_seed(self.recipe.seed, "noise", step))
        sampled = {}
        for site, logits in self.generator().items():
            noise = draw_noise(tuple(logits.shape), generator.noise, rng, logits.device)
            sampled[site] = sample(logits, noise, generator.noise, generator.estimator, generator.temperature)
        leaves = self.bank.leaves(sampled)
        loss, tokens = self._backward_to_gates(self.decision.at(step // search.decide_every))
        self.tokens["decide"] += tokens
        gradients = mean_over_ranks(leaves)
        ratio = budget.kept_ratio(sampled, self.structure, self.recipe.budget.of)
        over = budget.budget_loss(ratio, self._target(step))
        torch.autograd.backward(
            [*sampled.values(), search.alpha * over], [*(gradients[site] for site in sampled), torch.ones_like(over)]
        )
        norm = torch.nn.utils.clip_grad_norm_(self.generator.parameters(), generator.clip)
        self.decider.step()
        self.decider.zero_grad()
        return {
            "loss": loss,
            "sampled": ratio.detach(),
            "target": self._target(step),
            "budget": over.detach(),
            "grad_norm": norm,
        }

    def _backward_to_gates(self, parts: list[Any]) -> tuple[Tensor, int]:
        """Cross-entropy on ``parts``, differentiated with respect to the bank's leaves alone."""
        session, wrapped = self.session, self.tuner.wrapped
        wrapped.train()
        with quiet(self.model):
            loss = accumulate(wrapped, parts, session.accelerator, self._cross_entropy, sync=False)
        return loss, sum(part["input_ids"].numel() for part in parts) * session.accelerator.num_processes

    def _search_adapt(self, step: int) -> dict[str, Any]:
        with torch.no_grad():
            logits = self.generator()
        self.masks = budget.threshold_masks(logits, self.structure, self._target(step), self.recipe.budget.of)
        return self._adapt(step, (step + 1) / max(1, self.recipe.search.steps))

    def _adapt(self, step: int, lasso: float = 0.0) -> dict[str, Any]:
        """LoRA step; ``lasso`` in 0..1 is how far the lasso's ramp has come (LoRA-aware semantics, before the cut)."""
        lora = self.recipe.lora
        penalty = None
        if self.aware and self.masks and lora.lasso == "loss":
            penalty = self._lasso_penalty(lora.lasso_weight * lasso)
        figures = self.tuner.update(step, self._student_loss(), penalty)
        if self.aware and self.masks and lora.lasso == "proximal":
            figures["lasso_left"] = penalties.proximal(self.groups, self.masks, 0.1 * lora.lasso_weight * lasso)
        return figures

    def _lasso_penalty(self, weight: float) -> Callable[[], Tensor]:
        return lambda: weight * penalties.lasso_loss(self.groups, self.masks)

    def _student_loss(self) -> Callable[[Batch], Tensor]:
        distill = self.recipe.distill
        close = self._close_gates
        close()
        if not distill.weight or (self.teacher is None and not self.masks):
            return self._cross_entropy

        def loss(batch: Batch) -> Tensor:
            with torch.no_grad():
                self.bank.open()
                theirs = forward(self.teacher or self.model, batch)
            close()
            ours = forward(self.tuner.wrapped, batch)
            divergence = distillation_sum(ours, theirs, batch["labels"], distill.temperature)
            return cross_entropy_sum(ours, batch["labels"]) + distill.weight * divergence

        return loss

    def _close_gates(self) -> None:
        if self.masks:
            self.bank.close(self.masks, "base" if self.aware else "consumer")
        else:
            self.bank.open()

    def _cross_entropy(self, batch: Batch) -> Tensor:
        return cross_entropy_sum(forward(self.tuner.wrapped, batch), batch["labels"])

    # --- the decision ------------------------------------------------------------------------------------------------

    def _target(self, step: int) -> float:
        search = self.recipe.search
        return budget.target_at(step, search.steps, search.ramp, self.recipe.budget.keep)

    def _set_prior(self) -> None:
        """Squared gradients of per-sample gates at one, on decision data."""
        config = self.recipe.generator
        self.session.progress.say(f"prior: Taylor scores from {config.prior_steps} decision batches")
        scores: dict[Site, Tensor] = {}
        for step in range(config.prior_steps):
            for part in self.decision.at(step):
                size = len(part["input_ids"])
                ones = {
                    (layer, axis): torch.ones(size, self.structure.layers[layer].units[axis], device=self.session.device)
                    for layer, axis in self.structure.sites()
                }
                leaves = self.bank.leaves(ones)
                self.tokens["prior"] += self._backward_to_gates([part])[1]
                for site, leaf in leaves.items():
                    assert leaf.grad is not None
                    scores[site] = scores.get(site, torch.zeros((), device=leaf.device)) + leaf.grad.square().sum(0)
        scores = {site: self.session.accelerator.reduce(value) for site, value in scores.items()}
        self.bank.open()
        self.generator.set_prior(prior_logits(scores, self.structure, config.prior_scale))

    @torch.no_grad()
    def _freeze(self) -> None:
        self.plan, counts = budget.solve(self.generator(), self.structure, self.recipe.budget)
        self.masks = budget.masks_of(self.plan, self.session.device)
        self.session.progress.say(
            f"decided: {counts.total_ratio:.2%} of all parameters, {counts.block_ratio:.2%} of the blocks"
        )

    def _cut(self) -> None:
        if self.aware:
            self._check_leak()
            penalties.zero_pruned(self.groups, self.masks)
        self._make_small()

    def _make_small(self) -> None:
        assert self.plan is not None
        if self.recipe.distill.recover and self.recipe.distill.weight:
            self.bank.open()
            self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)
        for handle in self.handles:
            handle.remove()
        self.bank.open()
        self.masks = {}
        self.tuner.carry_over(cut(self.model, self.structure, self.plan))
        if self.recipe.recover.lr:
            self.tuner.set_peak(self.recipe.recover.lr)

    @torch.no_grad()
    def _check_leak(self) -> None:
        """Relative difference of the LoRA-aware forward and the pruned forward, before pruned LoRA entries are zeroed."""
        batch = self.decision.at(0)[0]
        self.model.eval()
        self._close_gates()
        aware = forward(self.model, batch).float()
        self.bank.close(self.masks, "consumer")
        pruned = forward(self.model, batch).float()
        leak = float((aware - pruned).norm() / pruned.norm())
        self.notes["leak"] = leak
        if leak > LEAK_LIMIT:
            self.session.progress.say(
                f"[yellow]leak {leak:.1e} is above {LEAK_LIMIT:.0e}: the cut changes the function; raise lora.lasso_weight "
                "or lora.settle, or use lora.semantics=hard[/yellow]"
            )
        else:
            self.session.progress.say(f"leak before the cut: {leak:.1e}")

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def _phase(self, name: str, turns: list[Turn], steps: int) -> Phase:
        return Phase(name, steps, turns, self._capture, self._kept, self._figures)

    def _kept(self) -> float:
        if self.masks:
            return float(budget.kept_ratio(self.masks, self.structure, self.recipe.budget.of))
        return float(self.recipe.budget.keep) if self.plan is None else self.notes.setdefault("kept", self._plan_ratio())

    def _plan_ratio(self) -> float:
        assert self.plan is not None
        counts = budget.count(self.structure, self.plan)
        return counts.total_ratio if self.recipe.budget.of == "total" else counts.block_ratio

    def _figures(self) -> Figures:
        if self.masks:
            self.bank.close(self.masks, "consumer")
        return self.session.valid_figures(self.model)

    def _capture(self) -> dict[str, Any]:
        return {
            "tuner": self.tuner.capture(),
            "generator": self.generator.state_dict(),
            "decider": self.decider.state_dict(),
            "plan": self.plan.to_json() if self.plan else None,
            "tokens": dict(self.tokens),
            "notes": dict(self.notes),
            "teacher": _lora_state(self.teacher) if self.teacher is not None else None,
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        self.generator.load_state_dict(saved["generator"])
        self.decider.load_state_dict(saved["decider"])
        self.tokens.update(saved["tokens"])
        self.notes.update(saved["notes"])
        if saved["plan"]:
            self.plan = Plan.from_json(saved["plan"])
            self.plan.check(self.structure)
            self.masks = budget.masks_of(self.plan, self.session.device)
        if saved["phase"] == "recover":
            self._make_small()
            if self.teacher is not None:
                _load_lora(self.teacher, saved["teacher"])
        self.tuner.restore(saved["tuner"])


def _lora_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def _load_lora(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(state[name])
