"""Budgets that no run could meet are told before the first one starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import slimtune
from comparisons import stand_in, write_comparison
from slimtune.cli import app
from slimtune.comparison import launch
from slimtune.comparison.budgets import check_budgets
from slimtune.comparison.config import load
from slimtune.comparison.jobs import Job, jobs_of
from slimtune.comparison.needs import linked
from slimtune.errors import UserError


def runs(folder: Path, **changes: Any) -> list[Job]:
    return linked(jobs_of(load(write_comparison(folder, **changes))), [])


def test_nothing_runs_where_one_budget_cannot_be_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNE", (*stand_in(tmp_path), "tune"))
    file = write_comparison(tmp_path, keep=[0.6, 0.01])
    with pytest.raises(UserError, match=r"atp 0.01 seed 0: budget.keep=0.01 of total cannot be met"):
        slimtune.compare(file)
    result = CliRunner().invoke(app, ["compare", str(file), "--dry-run"])
    assert result.exit_code == 2
    assert "budget.keep=0.01 of total cannot be met" in result.stderr
    assert not (tmp_path / "out" / "starts").exists()
    slimtune.compare(file, keep=[0.6])  # of what is asked for
    assert (tmp_path / "out" / "starts").exists()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"method": "twostage", "twostage.scores": "layer_drop", "budget.tolerance": 1e-9, "keep": 0.55}, "by dropping layers"),
    ({"budget.tolerance": 1e-9, "budget.ffn_multiple": 128}, "within budget.tolerance"),
    ({"model.path": "nowhere"}, "model.path='nowhere' does not exist"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=["layers", "rounding", "base"])
def test_methods_are_asked_each_in_its_own_way(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_budgets(runs(tmp_path, methods={"atp": {}, "mine": changes}, keep=0.6, seeds=0))
    assert str(caught.value).startswith("mine 0.")
    assert message in str(caught.value)


def test_whole_layers_may_meet_a_budget_that_blocks_miss(tmp_path: Path) -> None:
    layers = {"method": "twostage", "twostage.scores": "layer_drop", "budget.tolerance": 1e-9}
    check_budgets(runs(tmp_path, methods={"layers": layers}, keep=0.6))
    with pytest.raises(UserError, match=r"within budget\.tolerance"):
        check_budgets(runs(tmp_path, methods={"taylor": {**layers, "twostage.scores": "taylor"}}, keep=0.6))


def test_what_cannot_be_known_yet_is_left_to_the_run(tmp_path: Path) -> None:
    tuned = {"model.path": "{out}/dense_lora-{seed}/model"}
    check_budgets(runs(tmp_path, methods={"dense_lora": {"method": "finetune"}, "cut": tuned}, keep=0.01))
    check_budgets(runs(tmp_path, methods={"dense_lora": {"method": "finetune", "model.path": "nowhere"}}))
    check_budgets(runs(tmp_path, methods={"atp": {"model.path": "nowhere"}}), absent=True)
