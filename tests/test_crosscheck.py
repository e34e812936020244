"""The cross-check tells agreement with other people's code from a wrong score."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bases import sentences, write_rows
from slimtune.methods.scores import Scorer, Scores
from slimtune.structure.axes import AXES


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def crosscheck() -> ModuleType:
    return script("crosscheck")


@pytest.fixture(scope="module")
def agreement() -> ModuleType:
    return script("agreement")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("text") / "rows.jsonl", [{"text": line} for line in sentences(100)])


@pytest.fixture(scope="module")
def case(crosscheck: ModuleType, text: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return crosscheck.prepare(None, text, batches=2, batch=4, length=32, folder=str(tmp_path_factory.mktemp("run")))


def with_scores(case: Any, criterion: str, scores: Scores) -> Any:
    return replace(case, ours={**case.ours, criterion: scores})


def told(checks: list[Any], criterion: str) -> dict[tuple[str, str], bool]:
    """{(axis, measure): whether it agrees}."""
    return {(check.axis, check.measure): check.agrees for check in checks if check.criterion == criterion}


def test_torch_pruning_agrees(crosscheck: ModuleType, case: Any) -> None:
    pytest.importorskip("torch_pruning")
    checks = crosscheck.with_torch_pruning(case)
    exact = {(check.criterion, check.axis): check.value for check in checks if "difference" in check.measure}
    assert set(exact) == {(criterion, axis) for criterion in ("magnitude", "taylor") for axis in AXES}
    assert max(exact["magnitude", axis] for axis in AXES) < 1e-5
    assert all(check.agrees for check in checks)


@pytest.mark.parametrize("part", ["o or down forgotten", "a part in ten thousand"])
def test_a_wrong_magnitude_disagrees_with_torch_pruning(crosscheck: ModuleType, case: Any, part: str) -> None:
    pytest.importorskip("torch_pruning")
    wrong = {}
    for site, value in case.ours["magnitude"].items():
        columns = case.consumer(*site).weight.detach().square().sum(0).view(len(value), -1).sum(1)
        wrong[site] = value - columns if part.startswith("o or") else value * (1 + 1e-4)
    assert not any(told(crosscheck.with_torch_pruning(with_scores(case, "magnitude", wrong)), "magnitude").values())


def test_scores_of_the_neighbour_disagree_with_torch_pruning(crosscheck: ModuleType, case: Any) -> None:
    pytest.importorskip("torch_pruning")
    wrong = {site: value.roll(1) for site, value in case.ours["taylor"].items()}
    verdicts = told(crosscheck.with_torch_pruning(with_scores(case, "taylor", wrong)), "taylor")
    assert not any(verdicts[axis, "largest relative difference"] for axis in AXES)
    assert not verdicts["ffn", "rank correlation with sum |w g|"]


def test_gradients_of_a_batch_instead_of_its_samples_disagree_with_torch_pruning(crosscheck: ModuleType, case: Any) -> None:
    pytest.importorskip("torch_pruning")
    joined = [[{key: torch.cat([sample[key] for sample in batch]) for key in batch[0]}] for batch in case.batches]
    verdicts = told(crosscheck.with_torch_pruning(replace(case, batches=joined)), "taylor")
    assert not any(verdicts[axis, "largest relative difference"] for axis in AXES)


def test_torch_keeps_the_half_of_our_magnitude_and_no_other(crosscheck: ModuleType, case: Any) -> None:
    assert all(told(crosscheck.with_torch(case), "magnitude").values())
    other = {site: value.roll(1) for site, value in case.ours["magnitude"].items()}
    assert not all(told(crosscheck.with_torch(with_scores(case, "magnitude", other)), "magnitude").values())


def test_llmcompressor_agrees_and_not_with_scores_of_the_neighbour(crosscheck: ModuleType, case: Any) -> None:
    pytest.importorskip("llmcompressor")
    assert all(told(crosscheck.with_llmcompressor(case), "wanda").values())
    wrong = {site: value.roll(1) for site, value in case.ours["wanda"].items()}
    assert not any(told(crosscheck.with_llmcompressor(with_scores(case, "wanda", wrong)), "wanda").values())


def test_figures_of_agreement(agreement: ModuleType) -> None:
    first = {(0, "ffn"): torch.tensor([1.0, 2.0, 3.0, 10.0])}
    assert agreement.difference(first, first) == 0.0
    assert agreement.difference({(0, "ffn"): torch.tensor([1.0, 2.0, 3.0, 11.0])}, first) == pytest.approx(0.1)
    assert agreement.difference({(0, "ffn"): torch.tensor([1.4, 2.0, 3.0, 10.0])}, first) == pytest.approx(
        0.1
    )  # of 4, the mean
    assert agreement.spearman(first, {(0, "ffn"): torch.tensor([0.0, 1.0, 5.0, 6.0])}) == pytest.approx(1.0)
    assert agreement.spearman(first, {(0, "ffn"): torch.tensor([6.0, 5.0, 1.0, 0.0])}) == pytest.approx(-1.0)
    tied = {(0, "ffn"): torch.tensor([1.0, 1.0, 2.0, 2.0])}  # ranks 1.5, 1.5, 3.5, 3.5 against 1, 2, 3, 4
    assert agreement.spearman(first, tied) == pytest.approx(2 / 5**0.5)
    assert agreement.overlap(first[0, "ffn"], torch.tensor([4.0, 1.0, 2.0, 3.0])) == 0.5


def call(crosscheck: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, *words: str) -> None:
    where = ["--text", text, "--batches", "1", "--length", "32"]
    monkeypatch.setattr(sys, "argv", ["crosscheck.py", *where, *words])
    crosscheck.main()


def test_what_is_not_installed_is_told_and_passed_over(
    crosscheck: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setitem(crosscheck.LIBRARIES, "torch-pruning", ("no_such_module", crosscheck.with_torch_pruning))
    rows = tmp_path / "rows.json"
    call(crosscheck, monkeypatch, text, "--libraries", "torch-pruning", "torch", "--rows", str(rows))
    assert "not installed: pip install torch-pruning" in capsys.readouterr().out
    found = json.loads(rows.read_text(encoding="utf-8"))
    assert [(row["library"], row["axis"], row["value"]) for row in found] == [("torch", axis, 1.0) for axis in AXES]
    assert all(set(row) == {"library", "version", "criterion", "axis", "measure", "value"} for row in found)


def test_a_disagreement_exits_with_1(crosscheck: ModuleType, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    right = Scorer.magnitude
    monkeypatch.setattr(Scorer, "magnitude", lambda self: {site: -value for site, value in right(self).items()})
    with pytest.raises(SystemExit) as stop:
        call(crosscheck, monkeypatch, text, "--libraries", "torch")
    assert stop.value.code == 1
