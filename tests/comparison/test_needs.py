"""Runs that read another's folder wait for it, and bring it about where it is absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from comparisons import RECIPE, stand_in, write_comparison
from slimtune.cli import app
from slimtune.comparison import launch
from slimtune.comparison.config import load
from slimtune.comparison.jobs import jobs_of
from slimtune.comparison.lock import held
from slimtune.comparison.order import order
from slimtune.comparison.run import compare
from slimtune.errors import UserError

ask = CliRunner().invoke

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
    for seed in (0, 1):
        assert order.index(f"dense_lora-{seed}") < min(order.index(f"taught-{keep}-{seed}") for keep in (0.8, 0.6))
    assert sorted(starts(tmp_path)) == ["small-0.6", "small-0.8"]
    assert {row["method"] for row in rows} == {"taught", "small", "dense_lora"}  # a model that is made first is no method
    assert not [row for row in rows if row["metric"] == "failed"]
    compare(file, say=lambda _: None)
    assert starts(tmp_path / "out") == order
    assert len(starts(tmp_path)) == 2


def test_no_two_runs_have_one_folder(tmp_path: Path) -> None:
    methods: dict[str, Any] = {"a": {}, "a-0.6": {"method": "finetune"}}
    with pytest.raises(UserError) as caught:
        order(write_comparison(tmp_path, methods=methods))
    folder = str(tmp_path / "out" / "a-0.6-0")
    assert str(caught.value) == (
        f"comparison: a 0.6 seed 0 (methods.a) and a-0.6 seed 0 (methods.a-0.6) would both be made in {folder!r}; "
        "rename one of them or change its keep"
    )
    first = [{"recipe": "recipe.yaml", "out": str(tmp_path / "out" / "atp-0.6-1")}]
    with pytest.raises(UserError, match=r"\(first: .*\) and atp 0.6 seed 1 \(methods.atp\) would both be made in"):
        order(write_comparison(tmp_path, first=first))


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


def test_the_digest_follows_what_is_read(tmp_path: Path) -> None:
    def taught(**dense: Any) -> str:
        methods = {**METHODS, "dense_lora": {"method": "finetune", **dense}}
        del methods["small"]
        asked = order(write_comparison(tmp_path, seeds=[0], keep=[0.6], methods=methods))
        return next(job for job in asked.jobs if job.method == "taught").digest

    assert taught() == taught() != taught(**{"lora.rank": 3})


def test_what_reads_a_failed_run_is_not_started(file: Path, tmp_path: Path) -> None:
    raw = yaml.safe_load(file.read_text())
    raw["methods"]["dense_lora"]["lora.rank"] = 13  # fails in the stand-in
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    said: list[str] = []
    rows = compare(file, seeds=[0], say=said.append)
    assert not [name for name in starts(tmp_path / "out") if name.startswith("taught")]
    assert any("taught 0.6 seed 0: not started: it reads dense_lora seed 0 (failed, see" in line for line in said)
    assert {row["method"] for row in rows if row["metric"] != "failed"} == {"small"}


def test_an_older_row_of_a_run_that_could_not_start_is_no_success(file: Path, tmp_path: Path) -> None:
    words = ["compare", str(file), "--only", "taught", "--seeds", "0", "--keep", "0.6"]
    assert ask(app, words).exit_code == 0
    raw = yaml.safe_load(file.read_text())
    raw["methods"]["dense_lora"]["lora.rank"] = 13  # fails in the stand-in
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    result = ask(app, words)
    assert result.exit_code == 1
    assert "no result of taught 0.6 seed 0: see above" in result.stderr


def test_what_another_call_is_making_is_not_read(file: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "dense_lora-0").mkdir(parents=True)
    said: list[str] = []
    with held(tmp_path / "out" / "dense_lora-0.lock"):
        compare(file, only=["taught", "dense_lora"], seeds=[0], keep=[0.6], say=said.append)
    assert not (tmp_path / "out" / "starts").exists()
    assert any("not started: it reads dense_lora seed 0 (left to another call" in line for line in said)


def test_a_model_made_by_other_words_is_not_taken(file: Path, tmp_path: Path) -> None:
    compare(file, only=["small"], seeds=[0], say=lambda _: None)
    raw = yaml.safe_load(file.read_text())
    raw["first"][0]["lora.rank"] = 5
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    with pytest.raises(UserError, match=r"small-0.8' was made by other words; remove it, or give another out"):
        compare(file, only=["small"], seeds=[0], say=lambda _: None)


def test_the_base_of_the_shared_recipe_may_be_made_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNE", stand_in(tmp_path))
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**RECIPE, "method": "finetune"}))
    file = write_comparison(tmp_path, seeds=[0], keep=[0.6], first=[{"recipe": "base.yaml", "out": str(tmp_path / "base")}])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "model": {"path": str(tmp_path / "base" / "model")}}))
    shown = ask(app, ["compare", str(file), "--dry-run"], env={"COLUMNS": "200"})
    assert f"and first, for others read it: {tmp_path / 'base'} (400 steps, " in shown.stdout
    compare(file, say=lambda _: None)
    assert starts(tmp_path) == ["base"]


def test_runs_that_wait_for_one_another_are_told(tmp_path: Path) -> None:
    methods = {
        name: {"distill.weight": 1, "distill.teacher": f"{{out}}/{other}-0.6-0/model"}
        for name, other in (("a", "b"), ("b", "a"))
    }
    with pytest.raises(UserError, match=r"no run can be the first of these: a 0\.6 seed 0 reads b 0\.6 seed 0 reads a 0\.6"):
        order(write_comparison(tmp_path, seeds=[0], keep=[0.6], methods=methods))


def test_a_folder_that_no_run_makes_is_told(tmp_path: Path) -> None:
    taught = {"distill.weight": 1, "distill.teacher": "{out}/nobody-{seed}/model"}
    methods = {"taught": taught, "both": {**taught, "model.tokenizer": "{out}/taught-0.6-{seed}/model"}}
    for name in methods:  # also where another of its folders is made
        chosen = {**methods, "taught": {}} if name == "both" else {name: taught}
        with pytest.raises(UserError, match=rf"{name} 0\.6 seed 0: '\{{out\}}/nobody-0/model' names a folder that no run"):
            order(write_comparison(tmp_path, seeds=[0], keep=[0.6], methods=chosen))


def test_a_tokenizer_by_seed_is_read_too(tmp_path: Path) -> None:
    methods = {"atp": {}, "reader": {"model.tokenizer": "{out}/atp-0.6-{seed}/model"}}
    jobs = order(write_comparison(tmp_path, seeds=[0, 1], keep=[0.6], methods=methods)).jobs
    assert [[source.label for source in job.reads] for job in jobs if job.method == "reader"] == [
        ["atp 0.6 seed 0"],
        ["atp 0.6 seed 1"],
    ]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ([{"recipe": "none.yaml", "out": "x"}], r"first\.0\.recipe='none.yaml' does not exist"),
        ([{"recipe": "recipe.yaml"}], r"first\.0\.out' is missing"),
        ([{"recipe": "recipe.yaml", "out": "x", "lora.rnk": 3}], r"first: x: .*lora\.rnk"),
        (["recipe.yaml"], "it must be a mapping with recipe and out"),
        ([{"recipe": "recipe.yaml", "out": "x"}] * 2, r"first.1: out='x' must be a folder of its own"),
        ([{"recipe": "recipe.yaml", "out": "x-{keep}"}], r"first.0: out='x-\{keep\}' must be a folder of its own"),
        ([{"recipe": "recipe.yaml", "out": "x"}], r"first: 'x' is read by no method"),
    ],
)
def test_bad_models(tmp_path: Path, first: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        order(write_comparison(tmp_path, first=first))
