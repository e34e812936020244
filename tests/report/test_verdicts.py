"""How what a check found is told: each row readable, in one unit, in as many digits as it takes."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from typer.testing import CliRunner

from runs import write_run
from slimtune.cli import app
from slimtune.report.check import check
from slimtune.report.verdicts import markdown, render


def test_figures_that_differ_little_are_told_in_as_many_digits_as_that_takes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", changes={"wikitext2.bits_per_byte": 1.30004})
    text = markdown(check(run, None, {"wikitext2.bits_per_byte": "<= base + 0.1", "ppl": "<= 16"}))
    assert "| **FAILED** | wikitext2.bits\\_per\\_byte | 1.30004 |  | &lt;= base + 0.1 = 1.3 |" in text
    assert "| ok | ppl | 16.00 |  | &lt;= 16 |" in text


def test_in_a_log_each_row_is_a_line_and_on_a_narrow_terminal_words_stay_readable(tmp_path: Path) -> None:
    name = "uscode_headings_of_titles_longer.macro_f1"
    long = {name: 0.5, f"{name}_low": 0.48, f"{name}_high": 0.52}
    good, run = write_run(tmp_path / "good", changes=long), write_run(tmp_path / "run", changes={**long, name: 0.4})
    printed = CliRunner().invoke(app, ["check", str(run), "--baseline", str(good)]).stdout
    (row,) = (line for line in printed.splitlines() if line.strip().startswith("FAILED  "))
    assert row.split() == ["FAILED", name, "40.0%", "50.0%", ">=", "baseline", "-", "noise", "=", "47.2%"]
    console = Console(width=80, force_terminal=True, file=io.StringIO())
    console.print(render(check(run, good)))
    assert len(console.file.getvalue().splitlines()) < 45  # type: ignore[attr-defined]


def test_a_row_is_in_one_unit(tmp_path: Path) -> None:
    good, run = write_run(tmp_path / "good"), write_run(tmp_path / "run", changes={"bytes": 1_200_001})
    text = markdown(check(run, good, {"bytes": "<= baseline"}))
    assert "| **FAILED** | bytes | 1,200,001 | 1,200,000 | &lt;= baseline = 1,200,000 |" in text
