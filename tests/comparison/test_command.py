"""``slimtune compare``: what it prints and writes, and how it fails."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from typer.testing import CliRunner

from comparisons import row, stand_in, write_comparison
from slimtune.cli import app
from slimtune.comparison import launch
from slimtune.comparison.rows import joined, write

ask = CliRunner().invoke


@pytest.fixture(autouse=True)
def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNE", (*stand_in(tmp_path), "tune"))
    monkeypatch.setenv("COLUMNS", "160")


def test_a_whole_comparison(tmp_path: Path) -> None:
    result = ask(app, ["compare", str(write_comparison(tmp_path, seeds=0)), "--jobs", "3", "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "[3/3] " in result.stdout
    assert "17.00" in result.stdout
    out = tmp_path / "out"
    assert "| atp | 0.6 | 0.00 | 3 | 17.00 [16.05, 18.01] | 0.588 |" in (out / "table.md").read_text()
    assert "<svg" in (out / "figure.svg").read_text()
    again = ask(app, ["compare", str(tmp_path / "comparison.yaml"), "--table"])
    assert again.exit_code == 0, again.output
    assert "[1/" not in again.stdout
    assert len((out / "starts").read_text().split()) == 3


def test_windows_of_runs_reach_the_table(tmp_path: Path) -> None:
    """By hand: the rival's windows add twice as much, so 17 x (0.5, -0.5, 0) and 18 x (0.5, -0.6, 0.1) are between the two."""
    methods = {"atp": {}, "wanda": {"method": "twostage"}}
    assert ask(app, ["compare", str(write_comparison(tmp_path, methods=methods, keep=[0.6]))]).exit_code == 0
    assert "| wanda | ≈ +0.00 ± 0.00, text ± 5.33 |" in (tmp_path / "out" / "table.md").read_text()


def test_a_dry_run_lists_and_writes_nothing(tmp_path: Path) -> None:
    result = ask(app, ["compare", str(write_comparison(tmp_path)), "--dry-run", "--keep", "0.6", "--seeds", "1"])
    assert result.exit_code == 0, result.output
    assert "2 of 2 runs to make, 53,248 tokens at most" in result.stdout
    assert not (tmp_path / "out").exists()


def test_rows_alone_are_printed_and_nothing_is_written(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    write(rows, joined([], [row("atp", 0.6, 0, 15.0), row("flap", 0.6, 0, 16.0)]))
    before = set(tmp_path.iterdir())
    result = ask(app, ["compare", "--table", "--rows", str(rows)])
    assert result.exit_code == 0, result.output
    (lead,) = [line.split() for line in result.stdout.splitlines() if "+1.00" in line]
    assert lead == ["flap", "+1.00"]  # of one seed no sign
    assert set(tmp_path.iterdir()) == before
    assert ask(app, ["compare", "--table", "--rows", str(rows), "--out", str(tmp_path / "here")]).exit_code == 0
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"table.md", "figure.svg"}


