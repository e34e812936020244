"""The runs in docs/reports, and what README and docs/report.md say of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.report.page import report
from slimtune.report.run import read_run
from slimtune.report.verdict import verdict

ROOT = Path(__file__).parents[2]
REPORTS = ROOT / "docs" / "reports"


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", ["health", "legal"])
def test_readme_has_the_verdict_and_the_picture_of_a_run(name: str, tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert verdict(read_run(REPORTS / name)) in flat(readme)
    assert f"(docs/report-{name}.png)" in readme
    assert (ROOT / "docs" / f"report-{name}.png").stat().st_size > 10_000
    text = report([REPORTS / name], tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<figure ") >= 12


def test_results_have_the_verdict_and_the_picture_of_a_run_with_experts(tmp_path: Path) -> None:
    results = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    assert verdict(read_run(REPORTS / "experts")) in flat(results)
    assert "(report-experts.png)" in results
    assert (ROOT / "docs" / "report-experts.png").stat().st_size > 10_000
    text = report([REPORTS / "experts"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Where tokens go" in text


def test_the_table_of_a_regression_is_what_the_command_prints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    doc = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    command = re.search(r"`slimtune (check docs/reports/regressed [^`]*)`", flat(doc))
    assert command is not None
    result = CliRunner().invoke(app, command.group(1).split())
    assert result.exit_code == 1
    printed = "\n".join(line.rstrip() for line in result.stdout.splitlines()).strip()
    assert f"```text\n{printed}\n```" in doc
    gates = (REPORTS / "gates.yaml").read_text(encoding="utf-8").strip()
    assert f"```yaml\n{gates}\n```" in doc


def test_another_seed_holds_in_those_gates_and_fails_where_the_page_says() -> None:
    seed = [str(REPORTS / "seed-1"), "--baseline", str(REPORTS / "health")]
    assert CliRunner().invoke(app, ["check", *seed, "--gates", str(REPORTS / "gates.yaml")]).exit_code == 0
    result = CliRunner().invoke(app, ["check", *seed])
    assert "FAILED: 2 of 19 gates: speed.prefill_ms, rqe.accuracy" in flat(result.stdout)


def test_equal_widths_hold_in_those_gates_and_cost_perplexity_beyond_noise() -> None:
    uniform = [str(REPORTS / "uniform"), "--baseline", str(REPORTS / "health")]
    assert CliRunner().invoke(app, ["check", *uniform, "--gates", str(REPORTS / "gates.yaml")]).exit_code == 0
    assert "FAILED: 2 of 19 gates: speed.prefill_ms, ppl" in flat(CliRunner().invoke(app, ["check", *uniform]).stdout)
    run = read_run(REPORTS / "uniform")
    assert run.plan is not None
    assert run.recipe["budget"]["layout"] == "uniform"
    assert len({tuple(map(len, kept.values())) for kept in run.plan.kept}) == 1
    assert f"{run.of('result')['ppl']:.2f} for 14.20" in (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
