"""Whole runs held to bounds: what they tell, where they stop, how they go on, and what they leave."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from bases import Bench, metrics, sentences, stored_shapes, write_rows
from guard.loopback import webhook
from slimtune import appraisal, pipeline
from slimtune.cli import app
from slimtune.errors import UserError
from slimtune.pipeline import tune
from slimtune.train.judgement import Breach
from warm import Loaded

EVERY: dict[str, Any] = {"evaluate__every": 2}
NEVER, ALWAYS = "<= 0.5 x dense", "<= 2 x dense"
"""Conditions on a perplexity that such a short run does not meet, and meets."""
SHORT: dict[str, Any] = {"prompt": 8, "context": 8, "steps": 2, "repeats": 1}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-check is a sixth of such a run, and tested elsewhere."""
    monkeypatch.setattr(pipeline, "self_check", lambda config, seed: 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)


def model_files(out: Path) -> dict[str, str]:
    """Hash of every file of the written model but the card, which tells times."""
    files = [path for path in sorted((out / "model").iterdir()) if path.name != "README.md"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps(out: Path) -> list[dict[str, Any]]:
    return [row for row in metrics(out) if "step" in row and row["stage"] == "main"]


def breached(out: Path) -> dict[tuple[str, int], list[str]]:
    return {(row["phase"], row["step"]): row["breached"] for row in steps(out) if "breached" in row}


def said(capsys: pytest.CaptureFixture[str], word: str = "guard") -> list[str]:
    """Lines of stderr that begin so; the console breaks them at 80 columns, which tests make wider."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith(word)]


@pytest.fixture(scope="module")
def plain(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without guards, in evaluations as the others."""
    out = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "self_check", lambda config, seed: 0.0)
        tune(bench.recipe(out, **EVERY))
    return out


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


# --- while a run goes on -------------------------------------------------------------------------------------------------