def test_a_part_of_the_rows_is_printed(tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    write(rows, joined([], [row(name, 0.6, seed, 15.0) for name in ("atp", "flap") for seed in (0, 1)]))
    result = ask(app, ["compare", "--table", "--rows", str(rows), "--only", "flap", "--seeds", "1"])
    assert result.exit_code == 0, result.output
    assert "flap" in result.stdout
    assert "atp" not in result.stdout
    result = ask(app, ["compare", "--table", "--rows", str(rows), "--only", "flop"])
    assert result.exit_code == 2
    assert f"--only flop: {str(rows)!r} has no such run. Did you mean 'flap'? It has: atp, flap" in result.stderr


def test_a_part_of_a_comparison_is_printed_whether_all_of_it_is_there_or_not(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["compare", str(write_comparison(tmp_path)), "--table"]
    write(out / "rows.json", joined([], [row("atp", 0.6, 0, 15.0), row("atp", 0.8, 0, 13.0), row("flap", 0.6, 0, 16.0)]))
    assert ask(app, [*words, "--only", "atp,dense_lora", "--keep", "0.6"]).exit_code == 0
    table = (out / "table.md").read_text()
    assert "| atp | 0.6 |  | 15.00 |  | 2.00 | 30 | 0; MISSING: 1 |" in table
    assert "| dense_lora | all |  |  |  |  |  | MISSING: 0, 1 |" in table
    assert "0.8" not in table
    assert "flap" not in table
    assert "<!-- 60% -->" in (out / "figure.svg").read_text()
    assert "80%" not in (out / "figure.svg").read_text()
    for part, message in (
        (["--only", "dense_lora"], "--only dense_lora: "),
        (["--seeds", "1"], "--seeds 1: "),
        (["--only", "flap"], "--only flap: the comparison has no such run"),
    ):
        result = ask(app, [*words, *part])
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_failed_run_makes_the_command_fail_at_its_end(tmp_path: Path) -> None:
    methods = {"unlucky": {"lora.rank": 13}, "atp": {}}
    result = ask(app, ["compare", str(write_comparison(tmp_path, methods=methods, keep=0.6, seeds=0))])
    assert result.exit_code == 1
    assert "FAILED: 0" in result.stdout
    assert result.stderr == "1 of 2 runs failed, the last with: error: rank 13 is unlucky\n"


def test_a_part_without_a_point_to_draw_is_no_failure(tmp_path: Path) -> None:
    result = ask(app, ["compare", str(write_comparison(tmp_path, seeds=0)), "--only", "dense_lora"])
    assert result.exit_code == 0, result.output
    assert "no figure: no method has a perplexity" in result.stdout
    assert "MISSING: 0" in (tmp_path / "out" / "table.md").read_text()
    assert not (tmp_path / "out" / "figure.svg").exists()


def test_without_matplotlib_the_runs_and_tables_are_made_and_the_figure_is_told_of_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else found(name, *more))
    words = ["compare", str(write_comparison(tmp_path, seeds=0))]
    dry = ask(app, [*words, "--dry-run"])
    assert "needs matplotlib: pip install 'slimtune[plot]'" in dry.stderr
    result = ask(app, words)
    assert result.exit_code == 0, result.output
    assert "[3/3] " in result.stdout
    first, last = result.output.splitlines()[0], result.output.splitlines()[-1]
    assert (
        first == "no figure will be drawn: it needs matplotlib: pip install 'slimtune[plot]' (also later, for --table draws it)"
    )
    assert last == "no figure: it needs matplotlib: pip install 'slimtune[plot]', then the same command with --table draws it"
    out = tmp_path / "out"
    assert (out / "table.md").is_file()
    assert not (out / "figure.svg").exists()
    again = ask(app, [*words, "--table"])
    assert (again.exit_code, again.output.splitlines()[-1]) == (0, last)


def test_a_table_after_a_change_of_the_recipe_tells_what_is_old(tmp_path: Path) -> None:
    words = ["compare", str(write_comparison(tmp_path, keep=0.6, seeds=0, methods={"atp": {}}))]
    assert ask(app, words).exit_code == 0
    write_comparison(tmp_path, keep=0.6, seeds=0, methods={"atp": {}}, set={"lora.rank": 5})
    result = ask(app, [*words, "--table"])
    assert result.exit_code == 0, result.output
    assert "made by other words of the recipe, not comparable: atp 0.6 (seeds 0)" in result.stdout
    assert "no figure: no method has a perplexity" in result.stdout
    assert "| atp | 0.6 |  |  |  |  |  | MISSING: 0 |" in (tmp_path / "out" / "table.md").read_text()


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.Launcher, "run_all", interrupted)
    result = ask(app, ["compare", str(write_comparison(tmp_path))])
    assert result.exit_code == 130
    assert result.stderr == "interrupted; the same command goes on with the runs that are left\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs 0: give the number of runs side by side"),
        (["--only", "apt"], "--only apt: the comparison has no such run. Did you mean 'atp'?"),
        (["--keep", "most"], "--keep 'most' is not a list such as 0.6,0.5"),
        (["--only", ","], "--only ',' names nothing; give a list, or leave the option out"),
        (["--only", ""], "--only '' names nothing"),
        (["--keep", " , "], "--keep ' , ' names nothing"),
        (["--seeds", ""], "--seeds '' names nothing"),
        (["--gpus", ","], "--gpus ',' names nothing"),
        (["--table"], "there are no rows in"),
        (["--table", "--dry-run"], "--table and --dry-run exclude each other"),
        (["--threads", "0"], "--threads 0: give the CPU threads of a run, 1 or more"),
        (["--threads", "-2", "--dry-run"], "--threads -2: give the CPU threads"),
        (["--jobs", "0", "--dry-run"], "--jobs 0: give the number of runs"),
        (["--gpus", "0,x"], "--gpus x: give the numbers of GPUs"),
        (["--gpus", "-1", "--dry-run"], "--gpus -1: give the numbers of GPUs"),
    ],
)
def test_one_clear_error(tmp_path: Path, words: list[str], message: str) -> None:
    result = ask(app, ["compare", str(write_comparison(tmp_path)), *words])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not (tmp_path / "out" / "starts").exists()


def test_a_comparison_file_is_needed() -> None:
    assert "give a comparison file" in ask(app, ["compare"]).stderr
    assert "comparison 'nowhere.yaml' does not exist" in ask(app, ["compare", "nowhere.yaml"]).stderr
