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
from slimtune.models.surgery import place_gates
from slimtune.prune.gates import MaskBank, mean_over_ranks, squares_over_ranks
from slimtune.prune.prior import prior_logits


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
    run.decider.set_prior()
    before = {site: value.clone() for site, value in run.decider.scores.items()}
    first = {index: getattr(run.decider.generator, f"prior_{index}").clone() for index in range(len(before))}
    seen: list[Any] = []
    backward = run.decider._backward_to_gates

    def spy(*args: Any) -> Any:
        seen.append(backward(*args))
        return seen[-1]

    run.decider._backward_to_gates = spy  # type: ignore[method-assign]
    run.decider.turn(0)
    squares = squares_over_ranks(*seen[0][1])
    expected = prior_logits(run.decider.scores, run.structure, run.recipe.generator.prior_scale)
    for index, site in enumerate(run.structure.sites()):
        now = getattr(run.decider.generator, f"prior_{index}")
        if prior == "taylor":
            assert torch.equal(run.decider.scores[site], before[site])
            assert torch.equal(now, first[index])
        else:
            torch.testing.assert_close(run.decider.scores[site], 0.75 * before[site] + 0.25 * squares[site])
            assert torch.equal(now, expected[site])


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
