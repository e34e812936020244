"""The decide turn's scores: per-sample gradients add up to the gradient, and the running prior follows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bases import Bench, session_of
from gated import random_model
from slimtune.errors import UserError
from slimtune.methods import atp
from slimtune.methods.decide import Decider
from slimtune.models.hooks import place_gates
from slimtune.prune.gates import MaskBank, mean_over_ranks, squares_over_ranks
from slimtune.prune.prior import prior_logits
from slimtune.prune.sampling import draw_noise, sample
from slimtune.train.loop import hash_seed


def test_gradients_of_one_gate_a_sample_add_up_to_those_of_one_gate() -> None:
    model, structure = random_model("llama", rank=2)
    bank = MaskBank()
    place_gates(model, structure, bank.consumer, bank.base)
    tokens = torch.randint(97, (3, 8), generator=torch.Generator().manual_seed(1))
    masks = {site: torch.rand(structure.layers[site[0]].units[site[1]]) for site in structure.sites()}

    def backward(rows: torch.Tensor, shared: bool) -> dict[Any, torch.Tensor]:
        leaves = bank.leaves(masks if shared else {site: mask.expand(len(rows), -1) for site, mask in masks.items()})
        model(input_ids=rows).logits.square().sum().backward()
        return leaves

    whole = mean_over_ranks(backward(tokens, shared=True))
    parts = [backward(tokens[:2], shared=False), backward(tokens[2:], shared=False)]
    alone = [mean_over_ranks(backward(tokens[row : row + 1], shared=True)) for row in range(3)]
    summed, squares = mean_over_ranks(*parts), squares_over_ranks(*parts)
    for site, expected in whole.items():
        torch.testing.assert_close(summed[site], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(squares[site], sum(one[site].square() for one in alone), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prior", ["taylor", "running"])
def test_only_the_running_prior_follows_the_turns(bench: Bench, tmp_path: Path, prior: str) -> None:
    overrides = {"generator__prior": prior, "generator__prior_decay": 0.75, "generator__prior_steps": 2}
    run = atp._Atp(session_of(bench, tmp_path, **overrides))
    run.decider.set_prior(run.decider.taylor(2), {})
    before = {site: value.clone() for site, value in run.decider.scores.items()}
    first = {index: getattr(run.decider.generator, f"prior_{index}").clone() for index in range(len(before))}
    seen: list[Any] = []
    backward = run.decider._backward_to_gates

    def spy(*args: Any) -> Any:
        seen.append(backward(*args))
        return seen[-1]

    run.decider._backward_to_gates = spy  # type: ignore[method-assign]
    run.decider.turn(0)
    windows = sum(len(part[0, "ffn"]) for part in seen[0][1])
    assert windows == 4
    squares = {site: windows * value for site, value in squares_over_ranks(*seen[0][1]).items()}
    config = run.recipe.generator
    expected = prior_logits(run.decider.scores, run.structure, config.prior_scale, "axis")
    for index, site in enumerate(run.structure.sites()):
        now = getattr(run.decider.generator, f"prior_{index}")
        if prior == "taylor":
            assert torch.equal(run.decider.scores[site], before[site])
            assert torch.equal(now, first[index])
        else:
            torch.testing.assert_close(run.decider.scores[site], 0.75 * before[site] + 0.25 * squares[site])
            assert torch.equal(now, expected[site])


def test_scores_of_steps_of_different_sizes_compare(bench: Bench, tmp_path: Path) -> None:
    """The loss is a mean over the step: without the number of windows more of them would look like smaller gradients."""
    sums = {}
    for batch in (2, 8):
        decider = atp._Atp(session_of(bench, tmp_path / str(batch), search__batch=batch)).decider
        scores = decider.taylor(16 // batch)
        sums[batch] = sum(float(value.sum()) for value in scores.values())
    assert sums[8] == pytest.approx(sums[2], rel=0.35)  # a factor of four otherwise


def test_decide_turns_have_a_batch_of_their_own(bench: Bench, tmp_path: Path) -> None:
    run = atp._Atp(session_of(bench, tmp_path, search__batch=2))
    assert [len(part["input_ids"]) for part in run.decider.batches.at(0)] == [2]
    assert [len(part["input_ids"]) for part in run.tuner.batches.at(0)] == [4]


def test_more_processes_than_windows_is_an_error(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(bench, tmp_path)
    monkeypatch.setattr(type(session.accelerator), "num_processes", 3)
    with pytest.raises(UserError, match="decision step of 2 windows leaves some of 3 processes"):
        session.batches(session.splits.decision, "decision", 2)


@pytest.mark.parametrize("calibrate", [True, False])
def test_only_calibrated_turns_sample_models_of_the_target_size_from_the_first_on(
    bench: Bench, tmp_path: Path, calibrate: bool
) -> None:
    run = atp._Atp(session_of(bench, tmp_path, generator__calibrate=calibrate, search__ramp=0.0))
    weights = [parameter.clone() for parameter in run.decider.generator.parameters()]
    turn = run.decider.turn(0)
    assert turn["target"] == 0.7
    # P(keep) is sigmoid(offset) = 0.95 otherwise, and that of the whole model a little more
    assert float(turn["sampled"]) == pytest.approx(0.7 if calibrate else 0.965, abs=0.03)
    assert any(not torch.equal(*pair) for pair in zip(weights, run.decider.generator.parameters(), strict=True))


PAPER: dict[str, Any] = {"generator__calibrate": False, "generator__kind": "direct", "search__ramp": 0.0}


@pytest.mark.parametrize("alpha", [5.0, 0.0])
def test_the_budget_loss_alone_leads_uncalibrated_samples_to_the_target(bench: Bench, tmp_path: Path, alpha: float) -> None:
    session = session_of(bench, tmp_path, **PAPER, search__steps=60, search__alpha=alpha, generator__lr=0.1)
    run = atp._Atp(session)
    sampled = [float(run.decider.turn(step)["sampled"]) for step in range(60)]
    assert sampled[0] > 0.9
    last = sum(sampled[-10:]) / 10
    assert abs(last - 0.7) < 0.05 if alpha else last > 0.79


@pytest.mark.parametrize("calibrate", [True, False])
def test_turns_follow_the_ramp(bench: Bench, tmp_path: Path, calibrate: bool) -> None:
    overrides = {"generator__calibrate": calibrate, "search__steps": 10, "search__ramp": 0.8}
    run = atp._Atp(session_of(bench, tmp_path, **overrides))
    turns = [run.decider.turn(step) for step in range(10)]
    targets = [turn["target"] for turn in turns]
    assert targets == [run.decider.target(step) for step in range(10)]
    assert targets[0] > 0.95
    assert targets == sorted(targets, reverse=True)
    assert targets[-1] == 0.7
    if calibrate:
        assert sum(abs(float(turn["sampled"]) - turn["target"]) for turn in turns) / 10 < 0.05


@pytest.mark.parametrize(
    ("noise", "estimator", "temperature"), [("logistic", "ste", 0.4), ("gumbel", "ste", 2.0), ("gumbel", "reinmax", 1.0)]
)
def test_samples_are_drawn_as_the_recipe_says(
    bench: Bench, tmp_path: Path, noise: Any, estimator: Any, temperature: float
) -> None:
    chosen = {"generator__noise": noise, "generator__estimator": estimator, "generator__temperature": temperature}
    run = atp._Atp(session_of(bench, tmp_path, **PAPER, **chosen))
    logits = fixed_logits(run.decider)
    found = run.decider.sample(3)
    rng = torch.Generator().manual_seed(hash_seed(0, "noise", 3))
    for site, values in logits.items():
        again = values.detach().clone().requires_grad_()
        expected = sample(again, draw_noise(tuple(again.shape), noise, rng, again.device), noise, estimator, temperature)
        assert torch.equal(found[site], expected)
        (gradient,) = torch.autograd.grad(found[site].sum(), values, retain_graph=True)
        assert torch.equal(gradient, *torch.autograd.grad(expected.sum(), again))
    kept = torch.cat([mask.detach() for mask in found.values()])
    assert 0 < kept.mean() < 1


def test_a_rise_of_all_logits_changes_nothing_where_samples_are_calibrated(bench: Bench, tmp_path: Path) -> None:
    """The level takes part in the gradient, so what one logit gains the others lose."""
    run = atp._Atp(session_of(bench, tmp_path, search__ramp=0.0))
    logits = fixed_logits(run.decider)
    found = run.decider.sample(0)
    pull = {site: torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) for site, mask in found.items()}
    torch.autograd.backward(list(found.values()), list(pull.values()))
    gradient = torch.cat([values.grad for values in logits.values() if values.grad is not None])
    assert float(gradient.abs().sum()) > 1
    assert abs(float(gradient.sum())) < 1e-4 * float(gradient.abs().sum())


def fixed_logits(decider: Decider) -> dict[Any, torch.Tensor]:
    """Random leaves in place of what the generator says."""
    rng = torch.Generator().manual_seed(0)
    made = {site: torch.randn(values.shape, generator=rng).requires_grad_() for site, values in decider.generator().items()}
    decider.generator.forward = lambda: made  # type: ignore[method-assign]
    return made


def test_the_generators_step_is_clipped_and_its_weights_decay(bench: Bench, tmp_path: Path) -> None:
    def stepped(**overrides: Any) -> tuple[torch.Tensor, torch.Tensor]:
        run = atp._Atp(session_of(bench, tmp_path, **{f"generator__{key}": value for key, value in overrides.items()}))
        weight = next(p for p in run.decider.generator.parameters() if p.requires_grad and p.ndim == 2)
        before = weight.detach().clone()
        run.decider.turn(0)
        return before, weight.detach()

    before, plain = stepped()
    assert float((plain - before).abs().max()) == pytest.approx(0.01, rel=0.01)  # AdamW's first step is the learning rate
    _, clipped = stepped(clip=1e-12)  # far below AdamW's epsilon
    assert float((clipped - before).abs().max()) < 1e-4
    _, decayed = stepped(weight_decay=0.5)
    torch.testing.assert_close(decayed, plain - 0.01 * 0.5 * before, rtol=0, atol=1e-6)
