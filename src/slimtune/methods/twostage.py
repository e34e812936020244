"""The rivals: prune, then tune. A criterion decides once on the untuned base, the model is cut, LoRA tunes what is left.

decide   scores from weights or from passes over decision data; ``generator``: ``decide`` turns on the frozen base
cut      the model is made physically smaller
recover  ``adapt`` turns on the small model, as many as read all the windows of ``atp`` with the same recipe

Structure table, gates, budget solver, rounding, LoRA, data order and loop are those of ``atp``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.methods.compensation import Compensation, Fit, compensation_of
from slimtune.methods.decide import Decider
from slimtune.methods.outcome import Outcome
from slimtune.methods.passes import Passes
from slimtune.methods.prepare import prepare
from slimtune.methods.scores import CRITERIA, Scorer, ranked
from slimtune.methods.start import cut_to_recover, gated_model
from slimtune.models.compiled import compile_blocks
from slimtune.models.surgery import checkpoint_fewer, compensate
from slimtune.prune import budget
from slimtune.prune.depth import drop_layers
from slimtune.prune.gates import Site
from slimtune.prune.solve import solve
from slimtune.prune.trace import Trace
from slimtune.structure.plan import Counts, Plan, count
from slimtune.train.loop import Phase, Turn, resumed, run_phase
from slimtune.train.session import Session
from slimtune.train.tuner import Tuner


def run(session: Session) -> Outcome:
    """Decide, cut, recover."""
    return _TwoStage(session).run()


class _TwoStage:
    def __init__(self, session: Session):
        self.session, self.recipe, self.structure = session, session.recipe, session.structure
        recipe = self.recipe
        self.model, self.bank, self.handles = gated_model(session)
        self.tuner = Tuner(session, self.model, recipe.tuning_steps)
        self.decider = Decider(session, self.model, self.bank, lambda: self.tuner.wrapped)
        self.plan: Plan | None = None
        self.masks: dict[Site, Tensor] = {}
        self.trace = Trace()
        self.means: dict[tuple[int, str], Tensor] = {}
        self.scored = 0

    def run(self) -> Outcome:
        """All phases, from wherever the checkpoint left off."""
        saved = resumed(self.session)
        first = 0
        if self.recipe.twostage.scores == "generator":
            prepare(self.session, self.model, self.bank, self.decider, fresh=not saved)
        if saved:
            self._restore(saved)
            first = saved["step"]
        if self.plan is None:
            self._decide(first)
            self._cut()
            first = 0
        steps = self.recipe.tuning_steps
        run_phase(self.session, self._phase("recover", steps, [Turn("adapt", self._adapt)]), first)
        assert self.plan is not None
        tokens = {**self.decider.tokens, "score": self.scored, "adapt": self.tuner.tokens}
        return Outcome(self.model.eval(), self.plan, tokens)

    def _adapt(self, step: int) -> dict[str, Any]:
        return self.tuner.update(step, self.tuner.loss)

    def _decide(self, first: int) -> None:
        kind = self.recipe.twostage.scores
        self.session.progress.say(f"prune, then tune: {kind} decides on the untuned model")
        if kind == "generator":
            self.plan, counts = self._generated(first)
        else:
            self.plan, counts = self._scored(kind)
        self.session.progress.say(
            f"decided: {counts.total_ratio:.2%} of all parameters stay, {counts.block_ratio:.2%} of the blocks"
        )

    def _generated(self, first: int) -> tuple[Plan, Counts]:
        """DISP-LLM's order (Gao et al. 2024): the generator learns on the frozen base, LoRA comes after."""
        every = self.recipe.search.decide_every
        if first:
            self._follow((first - 1) // every * every)
            self.trace.follow(self.masks)
        turns = [Turn("decide", self._turn, every)]
        run_phase(self.session, self._phase("decide", self.recipe.search.steps, turns), first)
        self.masks = {}
        return self.decider.plan()

    def _turn(self, step: int) -> dict[str, Any]:
        figures = self.decider.turn(step)
        self._follow(step)
        return figures

    def _follow(self, step: int) -> None:
        """The masks of ``step``: of figures on the way, and where weights compensate, what the next turn is made under."""
        self.masks = self.decider.masks(step)
        self.bank.close(self.masks)

    def _scored(self, kind: str) -> tuple[Plan, Counts]:
        scorer, wanted = Scorer(self.session, self.model, self.decider), self.recipe.budget
        if kind == "layer_drop":
            found = drop_layers(scorer.influence(), scorer.magnitude(), self.structure, wanted)
        else:
            found = solve(ranked(CRITERIA[kind](scorer), self.session), self.structure, wanted)
        self.scored = scorer.tokens
        self.means = {site: mean.cpu() for site, mean in scorer.means.items()} if self.recipe.twostage.compensate else {}
        return found

    def _cut(self, fresh: bool = True) -> None:
        assert self.plan is not None
        masks = budget.masks_of(self.plan, self.session.device)
        if self.recipe.twostage.least_squares:
            tokens = self._refit(masks)
            self.scored += tokens if fresh else 0
        elif self.bank.follower:  # the weights that the decision was made under
            self.bank.close(masks)
            self.bank.follower.settled()
        self.bank.follower = None
        for handle in self.handles:
            handle.remove()
        self.bank.open()
        if self.means:
            compensate(self.model, self.structure, self.plan, self.means)
        self.model, replaced = cut_to_recover(self.session, self.model, self.plan)
        self.tuner.carry_over(self.model, replaced)
        checkpoint_fewer(self.model, self.structure, self.recipe.recover.checkpointed)
        if self.recipe.train.compile is True:
            compile_blocks(self.model, self.structure)

    def _refit(self, masks: dict[Site, Tensor]) -> int:
        """Kept columns take over what removed inputs did, by moments of the model that the Plan leaves; the tokens read."""
        self.bank.open()  # what was decided under compensating weights goes on from the base's
        self.bank.follower = None
        compensation: Compensation | None = None
        wanted, tokens = self.recipe.compensate, 0
        for _ in range(self.recipe.twostage.refit_rounds):
            self.bank.close(masks)
            passes = Passes(self.session, self.model, self.decider.batches, self.recipe.twostage.batches)
            moments = passes.second_moments(torch.device("cpu") if wanted.offload else self.session.device)
            self.bank.open()
            if compensation:
                compensation.opened()  # what is fitted is the base's weights each time
                compensation = None  # before the next one copies them
            compensation = compensation_of(self.session, self.model, moments, Fit(wanted.damping, judge=False))
            compensation.closed(masks)
            tokens += passes.tokens
        assert compensation is not None
        compensation.settled()
        return tokens

    def _phase(self, name: str, steps: int, turns: list[Turn]) -> Phase:
        before = self.recipe.search.steps if name == "recover" and self.recipe.twostage.scores == "generator" else 0
        parts = (turns, self._capture, self._kept, lambda: self.session.valid_figures(self.model))
        return Phase(name, steps, *parts, lambda: self.trace.row(self.masks), before)

    def _kept(self) -> float:
        if self.plan is None:
            return 1.0
        counts = count(self.structure, self.plan)
        return counts.total_ratio if self.recipe.budget.of == "total" else counts.block_ratio

    def _capture(self) -> dict[str, Any]:
        return {
            "tuner": self.tuner.capture(),
            "decider": self.decider.capture(),
            "plan": self.plan.to_json() if self.plan else None,
            "means": self.means,
            "scored": self.scored,
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        self.decider.restore(saved["decider"])
        self.means, self.scored = saved["means"], saved["scored"]
        if saved["plan"]:
            self.plan = Plan.from_json(saved["plan"])
            self.plan.check(self.structure)
            self._cut(fresh=False)
        self.tuner.restore(saved["tuner"])
