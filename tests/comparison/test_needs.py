"""Runs that read another's folder wait for it, and bring it about where it is absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from comparisons import RECIPE, stand_in, write_comparison
from slimtune.comparison import launch
from slimtune.comparison.config import load
from slimtune.comparison.jobs import first_of, jobs_of
from slimtune.comparison.needs import waves
from slimtune.comparison.run import compare
from slimtune.errors import UserError

METHODS: dict[str, Any] = {
    "taught": {"distill": {"weight": 1, "teacher": "{out}/dense_lora-{seed}/model"}},
    "small": {"method": "finetune", "model.path": "SMALL-{keep}/model", "keep": [0.8, 0.6]},
    "dense_lora": {"method": "finetune"},
}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(launch, "TUNE", stand_in(tmp_path))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**RECIPE, "method": "finetune"}))
    made = [
        {"recipe": "small.yaml", "out": str(tmp_path / f"small-{keep}"), "lora.rank": rank}
        for keep, rank in ((0.8, 4), (0.6, 3))
    ]
    small = {**METHODS["small"], "model.path": str(tmp_path / "small-{keep}/model")}
    return write_comparison(tmp_path, seeds=[0, 1], first=made, methods={**METHODS, "small": small})


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().split()


def test_what_is_read_is_made_before_and_once(file: Path, tmp_path: Path) -> None:
    rows = compare(file, say=lambda _: None)
    order = starts(tmp_path / "out")
    assert {name[:-2] for name in order[:2]} == {"dense_lora"}
    assert sorted(starts(tmp_path)) == ["small-0.6", "small-0.8"]
    assert {row["method"] for row in rows} == {"taught", "small", "dense_lora"}  # a model that is made first is no method
    assert not [row for row in rows if row["metric"] == "failed"]
    compare(file, say=lambda _: None)
    assert starts(tmp_path / "out") == order
    assert len(starts(tmp_path)) == 2


def test_a_method_alone_brings_its_teacher_about(file: Path, tmp_path: Path) -> None:
    compare(file, only=["taught"], keep=[0.6], seeds=[1], say=lambda _: None)
    assert starts(tmp_path / "out") == ["dense_lora-1", "taught-0.6-1"]
    assert not (tmp_path / "starts").exists()


def test_words_name_the_seed_at_once_and_the_folder_when_they_are_used(file: Path, tmp_path: Path) -> None:
    job = next(job for job in jobs_of(load(file)) if (job.method, job.seed) == ("taught", 1))
    assert 'distill.teacher="{out}/dense_lora-1/model"' in job.words
    assert f'distill.teacher="{tmp_path / "out"}/dense_lora-1/model"' in launch.command(job)
    elsewhere = next(other for other in jobs_of(load(file), tmp_path / "x") if other.key == job.key)
    assert elsewhere.digest == job.digest
    assert f'distill.teacher="{tmp_path / "x"}/dense_lora-1/model"' in launch.command(elsewhere)


def test_runs_that_wait_for_one_another_are_told(tmp_path: Path) -> None:
    methods = {
        name: {"distill.weight": 1, "distill.teacher": f"{{out}}/{other}-0.6-0/model"}
        for name, other in (("a", "b"), ("b", "a"))
    }
    jobs = jobs_of(load(write_comparison(tmp_path, seeds=[0], keep=[0.6], methods=methods)))
    with pytest.raises(UserError, match=r"these runs wait for one another: a 0\.6 seed 0, b 0\.6 seed 0"):
        list(waves(jobs))


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ([{"recipe": "none.yaml", "out": "x"}], r"first\.0\.recipe='none.yaml' does not exist"),
        ([{"recipe": "recipe.yaml"}], r"first\.0\.out' is missing"),
        ([{"recipe": "recipe.yaml", "out": "x", "lora.rnk": 3}], r"first: x: .*lora\.rnk"),
        (["recipe.yaml"], "it must be a mapping with recipe and out"),
    ],
)
def test_bad_models(tmp_path: Path, first: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        first_of(load(write_comparison(tmp_path, first=first)))
