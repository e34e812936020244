"""Phases and the time left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimtune.recipe import parse
from slimtune.train.loop import SEARCHES
from slimtune.watch import pace
from watched import REFERENCE, SEARCH, Folder, line


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "health").stages()


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ({}, {("main", "search"): 5, ("main", "recover"): 10}),
        ({"evaluate": {"dense_lora": True}}, {("dense_lora", "tune"): 15, ("main", "search"): 5, ("main", "recover"): 10}),
        (
            {"lora": {"semantics": "lora_aware", "settle": 0.4}},
            {("main", "search"): 5, ("main", "settle"): 2, ("main", "recover"): 8},
        ),
        ({"method": "finetune", "train": {"steps": 7}, "evaluate": {"dense_lora": True}}, {("main", "tune"): 7}),
        ({"method": "tomoe"}, {("main", "search"): 5, ("main", "recover"): 10}),
        (
            {"method": "tomoe", "moe": {"tune": False}, "evaluate": {"dense_lora": True}},
            {("dense_lora", "tune"): 15, ("main", "search"): 5, ("main", "recover"): 10},
        ),
        ({"method": "tomoe", "search": {"steps": 0}}, {("main", "recover"): 10}),
        ({"method": "twostage"}, {("main", "recover"): None}),
        ({"method": "twostage", "twostage": {"scores": "generator"}}, {("main", "decide"): 5, ("main", "recover"): None}),
    ],
)
def test_the_phases_of_a_recipe(recipe: dict[str, Any], steps: dict[Any, int | None]) -> None:
    found = parse({"search": {"steps": 5}, "recover": {"steps": 10}, **recipe})
    assert pace.steps_of(found) == {key: value or found.tuning_steps for key, value in steps.items()}


def test_time_left_goes_by_what_phases_cost_and_counts_evaluations(tmp_path: Path) -> None:
    """In the reference, 10 of 15 steps: a step of the search costs 0.8 of its, one of the recovery half."""
    run = Folder(tmp_path / "run", evaluate={"every": 5, "search_every": 2}).stages()
    rows = REFERENCE[:10]
    rows[0] = rows[0] | {"seconds": 60.0}  # in which kernels were made
    rows[4], rows[9] = (rows[at] | {"valid_ppl": 20.0, "evaluate_seconds": 3.0} for at in (4, 9))
    found = pace.phases(run.rows(*rows).look())
    reference, search, recover = found
    assert (reference.done, reference.steps, reference.step) == (10, 15, 0.5)
    assert reference.spent == pytest.approx(60 + 9 * 0.5 + 2 * 3)
    assert reference.left == pytest.approx(5 * 0.5 + 3)
    assert search.left == pytest.approx(5 * 0.8 * 0.5 + 2 * 3)
    assert recover.left == pytest.approx(10 * 0.5 * 0.5 + 2 * 3)
    assert pace.left(found) == pytest.approx(5.5 + 8 + 8.5)
    assert pace._SEARCHES == SEARCHES


def test_without_costs_only_the_present_phase_is_told(run: Folder) -> None:
    found = pace.phases(run.stages(costs={}).rows(*SEARCH[:3]).look())
    assert [phase.left for phase in found] == [None, 1.0, None]
    assert pace.left(found) is None
    assert "left 1 s" in line(run.shown(), "search")
