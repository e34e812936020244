"""Several comparisons in one call."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from comparisons import stand_in, write_comparison
from slimtune.cli import app
from slimtune.comparison import launch
from slimtune.comparison.order import order
from slimtune.comparison.rows import key_of, read
from slimtune.comparison.run import compare
from slimtune.errors import UserError


def two(folder: Path, **second: Any) -> list[Path]:
    """Comparisons of health and law, beside one another."""
    files = []
    for domain, changes in (("health", {}), ("law", second)):
        (folder / domain).mkdir()
        out = {"out": str(folder / f"out-{domain}"), "domain": domain, "keep": [0.6]}
        files.append(write_comparison(folder / domain, **{**out, **changes}))
    return files


@pytest.fixture
def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNE", (*stand_in(tmp_path), "tune"))


def test_runs_of_several_come_seed_by_seed_and_say_whose_they_are(tmp_path: Path) -> None:
    asked = order(two(tmp_path, seeds=[1, 2]), rows=tmp_path / "rows.json")
    assert [job.label for job in asked.work] == [
        *("health: atp 0.6 seed 0", "health: dense_lora seed 0", "law: atp 0.6 seed 1", "law: dense_lora seed 1"),
        *("health: atp 0.6 seed 1", "health: dense_lora seed 1", "law: atp 0.6 seed 2", "law: dense_lora seed 2"),
    ]
    assert [out.name for out in asked.outs] == ["out-health", "out-law"]


def test_a_run_has_the_same_words_in_company(tmp_path: Path) -> None:
    files = two(tmp_path)
    together = {job.key: job for job in order(files, rows=tmp_path / "rows.json").jobs}
    for file in files:
        for job in order(file).jobs:
            assert together[job.key] == job
            assert together[job.key].digest == job.digest
            assert not job.whose


def test_what_is_asked_for_must_be_in_one_of_them(tmp_path: Path) -> None:
    files, rows = two(tmp_path, methods={"other": {}, "dense_lora": {"method": "finetune"}}), tmp_path / "rows.json"
    found = order(files, only=["other", "atp"], seeds=[1], rows=rows).work
    assert [job.label for job in found] == ["health: atp 0.6 seed 1", "law: other 0.6 seed 1"]
    with pytest.raises(UserError, match="--only wanda: the comparison has no such run"):
        order(files, only=["wanda"], rows=rows)


@pytest.mark.parametrize(
    ("second", "told"),
    [
        ({"domain": "health"}, "both have atp of tiny, health; give them in calls of their own, with another --rows each"),
        (
            {"out": "OUT/out-health"},
            r"health: atp 0\.6 seed 0 .* and law: atp 0\.6 seed 0 .* would both be made in '.*out-health/atp",
        ),
    ],
)
def test_runs_that_would_take_one_anothers_place_are_refused(tmp_path: Path, second: dict[str, str], told: str) -> None:
    files = two(tmp_path, **{key: value.replace("OUT", str(tmp_path)) for key, value in second.items()})
    with pytest.raises(UserError, match=told):
        order(files, rows=tmp_path / "rows.json")


def test_the_same_file_twice_is_told(tmp_path: Path) -> None:
    file = write_comparison(tmp_path)
    with pytest.raises(UserError, match="is given twice"):
        order([file, file], rows=tmp_path / "rows.json")


def test_several_need_a_file_of_rows_and_their_own_folders(tmp_path: Path) -> None:
    files = two(tmp_path)
    with pytest.raises(UserError, match="several comparisons share a file of rows; name it: --rows FILE"):
        order(files)
    with pytest.raises(UserError, match="--out 'x' is for one"):
        order(files, rows="rows.json", out="x")
    with pytest.raises(UserError, match="give a comparison file"):
        order([])


def with_small(folder: Path, *ranks: int) -> list[Path]:
    """The two, each with a method that starts from a model made first, by words that differ by the rank."""
    files = two(folder)
    for domain, rank in zip(("health", "law"), ranks, strict=True):
        first = {"recipe": "recipe.yaml", "out": str(folder / "small"), "method": "finetune", "lora.rank": rank}
        small = {"method": "finetune", "model.path": str(folder / "small" / "model")}
        more = {"first": [first], "methods": {"dense_lora": {"method": "finetune"}, "small": small}}
        write_comparison(folder / domain, domain=domain, keep=None, seeds=[0], out=str(folder / f"out-{domain}"), **more)
    return files


@pytest.mark.usefixtures("_fake")
def test_a_model_that_both_read_is_made_once(tmp_path: Path) -> None:
    lines: list[str] = []
    rows = compare(with_small(tmp_path, 4, 4), rows=tmp_path / "rows.json", jobs=3, threads=1, say=lines.append)
    assert (tmp_path / "starts").read_text().split().count("small") == 1
    assert {key_of(row)[1:3] for row in rows} == set(itertools.product(("health", "law"), ("dense_lora", "small"))), lines
    assert any("law: small seed 0: perplexity 10.00" in line for line in lines)


def test_one_model_by_different_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"make the model '.*small' by different words; give one of them another folder"):
        order(with_small(tmp_path, 4, 8), rows=tmp_path / "rows.json")


@pytest.mark.usefixtures("_fake")
def test_one_command_makes_both_tables(tmp_path: Path) -> None:
    files, rows = two(tmp_path), tmp_path / "rows.json"
    words = ["compare", *map(str, files), "--rows", str(rows), "--jobs", "2", "--threads", "1"]
    listed = CliRunner().invoke(app, [*words, "--dry-run"])
    assert "law: atp" in listed.output
    assert "8 of 8 runs to make" in listed.output
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert len({key_of(row) for row in read(rows)}) == 8
    for domain in ("health", "law"):
        assert "**law, tiny: all figures**" in (tmp_path / f"out-{domain}" / "table.md").read_text()
    again = CliRunner().invoke(app, words)
    assert "8 of 8 runs are there already" in again.output
    shown = CliRunner().invoke(app, ["compare", *map(str, files), "--rows", str(rows), "--table", "--seeds", "1"])
    assert shown.exit_code == 0, shown.output
    assert "health, tiny: all figures" in shown.output
