"""ToMoE: a dense model becomes a mixture of experts (arXiv 2501.15316; partition, routing and prior are ours: docs/experts.md).

search   ``adapt`` turns teach generator, routers and, with ``moe.tune``, LoRA; or ``decide`` turns those without LoRA
recover  the experts are fixed; ``adapt`` turns teach LoRA and routers

Nothing is cut on the way: the gates let a token see its experts' channels alone, which is what the written model computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimtune.methods.experts import Experts
from slimtune.methods.outcome import Outcome
from slimtune.methods.refit import Fits, put_refit, taken_refit
from slimtune.methods.routes import alike, prior_of, shares_of, starved
from slimtune.methods.start import gated_model
from slimtune.methods.teacher import Teacher
from slimtune.models.modes import quiet
from slimtune.models.sharded import cut_model
from slimtune.prune.gates import Site
from slimtune.structure.plan import Plan, count
from slimtune.train.loop import Phase, Turn, resumed, run_phase
from slimtune.train.objective import Batch, accumulate, distillation_sum, forward, loss_sum
from slimtune.train.session import Figures, Session
from slimtune.train.tuner import Tuner


def run(session: Session) -> Outcome:
    """Search, freeze, recover."""
    return _ToMoE(session).run()


class _ToMoE:
    def __init__(self, session: Session):
        self.session, self.recipe, self.structure = session, session.recipe, session.structure
        recipe = self.recipe
        self.search, self.recover = recipe.search.steps, recipe.recover.steps
        self.model, self.bank, self.handles = gated_model(session)
        # LoRA's schedule runs over the steps in which it learns
        self.before = 0 if recipe.moe.tune else self.search
        self.tuner = Tuner(session, self.model, self.search + self.recover - self.before)
        self.experts = Experts(session, self.bank, self.search, self.search + self.recover)
        see = self.experts.see  # in a function of its own: of a bound method a copy of the model, a teacher, would copy all
        self.handles.append(self.model.register_forward_pre_hook(lambda _, args, inputs: see(inputs), with_kwargs=True))
        windows = session.splits.train if recipe.search.decide_on == "train" else session.splits.decision
        self.decision = session.batches(windows, "decision", recipe.search.batch or recipe.train.batch)
        self.fits = Fits(session, self.model, self.bank) if recipe.moe.refit else None
        self.teacher = Teacher(session, self.model, self.bank, untuned=True)
        self.masks: dict[Site, Tensor] = {}
        self.plan: Plan | None = None
        self.tokens = {"prior": 0, "decide": 0}
        self.used: float | Tensor = 1.0

    def run(self) -> Outcome:
        """All phases, from wherever the checkpoint left off."""
        saved = resumed(self.session)
        name, step = (saved["phase"], saved["step"]) if saved else ("search", 0)
        if saved:
            self._restore(saved)
        else:
            self.tokens["prior"] += prior_of(self.session, self.model, self.bank, self.decision, self.experts)
        if name == "search":
            turn = Turn("adapt", self._adapt_both) if self.recipe.moe.tune else Turn("decide", self._decide)
            self._phase("search", [turn], self.search, step)
            self._freeze()
            step = 0
        self._phase("recover", [Turn("adapt", self._recover)], self.recover, step)
        assert self.plan is not None
        shares = shares_of(self.session, self.model, self.bank, self.experts, self.masks)
        for told in filter(None, (starved(shares, self.plan.top_k), alike(self.plan))):
            self.session.progress.say(f"[yellow]{told}[/yellow]")
        tokens = {**self.tokens, "adapt": self.tuner.tokens}
        for handle in self.handles:
            handle.remove()
        notes = {**({"shares": shares} if shares else {}), "coverage": self.plan.coverage}
        return Outcome(self.model.eval(), self.plan, tokens, notes, self.experts.router, self.experts.values)

    # --- turns -------------------------------------------------------------------------------------------------------

    def _adapt_both(self, step: int) -> dict[str, Any]:
        """One backward pass for generator, routers and LoRA, on training data."""
        self._refit_on_the_way(step)
        self.experts.press(self.tuner.batches.parts)
        sampled, leaves = self.experts.sample(step), list[dict[Site, Tensor]]()
        figures = self.tuner.update(step, self._loss(leaves, sampled))
        return figures | self._learned(step, sampled, leaves)

    def _decide(self, step: int) -> dict[str, Any]:
        """The same without LoRA: the base stays as it is."""
        self._refit_on_the_way(step)
        self.experts.press(self.decision.parts)
        sampled, leaves = self.experts.sample(step), list[dict[Site, Tensor]]()
        with quiet(self.model):
            loss = self._loss(leaves, sampled)
            value = accumulate(self.tuner.wrapped, self.decision.at(step), self.session.accelerator, loss, sync=False)
        self.tokens["decide"] += self.decision.tokens(step)
        return {"loss": value, **self._learned(step, sampled, leaves)}

    def _learned(self, step: int, sampled: dict[Site, Tensor], leaves: list[dict[Site, Tensor]]) -> dict[str, Any]:
        self.experts.forget()
        learned = self.experts.learn(step, sampled, leaves)
        self.used = learned.get("sampled", learned["target"])  # while widths are free, the target is not what a token uses
        learned["router_grad_norm"] = self.experts.learn_router(step)
        self.masks = self.experts.masks(step)
        return {f"generator_{name}": value for name, value in learned.items()}

    def _recover(self, step: int) -> dict[str, Any]:
        self.experts.router.train()
        self.experts.press(self.tuner.batches.parts)
        figures = self.tuner.update(self.search - self.before + step, self._loss([], None))
        self.experts.forget()
        return figures | {"router_grad_norm": self.experts.learn_router(self.search + step)}

    def _loss(self, leaves: list[dict[Site, Tensor]], sampled: dict[Site, Tensor] | None) -> Callable[[Batch], Tensor]:
        """Summed loss of a batch; ``leaves`` gains what collects the gradients of ``sampled`` masks, where there are some."""
        kd, ce = self.recipe.moe.factors if sampled is not None else (self.recipe.distill.weight, 1.0)

        def close() -> None:
            if sampled is None:
                self.bank.close(self.masks)
            else:
                leaves.append(self.bank.leaves(sampled))

        def loss(batch: Batch) -> Tensor:
            if not kd:
                close()
                return ce * loss_sum(self.tuner.wrapped, batch, self.tuner.cross_entropy, self.tuner.most)
            theirs = self.teacher.logits(batch)
            close()
            ours = forward(self.tuner.wrapped, batch)
            found = kd * distillation_sum(ours, theirs, batch["labels"], self.recipe.distill.temperature)
            return found + ce * self.tuner.cross_entropy(ours, batch["labels"]) if ce else found

        return loss

    # --- decision ----------------------------------------------------------------------------------------------------

    def _freeze(self) -> None:
        self.plan = self.experts.plan()
        self._fixed()
        self._keep_teacher()
        if self.fits:
            self.session.progress.say("o_proj and down_proj are fitted to what they added before")
            for _ in range(self.recipe.moe.refit_rounds):
                self._refit({**self.masks, **self.experts.attention})
            self.fits.settled()
        self._cut()
        stored, active = count(self.structure, self.plan), count(self.structure, self.plan, active=True)
        shape = self.experts.shape
        self.session.progress.say(
            f"decided: {shape.number} experts of {shape.width} channels, {shape.top_k} a token, "
            f"{shape.shares * shape.width} channels shared; {self._attention()}"
            f"a token uses {active.total_ratio:.2%} of all parameters, "
            f"{active.block_ratio:.2%} of the blocks, and {stored.total_ratio:.2%} are stored"
        )

    def _attention(self) -> str:
        shape, size = self.experts.shape, self.structure.head_dim
        pairs = f"{shape.pairs} of {size // 2} rotary pairs of q and k, " if shape.pairs else ""
        return pairs + (f"{shape.values} of {size} value dimensions a token; " if shape.values else "")

    def _refit_on_the_way(self, step: int) -> None:
        """Every so many steps, so that masks are judged, and routers and LoRA learn, beside consumers that fit the experts."""
        every = self.recipe.moe.refit_every
        if self.fits and every and step % every == 0:
            self._refit(self.experts.masks(step))

    def _refit(self, masks: dict[Site, Tensor]) -> None:
        assert self.fits is not None
        config = self.recipe.moe
        self.experts.router.eval()
        self.tokens["prior"] += self.fits.renew(masks, self.decision, config.prior_steps, config.damping)

    def _keep_teacher(self) -> None:
        """Where the base teaches the recovery: what is fitted and cut next is no base any more, whatever its gates."""
        if self.recipe.distill.weight and self.recover and self.teacher.model is None:
            self.bank.open()
            self.teacher.stay()

    def _cut(self) -> None:
        """Attention becomes smaller for good; what a token does not see of the MLP stays, for others do."""
        assert self.plan is not None
        self.bank.open()
        self.model, replaced = cut_model(self.model, self.structure, self.plan.for_good)
        self.tuner.carry_over(self.model, replaced)

    def _fixed(self) -> None:
        assert self.plan is not None
        self.masks = self.experts.fixed(self.plan)

    # --- bookkeeping -------------------------------------------------------------------------------------------------

    def _phase(self, name: str, turns: list[Turn], steps: int, first: int) -> None:
        before = 0 if name == "search" else self.search
        parts = (turns, self._capture, self._kept, self._figures)
        run_phase(self.session, Phase(name, steps, *parts, before=before), first)

    def _kept(self) -> float:
        if self.plan is None:
            return float(self.used)
        counts = count(self.structure, self.plan, active=True)
        return counts.total_ratio if self.recipe.budget.of == "total" else counts.block_ratio

    def _figures(self) -> Figures:
        self.bank.close(self.masks)
        self.experts.router.eval()
        with torch.no_grad():
            return self.session.valid_figures(self.model)

    def _capture(self) -> dict[str, Any]:
        return {
            "tuner": self.tuner.capture(),
            "experts": self.experts.capture(),
            "plan": self.plan.to_json() if self.plan else None,
            "tokens": dict(self.tokens),
            "refit": self._fitted(),
        }

    def _fitted(self) -> dict[Any, Tensor] | None:
        if not self.fits:
            return None
        return taken_refit(self.model, self.structure) if self.plan else self.fits.capture()

    def _restore(self, saved: dict[str, Any]) -> None:
        self.experts.restore(saved["experts"])
        self.tokens.update(saved["tokens"])
        if saved["plan"]:
            self.plan = Plan.from_json(saved["plan"])
            self.plan.check(self.structure)
            self._fixed()
            self._keep_teacher()
            if self.fits:
                self.fits.settled()
            self._cut()
            if self.fits:
                put_refit(self.model, self.structure, saved["refit"])
        elif saved["step"]:
            self.masks = self.experts.masks(saved["step"] - 1)
            if self.fits:
                self.fits.restore(saved["refit"])
        self.tuner.restore(saved["tuner"])
