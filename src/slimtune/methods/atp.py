"""ATP: tune and prune in one stage (arXiv 2412.14426; leaf masks and the exact budget are ours, see docs/method.md).

search   ``decide`` turns teach the generator on decision data, ``adapt`` turns teach LoRA on training data
settle   only for ``lora_aware``: the Plan is fixed, the lasso empties the LoRA entries of pruned units
cut      the model is made physically smaller, optimiser moments are sliced along
recover  ``adapt`` turns on the small model
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from slimtune.methods.compensation import Compensation
from slimtune.methods.decide import Decider
from slimtune.methods.outcome import Outcome
from slimtune.methods.prepare import prepare
from slimtune.methods.start import cut_to_recover, gated_model
from slimtune.methods.teacher import Teacher
from slimtune.models.compiled import compile_blocks
from slimtune.models.surgery import checkpoint_fewer, lora_slices
from slimtune.prune import budget, penalties
from slimtune.prune.gates import Site
from slimtune.prune.trace import Trace
from slimtune.structure.plan import Plan, count
from slimtune.train.loop import Phase, Turn, resumed, run_phase
from slimtune.train.objective import Batch, distillation_sum, forward
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
        self.settle_steps = recipe.settle_steps
        self.recover_steps = recipe.recover.steps - self.settle_steps
        self.model, self.bank, self.handles = gated_model(session)
        self.groups = lora_slices(self.model, self.structure)
        self.tuner = Tuner(session, self.model, recipe.updates)
        self.decider = Decider(session, self.model, self.bank, lambda: self.tuner.wrapped)
        self.masks: dict[Site, Tensor] = {}
        self.trace = Trace()
        self.teacher = Teacher(session, self.model, self.bank)
        self.compensation: Compensation | None = None
        self.plan: Plan | None = None
        self.leak: float | None = None

    def run(self) -> Outcome:
        """All phases, from wherever the checkpoint left off."""
        saved = resumed(self.session)
        name, step = (saved["phase"], saved["step"]) if saved else ("search", 0)
        self.compensation = prepare(self.session, self.model, self.bank, self.decider, fresh=not saved)
        if saved:
            self._restore(saved)
        search, settle = self.recipe.search.steps, self.settle_steps
        if name == "search":
            turns = [Turn("decide", self.decider.turn, self.recipe.search.decide_every), Turn("adapt", self._search_adapt)]
            if self.recipe.search.update == "joint":
                turns = [Turn("adapt", self._joint)]
            self._phase("search", turns, search, step)
            self._freeze()
            name, step = "settle", 0
        if name == "settle":
            if settle:
                turns = [Turn("adapt", lambda step: self._adapt(search + step, 1.0, self._settle_share(step)))]
                self._phase("settle", turns, settle, step)
            self._finish_lora_aware()
            self._cut()
            step = 0
        self._phase("recover", [Turn("adapt", lambda step: self._adapt(search + settle + step))], self.recover_steps, step)
        assert self.plan is not None
        tokens = {**self.decider.tokens, "adapt": self.tuner.tokens}
        return Outcome(self.model.eval(), self.plan, tokens, {"leak": self.leak})

    # --- adapt turns -------------------------------------------------------------------------------------------------

    def _search_adapt(self, step: int) -> dict[str, Any]:
        if step % self.recipe.search.decide_every == 0:  # each move of the masks has its price: see Compensation
            self.masks = self.decider.masks(step)
        return self._adapt(step, (step + 1) / max(1, self.recipe.search.steps))

    def _joint(self, step: int) -> dict[str, Any]:
        """One backward pass for both: LoRA and generator under the same sampled gates, on training data."""
        sampled, leaves = self.decider.sample(step), list[dict[Site, Tensor]]()
        figures = self.tuner.update(step, self.decider.gated_loss(sampled, leaves))
        learned = self.decider.learn(step, sampled, leaves)
        self.masks = self.decider.masks(step)
        return figures | {f"generator_{name}": value for name, value in learned.items()}

    def _adapt(self, step: int, lasso: float = 0.0, share: float = 0.0) -> dict[str, Any]:
        """LoRA step.

        Args:
            step: counted over all phases.
            lasso: how far the lasso's ramp has come, 0..1 (``lora_aware``, before the cut).
            share: the part of the largest pruned group that a proximal step takes at least.
        """
        lora = self.recipe.lora
        shrinking = self.aware and bool(self.masks)
        penalty = None
        if shrinking and lora.lasso == "loss":
            penalty = self._lasso_penalty(lora.lasso_weight * lasso)
        figures = self.tuner.update(step, self._student_loss(), penalty)
        if shrinking and lora.lasso == "proximal":
            figures["lasso_left"] = penalties.proximal(self.groups, self.masks, 0.1 * lora.lasso_weight * lasso, share)
        return figures

    def _settle_share(self, step: int) -> float:
        """Linear to zero over two thirds of the settling; then the lasso must hold it alone, or the leak shows it."""
        left = self.settle_steps - self.settle_steps // 3 - 1 - step
        return 1 / left if left > 0 else 0.0

    def _lasso_penalty(self, weight: float) -> Callable[[], Tensor]:
        return lambda: weight * penalties.lasso_loss(self.groups, self.masks)

    def _student_loss(self) -> Callable[[Batch], Tensor]:
        """Cross-entropy, with the divergence from the model with open gates where distillation is on."""
        distill = self.recipe.distill
        self._close_gates()
        if not distill.weight or (self.teacher.model is None and not self.masks):
            return self.tuner.loss

        def loss(batch: Batch) -> Tensor:
            theirs = self.teacher.logits(batch)
            self._close_gates()
            ours = forward(self.tuner.wrapped, batch)
            divergence = distillation_sum(ours, theirs, batch["labels"], distill.temperature)
            return self.tuner.cross_entropy(ours, batch["labels"]) + distill.weight * divergence

        return loss

    def _close_gates(self) -> None:
        if self.masks:
            self.bank.close(self.masks, "base" if self.aware else "consumer")
        else:
            self.bank.open()

    # --- decision and cut --------------------------------------------------------------------------------------------

    def _freeze(self) -> None:
        self.plan, counts = self.decider.plan()
        self.masks = budget.masks_of(self.plan, self.session.device)
        total, block = counts.total_ratio, counts.block_ratio
        self.session.progress.say(f"decided: {total:.2%} of all parameters stay, {block:.2%} of the blocks")

    def _finish_lora_aware(self) -> None:
        if self.aware:
            self.leak = self._measure_leak()
            if self.leak > LEAK_LIMIT:
                self.session.progress.say(
                    f"[yellow]leak {self.leak:.1e} is above {LEAK_LIMIT:.0e}: the cut changes the function; raise "
                    "lora.lasso_weight or lora.settle, or use lora.semantics=hard[/yellow]"
                )

    @torch.no_grad()
    def _measure_leak(self) -> float:
        """Relative difference of the LoRA-aware and the pruned forward, before pruned LoRA entries go."""
        batch = self.decider.batches.at(0)[0]
        self.model.eval()
        with self.session.accelerator.autocast() if self.session.autocast_only else nullcontext():
            self.bank.close(self.masks, "base")
            aware = forward(self.model, batch).float()
            self.bank.close(self.masks, "consumer")
            pruned = forward(self.model, batch).float()
        return float((aware - pruned).norm() / pruned.norm())

    def _cut(self) -> None:
        assert self.plan is not None
        if self.recipe.distill.recover and self.teacher.model is None:
            self.teacher.stay()
        for handle in self.handles:
            handle.remove()
        if self.compensation:  # the weights stay as they are
            self.bank.close(budget.masks_of(self.plan, self.session.device))
            self.compensation.settled()
            self.bank.follower = None
        self.bank.open()
        self.masks = {}
        self.model, replaced = cut_to_recover(self.session, self.model, self.plan)
        self.tuner.carry_over(self.model, replaced)
        if self.compensation and self.teacher.model is not None:  # it may hold the uncut ones
            self.compensation.opened()
        self.compensation = None
        checkpoint_fewer(self.model, self.structure, self.recipe.recover.checkpointed)
        if self.recipe.train.compile is True:
            compile_blocks(self.model, self.structure)
        if self.recipe.recover.lr:
            self.tuner.set_peak(self.recipe.recover.lr)

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def _phase(self, name: str, turns: list[Turn], steps: int, first: int) -> None:
        search = self.recipe.search.steps
        before = {"search": 0, "settle": search, "recover": search + self.settle_steps}[name]
        parts = (turns, self._capture, self._kept, self._figures)
        run_phase(self.session, Phase(name, steps, *parts, lambda: self.trace.row(self.masks), before), first)

    def _kept(self) -> float:
        of = self.recipe.budget.of
        if self.masks or self.plan is None:
            return float(budget.kept_ratio(self.masks, self.structure, of)) if self.masks else 1.0
        counts = count(self.structure, self.plan)
        return counts.total_ratio if of == "total" else counts.block_ratio

    def _figures(self) -> Figures:
        if self.masks:
            self.bank.close(self.masks, "consumer")
        return self.session.valid_figures(self.model)

    def _capture(self) -> dict[str, Any]:
        return {
            "tuner": self.tuner.capture(),
            "decider": self.decider.capture(),
            "plan": self.plan.to_json() if self.plan else None,
            "leak": self.leak,
            "teacher": self.teacher.capture(),
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        self.decider.restore(saved["decider"])
        self.leak = saved["leak"]
        self.teacher.restore(saved["teacher"])
        if saved["plan"]:
            self.plan = Plan.from_json(saved["plan"])
            self.plan.check(self.structure)
            self.masks = budget.masks_of(self.plan, self.session.device)
        elif saved["step"]:
            last = saved["step"] - 1
            self.masks = self.decider.masks(last - last % self.recipe.search.decide_every)
        self.trace.follow(self.masks)
        if self.compensation and self.masks:
            self._close_gates()  # a decide turn is made under the weights of the turn before
        if saved["phase"] == "recover":
            self._cut()
        self.tuner.restore(saved["tuner"])
