"""What a run left: taken where it is whole, made again where it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import slimtune
from comparisons import stand_in, write_comparison
from slimtune.cli import app
from slimtune.comparison import launch
from slimtune.comparison.config import load
from slimtune.comparison.jobs import first_of
from slimtune.comparison.made import made_for_others


@pytest.fixture(autouse=True)
def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNE", (*stand_in(tmp_path), "tune"))


@pytest.mark.parametrize("name", ["atp-0.6-0.json", "atp-0.6-0/summary.json", "atp-0.6-0/plan.json", "atp-0.6-0/windows.json"])
def test_a_run_with_a_damaged_file_is_made_again(tmp_path: Path, name: str) -> None:
    file, out = write_comparison(tmp_path, methods={"atp": {}}, keep=0.6, seeds=0), tmp_path / "out"
    slimtune.compare(file, say=lambda _: None)
    for count, text in enumerate(("{bad", "[]", '"text"', '{"plan": 3}', '{"result": {}}', "\xff"), 2):
        (out / "rows.json").unlink()
        (out / name).write_text(text, encoding="latin-1")
        dry = CliRunner().invoke(app, ["compare", str(file), "--dry-run"])
        assert (dry.exit_code, "1 of 1 runs to make" in dry.output) == (0, True), dry.output
        rows = slimtune.compare(file, say=lambda _: None)
        assert [row["value"] for row in rows if row["metric"] == "domain_ppl"] == [17.0]
        assert len((out / "starts").read_text().split()) == count
    assert not list(out.glob("*.partial"))


def test_a_damaged_first_is_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    file = write_comparison(tmp_path, first=[{"recipe": "recipe.yaml", "out": str(folder)}])
    (job,) = first_of(load(file))
    folder.mkdir()
    assert not made_for_others(job)
    for text, there in (("{}", True), ("[]", False), ("{bad", False)):
        (folder / "summary.json").write_text(text)
        assert made_for_others(job) is there
    (folder / "summary.json").write_text("{}")
    (tmp_path / "small.json").write_text("{bad")
    assert not made_for_others(job)


def test_the_folder_of_another_comparison_is_left_alone(tmp_path: Path) -> None:
    methods = {"atp": {}}
    slimtune.compare(write_comparison(tmp_path, methods=methods, keep=0.6, seeds=0), say=lambda _: None)
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    other = write_comparison(tmp_path, methods=methods, keep=0.6, domain="law", set={"lora.rank": 5}, seeds=[0, 1])
    message = (
        f"out={str(out)!r}: {str(out / 'atp-0.6-0')!r} holds a run of the comparison of 'tiny', 'somewhere', not of "
        "'tiny', 'law'; give another --out"
    )
    for option in ([], ["--dry-run"]):
        result = CliRunner().invoke(app, ["compare", str(other), *option])
        assert (result.exit_code, result.stderr) == (2, f"error: {message}\n")
    assert {path: path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()} == before
    stamp = out / "atp-0.6-0.json"
    stamp.write_text(json.dumps({key: it for key, it in json.loads(stamp.read_text()).items() if key != "comparison"}))
    rows = slimtune.compare(other, say=lambda _: None)  # an older stamp does not say whose it is
    assert {(row["domain"], row["seed"]) for row in rows} == {("somewhere", 0), ("law", 0), ("law", 1)}
    slimtune.compare(other, say=lambda _: None)
