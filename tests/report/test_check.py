"""Runs held to gates: which row fails, what is left out, exit codes, and what CI servers get."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from bases import Bench
from runs import bench_of, ruling, write_run
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.pipeline import tune
from slimtune.report.check import check, noise, resolve
from slimtune.report.run import read_run
from slimtune.report.verdicts import junit, markdown


def failed(found: Any) -> list[str]:
    return [ruling.figure for ruling in found.failed]


def windows(folder: Path, numbers: list[float], digest: str = "same") -> None:
    (folder / "windows.json").write_text(json.dumps({"windows": digest, "numbers": numbers}))


def test_a_run_holds_beside_itself_and_each_worse_figure_is_named(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good")
    assert check(write_run(tmp_path / "same"), good).failed == []
    # beyond both intervals: 0.03 and 0.03 make 0.0424
    assert failed(check(write_run(tmp_path / "a", changes=_accuracy(0.68 - 0.042)), good)) == []
    assert failed(check(write_run(tmp_path / "b", changes=_accuracy(0.68 - 0.043)), good)) == ["pubmedqa.accuracy"]
    assert failed(check(write_run(tmp_path / "c", changes={"parameters": 607_000}), good)) == ["parameters"]
    assert failed(check(write_run(tmp_path / "d", changes={"valid_ppl": 16.5 * 1.021}), good)) == ["valid_ppl"]
    bits = {"wikitext2.bits_per_byte": 1.33, "wikitext2.bits_per_byte_low": 1.31, "wikitext2.bits_per_byte_high": 1.35}
    assert failed(check(write_run(tmp_path / "e", changes=bits), good)) == ["wikitext2.bits_per_byte"]
    better = write_run(tmp_path / "f", changes={**_accuracy(0.9), "ppl": 3.0, "valid_ppl": 3.0, "parameters": 10})
    assert check(better, good).failed == []


def _accuracy(value: float) -> dict[str, float]:
    return {"pubmedqa.accuracy": value, "pubmedqa.accuracy_low": value - 0.03, "pubmedqa.accuracy_high": value + 0.03}


def test_slower_against_its_own_base_is_a_regression(tmp_path: Path) -> None:
    good, slow = write_run(tmp_path / "good"), write_run(tmp_path / "slow")
    (slow / "bench.json").write_text(json.dumps(bench_of(600_000, 1_000_000, faster=1.5 * 0.89)))
    names = ["speed.decode_faster", "speed.first_token_faster", "speed.prefill_faster"]
    assert failed(check(slow, good)) == names


def test_noise_of_the_perplexity_is_that_of_pairs_of_windows(tmp_path: Path) -> None:
    rng = random.Random(0)
    shared = [rng.gauss(0, 1) for _ in range(100)]
    good, worse = write_run(tmp_path / "good"), write_run(tmp_path / "worse", changes={"ppl": 16.5})
    assert noise("ppl", read_run(worse), read_run(good)) == pytest.approx(1.959964 * math.hypot(0.2, 0.2))
    assert check(worse, good).failed == []  # 0.5 for a noise of 0.55
    windows(good, shared)
    windows(worse, [number + rng.gauss(0, 0.05) for number in shared])
    other = json.loads((worse / "windows.json").read_text())["numbers"]
    squares = sum((a - b) ** 2 for a, b in zip(shared, other, strict=True))
    by_hand = 1.959964 * math.sqrt(squares / 99 / 100) * 16.5
    assert noise("ppl", read_run(worse), read_run(good)) == pytest.approx(by_hand)
    assert by_hand < 0.5
    assert failed(check(worse, good)) == ["ppl"]
    windows(worse, other, "other")  # other windows cannot be paired
    assert check(worse, good).failed == []


def test_other_test_data_fail_for_figures_do_not_compare(tmp_path: Path) -> None:
    good, other = write_run(tmp_path / "good"), write_run(tmp_path / "other")
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "data": {"test": "ff" * 32}}))
    assert failed(check(other, good)) == ["data.test"]
    assert failed(check(other, good, {"ppl": "<= 20"})) == ["data.test"]
    assert check(other, None, {"ppl": "<= 20"}).failed == []


def test_tasks_with_other_rows_fail_where_a_gate_is_on_them(tmp_path: Path) -> None:
    good, other = write_run(tmp_path / "good"), write_run(tmp_path / "other")
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps({**summary, "task_rows": {"pubmedqa": "ff" * 32}}))
    found = check(other, good)
    assert failed(found) == ["data.pubmedqa"]
    assert "| **FAILED** | data.pubmedqa | other |  | the same in both runs |" in markdown(found)
    assert "data.pubmedqa: test data of other against good are not the same" in junit(found)
    assert check(other, good, {"ppl": "<= 20"}).failed == []


def test_where_nothing_says_on_which_data_a_run_was_measured_that_is_told(tmp_path: Path) -> None:
    good, old = write_run(tmp_path / "good"), write_run(tmp_path / "old")
    summary = json.loads((old / "summary.json").read_text())
    (old / "summary.json").write_text(json.dumps({name: value for name, value in summary.items() if name != "data"}))
    for pair in ((good, old), (old, good)):
        assert "Whether both were measured on the same test data is not known" in markdown(check(*pair))
    assert "is not known" not in markdown(check(write_run(tmp_path / "same"), good))
    assert "is not known" not in markdown(check(old, None, {"ppl": "<= 20"}))


def test_speeds_are_compared_of_the_same_way_to_run(tmp_path: Path) -> None:
    good, slow = write_run(tmp_path / "good"), write_run(tmp_path / "slow")
    found = bench_of(600_000, 1_000_000)
    for ratio in found["ratios"]:
        ratio["faster"] = 2.0 if ratio["how"] == "graph" else 1.5
    (good / "bench.json").write_text(json.dumps(found))
    eager = {**found, "ratios": [ratio for ratio in found["ratios"] if ratio["how"] == "eager"]}
    (slow / "bench.json").write_text(json.dumps(eager))
    compared = check(slow, good)
    assert compared.failed == []
    assert compared.values["speed.decode_faster"] == 1.5
    assert check(good, None, {"speed.decode_faster": ">= 1.9"}).failed == []


def test_a_bench_of_the_result_alone_says_nothing_of_its_base(tmp_path: Path) -> None:
    run, found = write_run(tmp_path / "run"), bench_of(600_000, 1_000_000)
    alone = {"models": found["models"][:1], "rows": [row for row in found["rows"] if row["model"] == "run"], "ratios": []}
    (run / "bench.json").write_text(json.dumps({**found, **alone}))
    assert failed(check(run, None, {"speed.decode_ms": "<= dense"})) == ["speed.decode_ms"]


def test_gates_of_ones_own_take_the_place_of_the_default_ones(tmp_path: Path) -> None:
    good, run = write_run(tmp_path / "good"), write_run(tmp_path / "run", changes={"ppl": 16.4})
    gates = {
        "ppl": "<= 1.02 x baseline",
        "healthcare.pubmedqa.accuracy": ">= 0.97 x dense_lora",
        "general.bits_per_byte": "<= base + 0.05",
        "speed.decode_ms": "<= 8",
    }
    found = check(run, good, gates)
    assert [ruling.figure for ruling in found.rulings] == [
        "data.test",
        "ppl",
        "pubmedqa.accuracy",
        "wikitext2.bits_per_byte",
        "speed.decode_ms",
    ]
    # 16.4 of 16.32; 0.68 of 0.679; 1.3 of 1.25; 6.67 of 8
    assert failed(found) == ["ppl", "wikitext2.bits_per_byte"]
    assert [ruling.limit for ruling in found.rulings][1:] == pytest.approx([16.32, 0.679, 1.25, 8])
    (run / "bench.json").unlink()
    assert failed(check(run, good, gates))[-1] == "speed.decode_ms"


def test_guards_of_the_recipe_hold_beside_the_default_gates(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good")
    run = write_run(tmp_path / "run", guard={"ppl": "<= 0.3 x dense", "pubmedqa.accuracy": ">= 0.6"})
    assert failed(check(run)) == ["ppl"]
    found = check(run, good)
    assert failed(found) == ["ppl"]
    assert {"ppl", "valid_ppl", "parameters"} <= {ruling.figure for ruling in found.rulings}


def test_what_was_not_measured_fails_a_gate_and_is_told_where_none_asks(tmp_path: Path) -> None:
    good, run = write_run(tmp_path / "good"), write_run(tmp_path / "run", bench=False)
    found = check(run, good)
    assert found.failed == []
    assert found.left_out == ["speed.decode_faster", "speed.first_token_faster", "speed.prefill_faster"]
    asked = check(run, good, {"speed.decode_faster": ">= 1.2"})
    assert failed(asked) == ["speed.decode_faster"]
    assert asked.failed[0].value is None


def test_a_summary_alone_is_a_baseline(tmp_path: Path) -> None:
    good, kept = write_run(tmp_path / "good"), tmp_path / "kept"
    kept.mkdir()
    (kept / "summary.json").write_bytes((good / "summary.json").read_bytes())
    run = write_run(tmp_path / "run", changes={"valid_ppl": 20.0})
    assert failed(check(run, kept)) == failed(check(run, kept / "summary.json")) == ["valid_ppl"]


def test_a_summary_alone_is_held_to_the_guards_that_it_tells_of(tmp_path: Path) -> None:
    run, good = write_run(tmp_path / "run"), write_run(tmp_path / "good")
    summary = json.loads((run / "summary.json").read_text())
    broken = ruling(condition="<= 0.3 x dense", value=16.0, limit=6.0, holds=False)
    (run / "summary.json").write_text(json.dumps({**summary, "guard": [broken]}))
    (run / "recipe.yaml").unlink()
    assert failed(check(run)) == ["ppl"]
    assert failed(check(run, good)) == ["ppl"]
    assert check(run, good, {"parameters": "<= baseline"}).failed == []  # what is asked for takes their place


def test_a_run_with_an_injected_regression_fails_with_its_row(bench: Bench, tmp_path: Path) -> None:
    """Two real runs, the second with a learning rate that ruins it."""
    steps: dict[str, Any] = {"recover__steps": 60, "train__lr": 1e-2}
    tune(bench.recipe(tmp_path / "good", **steps))
    tune(bench.recipe(tmp_path / "again", seed=1, **steps))
    tune(bench.recipe(tmp_path / "worse", **{**steps, "train__lr": 5.0}))
    result = CliRunner().invoke(app, ["check", str(tmp_path / "worse"), "--baseline", str(tmp_path / "good")])
    assert result.exit_code == 1
    rows = {
        line.split()[1]: line.split()[0] for line in result.stdout.splitlines() if line.strip().startswith(("ok", "FAILED "))
    }
    assert rows == {"data.test": "ok", "ppl": "FAILED", "valid_ppl": "FAILED", "parameters": "ok", "bytes": "ok"}
    assert "FAILED: 2 of 5 gates: ppl, valid_ppl" in result.stdout
    gates = ["--gate", "ppl=<= 1.2 x baseline", "--gate", "parameters=<= 1.01 x baseline"]
    for run, code in (("again", 0), ("worse", 1)):
        assert (
            CliRunner().invoke(app, ["check", str(tmp_path / run), "--baseline", str(tmp_path / "good"), *gates]).exit_code
            == code
        )


def test_junit_xml_markdown_and_json(tmp_path: Path) -> None:
    good = write_run(tmp_path / "good")
    run = write_run(tmp_path / "a|b <c>", changes={"valid_ppl": 20.0}, guard={"ppl": "<= dense"})
    files = [str(tmp_path / name) for name in ("j.xml", "m.md", "c.json")]
    options = [item for pair in zip(("--junit", "--markdown", "--json"), files, strict=True) for item in pair]
    result = CliRunner().invoke(app, ["check", str(run), "--baseline", str(good), *options])
    assert result.exit_code == 1
    root = ElementTree.parse(files[0]).getroot()
    suite = root[0]
    assert (root.tag, suite.tag, suite.get("failures"), suite.get("errors")) == ("testsuites", "testsuite", "1", "0")
    assert root.keys() == ["name", "tests", "failures", "errors", "time"]  # strict readers take no others there
    assert int(suite.get("tests", "0")) == len(suite.findall("testcase"))
    names = [f"{case.get('classname')} {case.get('name')}" for case in suite]
    assert len(names) == len(set(names))
    (bad,) = (case for case in suite if case.find("failure") is not None)
    assert bad.get("name") == "valid_ppl"  # whatever its bound: a server knows a case by its name
    assert {"slimtune.a|b <c> ppl", "slimtune.a|b <c>.default ppl"} <= set(names)  # the recipe's guard, and the default gate
    assert bad.findtext("system-out", "").splitlines()[:2] == ["bound = <= 1.02 x baseline", "value = 20.0"]
    assert bad.find("failure").get("message") == "valid_ppl is 20, to be <= 1.02 x baseline = 16.83"  # type: ignore[union-attr]
    text = Path(files[1]).read_text()
    assert text.startswith("### slimtune check: a\\|b &lt;c> against good: **1 of ")
    assert "| **FAILED** | valid\\_ppl | 20.00 | 16.50 | &lt;= 1.02 x baseline = 16.83 |" in text
    assert [line.count(" | ") for line in text.splitlines() if line.startswith("|")] == [4] * text.count("\n| ")
    found = json.loads(Path(files[2]).read_text())
    assert (found["passed"], found["run"], found["baseline"]) == (False, "a|b <c>", "good")
    assert found["test_data_unknown"] is False
    assert [row["figure"] for row in found["rows"] if not row["holds"]] == ["valid_ppl"]
    printed = CliRunner().invoke(app, ["check", str(run), "--baseline", str(good), "--markdown", "-"])
    assert printed.stdout == text
    assert "FAILED" not in markdown(check(good, None, {"ppl": "<= 99"}))
    assert "<failure" not in junit(check(good, None, {"ppl": "<= 99"}))


def test_names_of_gates() -> None:
    known = ["ppl", "pubmedqa.accuracy", "rqe.accuracy", "wikitext2.bits_per_byte", "mine.cited", "ppl_se"]
    assert resolve("healthcare.accuracy", known) == ["pubmedqa.accuracy", "rqe.accuracy"]
    assert resolve("healthcare.rqe.accuracy", known) == ["rqe.accuracy"]
    assert resolve("mine.cited", known) == ["mine.cited"]
    with pytest.raises(
        UserError, match=r"no run has such a figure\. Did you mean 'rqe\.accuracy'\? Figures: ppl, pubmedqa"
    ) as caught:
        resolve("rqe.acuracy", known)
    assert "ppl_se" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "nothing to check: the recipe of run has no guard; give --baseline RUN2"),
        (["run", "--baseline", "absent"], "does not exist; give the folder of a run"),
        (["run", "--baseline", "run"], "is given twice"),
        (["going", "--gate", "ppl=<= 3"], "is not finished: it has no summary.json"),
        (["run", "--gate", "ppl"], "is not of the form FIGURE=CONDITION"),
        (["run", "--gate", "ppl=<= 3", "--gate", "ppl=>= 1"], "--gate ppl is given twice; give one condition a figure"),
        (["run", "--gate", "ppl=1.02 x baseline"], "does not begin with <=, >=, < or >"),
        (["run", "--gate", "ppl=<= baseline"], "is relative to a baseline; give one with --baseline RUN2"),
        (["run", "--gate", "pplx=<= 3"], "Did you mean 'ppl'"),
        (["run", "--gates", "absent.yaml"], "--gates 'absent.yaml' does not exist"),
        (["run", "--gates", "empty.yaml"], "holds no gate; write e.g. ppl:"),
        (["run", "--gates", "odd.yaml"], "ppl: 3 is no condition; write e.g. ppl:"),
        (["run", "--gate", "ppl=<= 99", "--junit", "no/such/file.xml"], "no/such'; make it, or name another file"),
        (["run", "--gate", "ppl=<= 99", "--junit", "-"], "JUnit XML and others need a file"),
        (["run", "--gate", "ppl=<= 99", "--json", "-", "--markdown", "-"], "can be printed with -"),
    ],
)
def test_bad_input_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    write_run(Path("going"), finished=False)
    Path("empty.yaml").write_text("")
    Path("odd.yaml").write_text("ppl: 3\n")
    result = CliRunner().invoke(app, ["check", *arguments])
    assert result.exit_code == 2
    told = " ".join(result.stderr.split())
    assert told.startswith("error: ")
    assert message in told
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_check_that_cannot_be_made_is_an_error_for_a_server_and_replaces_an_earlier_file(tmp_path: Path) -> None:
    run, file = write_run(tmp_path / "run"), tmp_path / "check.xml"
    words = ["check", str(run), "--junit", str(file), "--gate"]
    assert CliRunner().invoke(app, [*words, "ppl=<= 99"]).exit_code == 0
    assert CliRunner().invoke(app, [*words, "pplx=<= 99"]).exit_code == 2
    suite = ElementTree.parse(file).getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1")
    assert "Did you mean 'ppl'?" in suite[0].find("error").get("message", "")  # type: ignore[union-attr]


def test_a_failure_of_ours_does_not_read_as_a_gate_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("slimtune.report.check.read_run", broken)
    file = tmp_path / "check.xml"
    file.write_text("of an earlier check")
    words = ["check", str(write_run(tmp_path / "run")), "--gate", "ppl=<= 3", "--junit", str(file)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "ZeroDivisionError" in result.stderr
    assert ElementTree.parse(file).getroot()[0].get("errors") == "1"


def test_gates_from_a_file(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for text in ('ppl: "<= 10"\npubmedqa.accuracy: ">= 0.5"\n', 'guard:\n  ppl: "<= 10"\n  pubmedqa.accuracy: ">= 0.5"\n'):
        (tmp_path / "gates.yaml").write_text(text)
        assert failed(check(run, file=tmp_path / "gates.yaml")) == ["ppl"]
    assert check(run, gates={"ppl": "<= 20"}, file=tmp_path / "gates.yaml").failed == []  # the command line's comes last