def test_breaches_stand_in_the_rows_and_are_told_once(
    bench: Bench, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    valid = [row["valid_ppl"] for row in steps(plain) if "valid_ppl" in row]
    assert len(valid) == 4
    between = f"<= {sorted(valid)[1] + 1e-6}"  # two of the four are within
    with webhook() as server:
        summary = tune(
            bench.recipe(tmp_path, guard={"ppl": between, "loss": "> 0"}, alarm={"webhook": server.address}, **EVERY)
        )
    out = [(row["phase"], row["step"]) for row in steps(plain) if row.get("valid_ppl", 0) > sorted(valid)[1] + 1e-6]
    assert len(out) == 2
    assert breached(tmp_path) == {key: ["ppl"] for key in out}
    told = said(capsys)
    events = [payload for *_, payload in server.heard]
    assert [(event["event"], event["phase"]) for event in events] == expected_events(valid, between, summary)
    assert len(told) == len(events) + 2  # and both verdicts below the table
    assert model_files(tmp_path) == model_files(plain)  # a guard changes nothing that is learned


def expected_events(valid: list[float], bound: str, summary: dict[str, Any]) -> list[tuple[str, str]]:
    """By the figures alone: a change is an event, and at the end a breach is told again."""
    limit, within, found = float(bound[3:]), True, []
    for value, phase in zip(valid, ("search", "search", "recover", "recover"), strict=True):
        if (value <= limit) != within:
            found.append(("recovered" if value <= limit else "breach", phase))
        within = value <= limit
    at_end = summary["result"]["ppl"] <= limit
    return [*found, *([] if at_end and within else [("recovered" if at_end else "breach", "end")])]


def test_a_run_that_stopped_goes_on_as_the_one_that_had_no_guard(bench: Bench, plain: Path, tmp_path: Path) -> None:
    guard = {"guard": {"ppl": NEVER}, **EVERY}
    with pytest.raises(Breach, match=r"ppl is .*, to be <= 0\.5 x dense = .*, at step 2 of search\. The run stopped"):
        tune(bench.recipe(tmp_path, alarm={"then": "stop"}, **guard))
    assert breached(tmp_path) == {("search", 1): ["ppl"]}
    assert metrics(tmp_path)[-1] == {"checkpoint": ["main", "search", 2]}
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(Breach, match=r"at step 4 of search"):
        tune(bench.recipe(tmp_path, alarm={"then": "stop"}, **guard), resume=True)
    summary = tune(bench.recipe(tmp_path, alarm={"then": "warn"}, **guard), resume=True)
    assert summary["resumed"]
    whole = json.loads((plain / "summary.json").read_text())
    assert summary["plan"] == whole["plan"]
    assert model_files(tmp_path) == model_files(plain)
    assert [{**row, "breached": None} for row in steps(tmp_path)] == [{**row, "breached": None} for row in steps(plain)]


@pytest.mark.parametrize(("begin", "first"), [("recover", [("recover", 1), ("recover", 3)]), ("end", [])])
def test_from_which_phase_on(begin: str, first: list[tuple[str, int]], bench: Bench, tmp_path: Path) -> None:
    summary = tune(bench.recipe(tmp_path, guard={"ppl": NEVER}, alarm={"begin": begin}, **EVERY))
    assert list(breached(tmp_path)) == first
    assert [ruling["holds"] for ruling in summary["guard"]] == [False]
    stages = json.loads((tmp_path / "stages.json").read_text())
    assert ("valid" in stages) == (begin == "recover")  # what no step is held to is not measured


def test_references_are_figures_on_the_same_rows(bench: Bench, tmp_path: Path) -> None:
    """At steps validation figures with validation figures, at the end test figures with test figures."""
    guard = {"ppl": "<= 2 x dense_lora - 1.5 x dense", "bytes": "<= 0.9 x dense", "seconds": "<= 1000 x dense_lora"}
    with webhook() as server:
        keys = {"guard": guard, "alarm": {"webhook": server.address}, "evaluate__dense_lora": True}
        summary = tune(bench.recipe(tmp_path, **keys, **EVERY))
    valid = json.loads((tmp_path / "stages.json").read_text())["valid"]
    assert set(valid) == {"dense", "dense_lora"}
    for word, name in (("dense", "base"), ("dense_lora", "dense_lora")):
        assert valid[word]["ppl"] == pytest.approx(summary[name]["valid_ppl"])  # all windows of the split are few enough
        assert valid[word]["ppl"] != pytest.approx(summary[name]["ppl"])
    first, *_, last = [payload for *_, payload in server.heard if payload["guard"] == "ppl"]
    assert first["relative_to"] == {word: valid[word]["ppl"] for word in valid}
    assert first["limit"] == pytest.approx(2 * valid["dense_lora"]["ppl"] - 1.5 * valid["dense"]["ppl"])
    assert (first["step"], first["value"]) == (1, steps(tmp_path)[1]["valid_ppl"])
    rulings = {ruling["guard"]: ruling for ruling in summary["guard"]}
    assert rulings["ppl"]["words"] == {"dense": summary["base"]["ppl"], "dense_lora": summary["dense_lora"]["ppl"]}
    assert (last["phase"], last["step"], last["value"]) == ("end", None, summary["result"]["ppl"])
    assert rulings["bytes"]["holds"]
    assert rulings["bytes"]["value"] == summary["result"]["bytes"]
    assert rulings["seconds"]["words"] == {"dense_lora": summary["dense_lora"]["seconds"]}


def test_a_guard_that_comes_with_a_resume(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is relative to is measured then, dense LoRA from its checkpoint; without that it is told."""
    keys = {"evaluate__dense_lora": True, **EVERY}
    first = {"guard": {"loss": "< 0.001"}, "alarm": {"then": "stop"}}
    with pytest.raises(Breach):
        tune(bench.recipe(tmp_path, **first, **keys))
    before, stages = metrics(tmp_path), json.loads((tmp_path / "stages.json").read_text())
    assert "valid" not in stages
    guard = {"guard": {"ppl": "<= dense_lora", "loss": "<= dense"}}
    kept = tmp_path / "checkpoint-dense_lora.pt"
    kept.rename(tmp_path / "away")
    with pytest.raises(
        UserError, match=r"came with --resume, and checkpoint-dense_lora\.pt is gone; leave such guards to the end"
    ):
        tune(bench.recipe(tmp_path, **guard, **keys), resume=True)
    (tmp_path / "away").rename(kept)
    summary = tune(bench.recipe(tmp_path, **guard, **keys), resume=True)
    assert metrics(tmp_path)[: len(before)] == before  # dense LoRA was not tuned again
    after = json.loads((tmp_path / "stages.json").read_text())
    assert {name: after[name] for name in ("base", "dense_lora")} == {name: stages[name] for name in ("base", "dense_lora")}
    for word, name in (("dense", "base"), ("dense_lora", "dense_lora")):
        assert after["valid"][word]["ppl"] == pytest.approx(summary[name]["valid_ppl"])
    monkeypatch.setattr(pipeline.Run, "_measure_base", lambda run: pytest.fail("measured again"))
    assert tune(bench.recipe(tmp_path, **guard, **keys), resume=True)["guard"] == summary["guard"]


# --- at the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("then", "code"), [("stop", 1), ("warn", 0)])
def test_the_command_line_at_the_end(then: str, code: int, bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path / "run", guard={"ppl": NEVER, "parameters": "<= 0.71 x dense"}, alarm={"then": then})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == code, done.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert stored_shapes(tmp_path / "run")
    assert (summary["speed"], (tmp_path / "run" / "bench.json").exists()) == ({}, False)  # no guard names a figure of speed
    assert [(ruling["guard"], ruling["holds"]) for ruling in summary["guard"]] == [("ppl", False), ("parameters", True)]
    lines = done.output.splitlines()
    assert sum(line.startswith("guard      BREACHED ppl is ") for line in lines) == 1
    assert sum(line.startswith("guard      holds    parameters is 93,440, to be <= 0.71 x dense = ") for line in lines) == 1
    error = [line for line in lines if line.startswith("error: guard: ppl is ")]
    assert len(error) == code
    assert all(line.endswith("The model is written; the run ends with exit code 1 (alarm.then=stop)") for line in error)


def test_the_command_line_when_a_run_stops_on_its_way(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path / "run", guard={"ppl": NEVER}, alarm={"then": "stop"}, **EVERY)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    done = CliRunner().invoke(app, ["tune", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == 1
    assert done.output.splitlines()[-1].startswith("error: guard: ppl is ")
    assert not (tmp_path / "run" / "model").exists()


def test_speed_is_timed_where_a_guard_names_it(bench: Bench, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    guard = {"speed.decode_ms": "<= 100 x dense", "speed.prefill_ms@2": "> 1e9", "speed.first_token_ms": "< 1e9"}
    keys = {"guard": guard, "evaluate__base": False, "speed": {**SHORT, "batches": [1, 2]}}
    summary = tune(bench.recipe(tmp_path, **keys))
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [each["path"] for each in found["models"]] == [str(tmp_path / "model"), bench.base]
    times = {(row["model"], row["what"], row["batch"]): row["ms"] for row in found["rows"]}
    run, base = (each["name"] for each in found["models"])
    assert summary["speed"]["result"]["speed.decode_ms"] == times[run, "decode", 1]
    assert summary["speed"]["base"]["speed.prefill_ms@2"] == times[base, "prefill", 2]
    assert [ruling["holds"] for ruling in summary["guard"]] == [True, False, True]
    assert summary["guard"][0]["words"] == {"dense": times[base, "decode", 1]}
    assert any(line.startswith("│ decode step ") for line in capsys.readouterr().err.splitlines())


def test_a_base_that_does_not_fit_beside_the_model_costs_the_speed_and_no_more(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(appraisal, "bench_model", full)
    summary = tune(bench.recipe(tmp_path, guard={"speed.decode_ms": "< 1e9"}, speed=SHORT))
    assert (summary["speed"], summary["guard"][0]["holds"], summary["guard"][0]["value"]) == ({}, False, None)
    monkeypatch.setattr(appraisal, "bench_model", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tune(bench.recipe(tmp_path, guard={"speed.decode_ms": "< 1e9"}, speed=SHORT), resume=True)


# --- found before it trains ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"guard": {"speed.decode_ms": "< 1"}}, r"made for 128 positions, and speed\.prompt=512 .* needs 544; give smaller"),
        ({"guard": {"memory": "< 1"}}, r"memory is counted on a GPU alone"),
        ({"guard": {"accuracy": "> 0.5"}}, r"no row of data\.test has choices"),
        ({"guard": {"valid_ppl": "< 5"}, "data__valid_fraction": 0.0}, r"data\.valid has no token"),
        ({"guard": {"ppl": "< 5"}, "alarm": {"webhook": "https://x/${NO_SUCH}"}}, r"variable NO_SUCH is not set"),
    ],
)
def test_what_a_run_will_not_have_is_an_error_before_it_begins(
    keys: dict[str, Any], message: str, bench: Bench, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        tune(bench.recipe(tmp_path / "run", **keys))
    assert not (tmp_path / "run").exists()


def test_a_variable_that_is_not_set_is_told_before_data_are_read(bench: Bench, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"guard": {"ppl": "< 5"}, "alarm": {"command": ["${NO_SUCH}"]}, "data__train": "not-there.jsonl"}
    with pytest.raises(UserError, match="variable NO_SUCH is not set"):
        tune(bench.recipe(tmp_path / "run", **keys))


def test_a_base_without_the_figure_is_an_error_before_it_trains(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "locate", lambda path: (path, False))  # of the hub: its bytes are not counted
    with pytest.raises(UserError, match=r"guard\.bytes: '<= dense' cannot be held: .* no finite 'bytes' on test rows"):
        tune(bench.recipe(tmp_path, guard={"bytes": "<= dense"}))
    assert not (tmp_path / "checkpoint-main.pt").exists()


# --- secrets -------------------------------------------------------------------------------------------------------------


def test_a_secret_is_nowhere_in_the_run_nor_in_what_is_sent(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALARM_TOKEN", "hunter2-4711")
    keep = f"import sys; open({str(tmp_path / 'event')!r}, 'a').write(sys.stdin.read())"
    command = [sys.executable, "-c", keep, "${ALARM_TOKEN}"]
    with webhook(500) as server:  # what fails is told
        alarm = {"webhook": f"{server.address}/${{ALARM_TOKEN}}", "command": command}
        tune(bench.recipe(tmp_path / "run", guard={"ppl": NEVER}, alarm=alarm, **EVERY))
    assert [path for _, path, *_ in server.heard] == ["/hunter2-4711"] * 2  # at a step and at the end
    sent = (tmp_path / "event").read_text() + json.dumps([payload for *_, payload in server.heard])
    assert sent.count('"breach"') == 4
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"recipe.yaml", "summary.json", "metrics.jsonl", "stages.json", "README.md"} <= {path.name for path in files}
    assert b"${ALARM_TOKEN}" in files[tmp_path / "run" / "recipe.yaml"]
    assert b"ALARM_TOKEN" not in files[tmp_path / "run" / "model" / "README.md"]
    told = "".join(capfd.readouterr())
    assert "alarm.webhook failed: HTTP 500; the run goes on" in told
    for text in (sent, told, *(content.decode(errors="ignore") for content in files.values())):
        assert "hunter2" not in text
        assert str(server.server_port) not in text or text in (files[tmp_path / "run" / "recipe.yaml"].decode(),)


# --- tasks ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``rqe``, which is a task of healthcare by its name, and one whose figures a function gives."""
    folder = tmp_path_factory.mktemp("tasks")
    texts = sentences(12, seed=3)
    rows = [
        {"prompt": text, "completion": [" yes", " no"][i % 2], "choices": [" yes", " no"], "label": i % 2}
        for i, text in enumerate(texts)
    ]
    for split, some in (("test", rows[:6]), ("valid", rows[6:])):
        write_rows(folder / f"rows-{split}.jsonl", some)
    source = "sources: [{path: 'rows-{split}.jsonl'}]\n"
    (folder / "rqe.yaml").write_text(f"metric: choice\n{source}")
    (folder / "letters.py").write_text(
        "def share(answer, row):\n    return {'share': len(answer) / 100, 'any': bool(answer)}\n"
    )
    (folder / "cited.yaml").write_text(f"metric: letters.py:share\ntokens: 2\n{source}")
    return [str(folder / "rqe.yaml"), str(folder / "cited.yaml")]


def test_guards_on_a_task_on_a_suite_and_on_figures_of_a_function(bench: Bench, tasks: list[str], tmp_path: Path) -> None:
    guard = {
        "rqe.accuracy": ">= 0",
        "healthcare.rqe.macro_f1": ">= 0.01 x dense - 1",
        "healthcare.accuracy": "> 1",
        "cited.share": "<= dense + 1",
        "cited.any": "> 2",
    }
    short = {"search__steps": 2, "recover__steps": 2}
    summary = tune(bench.recipe(tmp_path, guard=guard, evaluate__tasks=tasks, **EVERY, **short))
    assert breached(tmp_path) == {key: ["cited.any", "healthcare.accuracy"] for key in [("search", 1), ("recover", 1)]}
    rulings = {ruling["guard"]: ruling for ruling in summary["guard"]}
    assert {name: ruling["holds"] for name, ruling in rulings.items()} == {
        "rqe.accuracy": True,
        "healthcare.accuracy": False,
        "healthcare.rqe.macro_f1": True,
        "cited.share": True,
        "cited.any": False,
    }
    assert rulings["healthcare.accuracy"]["figure"] == "rqe.accuracy"
    assert rulings["healthcare.accuracy"]["value"] == summary["result"]["rqe.accuracy"]
    assert rulings["cited.share"]["words"] == {"dense": summary["base"]["cited.share"]}
    valid = json.loads((tmp_path / "stages.json").read_text())["valid"]["dense"]
    assert {"rqe.macro_f1", "cited.share"} <= set(valid)


@pytest.mark.parametrize("more", [{}, {"evaluate__base": False}, {"alarm": {"begin": "end"}}, {"evaluate__every": 0}])
def test_a_figure_that_a_function_does_not_give_is_an_error_before_it_trains(
    more: dict[str, Any], bench: Bench, tasks: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"task 'cited' has no 'shares'\. Did you mean 'share'\? Its figures: share, any"):
        tune(bench.recipe(tmp_path / "run", guard={"cited.shares": "> 0"}, evaluate__tasks=tasks[1:], **{**EVERY, **more}))
    assert not (tmp_path / "run").exists()


# --- several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(150)
def test_both_of_two_processes_stop_and_go_on(bench: Bench, loaded: Loaded, tmp_path: Path) -> None:
    """The second knows nothing of the figures of tasks: that the run ends, it hears of the first."""
    guard = {"guard": {"ppl": NEVER}, "alarm": {"then": "stop"}, **EVERY, "train__checkpoint_every": 3}
    (tmp_path / "recipe.yaml").write_text(bench.recipe(tmp_path / "run", **guard).to_yaml())
    worker = Path(__file__).parent / "guard" / "two_ranks.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = loaded.run([sys.executable, "-P", str(worker), str(tmp_path / "recipe.yaml")], env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert "at step 2 of search. The run stopped" in first["stopped"]
    assert "The model is written" in first["ended"]
    resumed = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert resumed["alarm"]["begin"] == "end"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["processes"], summary["guard"][0]["holds"]) == (2, False)
    assert math.isfinite(summary["speed"]["result"]["speed.decode_ms"])
