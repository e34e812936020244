"""Consumers that compensate: their weights follow the gates, and gates are judged by what nothing kept can replace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bases import Bench, session_of
from slimtune.errors import UserError
from slimtune.methods import atp, twostage
from slimtune.methods.passes import Passes
from slimtune.models.surgery import linears_of
from slimtune.prune.gates import Site
from slimtune.prune.moments import Moments
from slimtune.structure.axes import FFN
from slimtune.train.objective import forward


def started(bench: Bench, out: Path, weights: str = "decide", **overrides: Any) -> Any:
    """A run that has read its second moments, and masks that keep every other unit."""
    keys = {"compensate__weights": weights, "generator__prior_steps": 2, "recover__steps": 0, **overrides}
    run = atp._Atp(session_of(bench, out, **keys))
    run.compensation = atp.prepare(run.session, run.model, run.bank, run.decider, fresh=True)
    return run


def test_the_first_turn_judges_by_innovations_too(bench: Bench, tmp_path: Path) -> None:
    run = started(bench, tmp_path)
    run.bank.leaves(atp.budget.all_kept(run.structure, run.session.device))
    own = run.bank.innovation(1, "ffn")
    assert own is not None
    assert own.kept.all()


def halves(run: Any) -> dict[Site, Tensor]:
    return {
        (layer, axis): (torch.arange(run.structure.layers[layer].units[axis]) % 2 == 0).float()
        for layer, axis in run.structure.sites()
    }


def consumers(run: Any) -> dict[Site, Tensor]:
    found = linears_of(run.model, run.structure)
    return {(layer, row.into.axis): module.base_layer.weight.clone() for layer, row, module in found if row.into}


def logits(run: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return forward(run.model.eval(), batch)


def test_weights_follow_the_gates_and_come_back_bit_for_bit(bench: Bench, tmp_path: Path) -> None:
    run = started(bench, tmp_path)
    original = consumers(run)
    run.bank.close(halves(run))
    closed = consumers(run)
    assert all(not torch.equal(closed[site], original[site]) for site in original)
    run.bank.open()
    assert all(torch.equal(weight, original[site]) for site, weight in consumers(run).items())
    run.bank.close(halves(run))
    assert all(torch.equal(weight, closed[site]) for site, weight in consumers(run).items())
    run.bank.close({site: torch.ones_like(mask) for site, mask in halves(run).items()})
    assert all(torch.equal(weight, original[site]) for site, weight in consumers(run).items())


def test_weights_of_other_masks_take_the_place_of_those_that_waited(bench: Bench, tmp_path: Path) -> None:
    run = started(bench, tmp_path, "adapt")
    one = halves(run)
    other = {site: 1.0 - mask for site, mask in one.items()}
    seen = dict[bool, dict[Site, Tensor]]()
    for first in (True, False, True, False):
        masks = one if first else other
        run.bank.close(masks)
        found = consumers(run)
        expected = seen.setdefault(first, found)
        assert all(torch.equal(weight, expected[site]) for site, weight in found.items())
        for _ in range(2):  # a decide turn opens them
            run.bank.open()
            run.bank.close(masks)
            assert all(torch.equal(weight, expected[site]) for site, weight in consumers(run).items())
        run.bank.open()
    assert not any(torch.equal(weight, seen[False][site]) for site, weight in seen[True].items())


def test_a_model_that_compensates_is_nearer_to_the_whole_one(bench: Bench, tmp_path: Path) -> None:
    run = started(bench, tmp_path)
    batch = run.decider.batches.at(0)[0]
    whole = logits(run, batch)
    run.bank.close(halves(run))
    with_it = float((logits(run, batch) - whole).norm())
    run.bank.open()
    run.bank.follower = None
    run.bank.close(halves(run))
    assert with_it < 0.9 * float((logits(run, batch) - whole).norm())


def test_sampled_gates_at_the_fixed_masks_compute_what_the_fixed_masks_do(bench: Bench, tmp_path: Path) -> None:
    run = started(bench, tmp_path)
    batch = run.decider.batches.at(0)[0]
    run.bank.close(halves(run))
    fixed = logits(run, batch)
    run.bank.leaves(halves(run))
    torch.testing.assert_close(logits(run, batch), fixed)


@pytest.mark.parametrize("matrices", [4096, 0], ids=["matrix", "share"])
def test_a_gates_gradient_is_that_of_its_innovation(bench: Bench, tmp_path: Path, matrices: int) -> None:
    """For the last consumer: output gradient times weight column times innovation, for a kept unit and one that is gone."""
    run = started(bench, tmp_path, compensate__matrices=matrices)
    batch, site = run.decider.batches.at(0)[0], (2, "ffn")
    run.bank.close(halves(run))
    module = next(
        module for layer, row, module in linears_of(run.model, run.structure) if row.into and (layer, row.into.axis) == site
    )
    seen: dict[str, Tensor] = {}

    def note(_: Any, args: Any, output: Tensor) -> None:
        output.retain_grad()
        seen["out"] = output

    handles = [
        module.register_forward_pre_hook(lambda _, args: seen.update(x=args[0].detach()), prepend=True),
        module.register_forward_hook(note),
    ]
    leaf = run.bank.leaves(halves(run))[site]
    forward(run.model.eval(), batch).square().mean().backward()
    for handle in handles:
        handle.remove()
    told = run.compensation.innovations[site].residual
    assert told.ndim == (2 if matrices else 1)
    residual = seen["x"] @ told.T if matrices else seen["x"] * told
    assert seen["out"].grad is not None
    expected = ((seen["out"].grad @ module.base_layer.weight) * residual).sum((0, 1))
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-3, atol=1e-6)
    plain = ((seen["out"].grad @ module.base_layer.weight) * seen["x"]).sum((0, 1))
    assert (leaf.grad - plain).norm() > 0.1 * plain.norm()


@pytest.mark.parametrize("matrices", [4096, 0], ids=["matrix", "share"])
def test_a_unit_that_comes_back_brings_its_innovation_alone(bench: Bench, tmp_path: Path, matrices: int) -> None:
    run = started(bench, tmp_path, compensate__matrices=matrices)
    batch, site, fixed = run.decider.batches.at(0)[0], (2, "ffn"), halves(run)
    module = next(
        each for layer, row, each in linears_of(run.model, run.structure) if row.into and layer == 2 and row.into.axis == "ffn"
    )
    run.bank.close(fixed)
    seen: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, args: seen.append(args[0]), prepend=first) for first in (True, False)]
    sampled = {**fixed, site: 1 - fixed[site]}  # those that were gone come back, the others go
    run.bank.leaves(sampled)
    logits(run, batch)
    for handle in handles:
        handle.remove()
    (x, gated), told = seen, run.compensation.innovations[site].residual
    residual = x @ told.T if matrices else x * told
    torch.testing.assert_close(gated, residual * sampled[site])
    assert float(gated.abs().max()) > 0


@pytest.mark.parametrize("weights", ["adapt", "decide"])
def test_decide_turns_compensate_only_where_they_are_told_to(bench: Bench, tmp_path: Path, weights: str) -> None:
    run = started(bench, tmp_path, weights)
    original = consumers(run)
    run.bank.close(halves(run))
    run.decider.turn(0)
    same = all(torch.equal(weight, original[site]) for site, weight in consumers(run).items())
    assert same == (weights == "adapt")
    assert (run.bank.innovation(0, "ffn") is None) == (weights == "adapt")


def test_second_moments_are_sums_of_outer_products_of_tokens(bench: Bench, tmp_path: Path) -> None:
    run = started(bench, tmp_path)
    passes = Passes(run.session, run.model, run.decider.batches, 2)
    seen: dict[Site, Tensor] = {}

    def see(real: Tensor, layer: int, axis: str, values: Tensor) -> None:
        for row, good in zip(values, real, strict=True):
            for token, is_text in zip(row, good, strict=True):
                if is_text:
                    seen[layer, axis] = seen.get((layer, axis), torch.zeros(len(token), len(token))) + torch.outer(token, token)

    passes.run(lambda real: {"consumers": lambda *args: see(real, *args)})
    for site, moments in run.compensation.moments.items():
        torch.testing.assert_close(moments.whole(), seen[site], rtol=1e-4, atol=1e-4)


def test_micro_batches_may_be_read_together(bench: Bench, tmp_path: Path) -> None:
    run = started(bench, tmp_path, train__micro_batch=1)
    tokens = list[int]()

    def read(together: int) -> int:
        passes = Passes(run.session, run.model, run.decider.batches, 2)
        tokens.append(sum(int(real.sum()) for real in passes.run(lambda _: {}, together)))
        return passes.tokens

    assert read(1) == read(3) == tokens[0] == tokens[1] > 0


@pytest.mark.parametrize(
    ("prior", "weights", "passes"),
    [("none", "decide", 1), ("wanda", "none", 1), ("wanda", "adapt", 1), ("taylor", "none", 1), ("mixed", "decide", 2)],
)
def test_batches_read_before_the_search_count(bench: Bench, tmp_path: Path, prior: str, weights: str, passes: int) -> None:
    run = started(bench, tmp_path, weights, generator__prior=prior)
    once = sum(run.decider.batches.tokens(step) for step in range(2))
    assert run.decider.tokens["prior"] == passes * once
    turns = run.recipe.search.steps
    assert run.recipe.decide_windows == (turns + 2 * passes) * (run.recipe.search.batch or run.recipe.train.batch)


def test_the_wanda_prior_is_the_rivals_score_whoever_reads_the_inputs(bench: Bench, tmp_path: Path) -> None:
    orders = []
    for name, weights in (("a", "none"), ("b", "adapt")):
        run = started(bench, tmp_path / name, weights, generator__prior="wanda")
        orders.append(run.decider.still)
    rival = twostage._TwoStage(session_of(bench, tmp_path / "c", method="twostage", twostage__batches=2))
    scores = twostage.Scorer(rival.session, rival.model, rival.decider).wanda()
    for site, value in scores.items():
        torch.testing.assert_close(orders[0][site], value, rtol=1e-5, atol=0)
        torch.testing.assert_close(orders[1][site], value, rtol=1e-4, atol=0)


def test_a_joint_update_that_would_compensate_is_an_error(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"search\.update=joint .* needs compensate\.weights=none"):
        bench.recipe(tmp_path, search__update="joint", compensate__weights="adapt")


def test_moments_that_are_not_finite_are_told_with_their_first_layer(bench: Bench, tmp_path: Path) -> None:
    session = session_of(bench, tmp_path)
    passes = Passes(session, torch.nn.Linear(1, 1), session.batches(session.splits.decision, "decision", 1), 1)
    good, bad = Moments.of(torch.eye(4)), Moments.of(torch.full((4, 4), torch.nan))
    passes.check({(0, FFN): good}, "compensate.weights=none")
    with pytest.raises(UserError, match=r"in layer 1 are not finite on the decision rows.*set compensate\.weights=none"):
        passes.check({(0, FFN): good, (2, FFN): bad, (1, FFN): bad}, "compensate.weights=none")
