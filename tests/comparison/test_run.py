"""A comparison from its file to rows: what is there is taken, what is missing is made."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import slimtune
from bases import Bench
from comparisons import stand_in, write_comparison
from slimtune.cli import app
from slimtune.comparison import launch, run
from slimtune.comparison.config import load
from slimtune.comparison.jobs import jobs_of
from slimtune.comparison.rows import Row, read
from slimtune.errors import UserError


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that says which runs were started."""
    monkeypatch.setattr(launch, "TUNE", (*stand_in(tmp_path), "tune"))
    return tmp_path / "out" / "starts"


def ppl(rows: list[Row]) -> dict[tuple[str, float, int], tuple[float, float | None]]:
    mine = [row for row in rows if row["metric"] == "domain_ppl"]
    return {(row["method"], row["keep"], row["seed"]): (row["value"], row["dense_value"]) for row in mine}


def test_rows_of_all_runs_joined_to_dense_lora(tmp_path: Path, fake: Path) -> None:
    lines: list[str] = []
    rows = slimtune.compare(write_comparison(tmp_path), jobs=2, say=lines.append)
    assert ppl(rows) == {
        ("atp", 0.8, 0): (16.0, 10.0),
        ("atp", 0.8, 1): (17.0, 11.0),
        ("atp", 0.6, 0): (17.0, 10.0),
        ("atp", 0.6, 1): (18.0, 11.0),
        ("dense_lora", 1.0, 0): (10.0, 10.0),
        ("dense_lora", 1.0, 1): (11.0, 11.0),
    }
    assert rows == read(tmp_path / "out" / "rows.json")
    assert len(lines) == 6
    assert lines[0].startswith("[1/6] ")
    assert "about" in lines[0]
    assert "about" not in lines[-1]
    assert any("atp 0.6 seed 1: perplexity 18.00 (base 40.00)" in line for line in lines)


def test_what_is_there_is_not_run_again(tmp_path: Path, fake: Path) -> None:
    file, lines = write_comparison(tmp_path), []
    first = slimtune.compare(file, only=["atp"], seeds=[0], say=lines.append)
    assert fake.read_text().split() == ["atp-0.8-0", "atp-0.6-0"]
    rows = slimtune.compare(file, keep=[0.6], seeds=[0], say=lines.append)
    assert fake.read_text().split()[2:] == ["dense_lora-0"]
    assert len(ppl(first)) == 2  # rows of the earlier call stay
    assert set(ppl(rows)) == {("atp", 0.8, 0), ("atp", 0.6, 0), ("dense_lora", 1.0, 0)}
    (tmp_path / "out" / "rows.json").unlink()  # folders alone are enough ...
    assert ppl(slimtune.compare(file, seeds=[0], say=lines.append)) == ppl(rows)
    shutil.rmtree(tmp_path / "out" / "atp-0.8-0")  # ... and so are rows alone, made on another machine
    assert ppl(slimtune.compare(file, seeds=[0], say=lines.append)) == ppl(rows)
    assert len(fake.read_text().split()) == 3
    assert lines[-1] == "3 of 3 runs are there already, made by the same words and the same program"


def test_other_words_or_another_program_are_run_again(tmp_path: Path, fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only: dict[str, Any] = {"only": ["atp"], "keep": [0.6], "seeds": [0]}
    slimtune.compare(write_comparison(tmp_path), **only)
    slimtune.compare(write_comparison(tmp_path, set={"lora.rank": 5}), **only)
    assert fake.read_text().split() == ["atp-0.6-0"] * 2
    for module in (run, launch):
        monkeypatch.setattr(module, "program", lambda: "another")
    rows = slimtune.compare(tmp_path / "comparison.yaml", **only)
    assert fake.read_text().split() == ["atp-0.6-0"] * 3
    assert {row["program"] for row in rows} == {"another"}


def test_a_failed_run_is_a_row_and_the_rest_goes_on(tmp_path: Path, fake: Path) -> None:
    lines: list[str] = []
    methods = {"unlucky": {"lora.rank": 13}, "atp": {}}
    rows = slimtune.compare(write_comparison(tmp_path, methods=methods, keep=0.6, seeds=0), say=lines.append)
    assert {(row["method"], row["value"]) for row in rows if row["metric"] == "failed"} == {
        ("unlucky", "error: rank 13 is unlucky")
    }
    assert set(ppl(rows)) == {("atp", 0.6, 0)}
    assert f"failed, see {tmp_path / 'out' / 'unlucky-0.6-0.log'}" in lines[0]


def test_a_run_without_numbers_fails_and_so_does_what_reads_it(tmp_path: Path, fake: Path) -> None:
    with (tmp_path / "fake_tune.py").open("a") as file:
        file.write(f'if words.get("lora.rank") == "30":\n    {DIVERGES}\n')
    taught = {"distill": {"weight": 1, "teacher": "{out}/wild-{seed}/model"}}
    methods = {"wild": {"method": "finetune", "lora.rank": 30}, "taught": taught, "atp": {}}
    file, lines = write_comparison(tmp_path, methods=methods, keep=0.6, seeds=0), []
    for _ in range(2):
        rows = slimtune.compare(file, say=lines.append)
        (failed,) = (row for row in rows if row["metric"] == "failed")
        assert (failed["method"], failed["value"]) == ("wild", f"{NO_NUMBERS}: lower train.lr, or train.precision=float32")
        assert set(ppl(rows)) == {("atp", 0.6, 0)}
        json.loads((tmp_path / "out" / "rows.json").read_text(), parse_constant=pytest.fail)
    assert fake.read_text().split() == ["wild-0", "atp-0.6-0"]  # the same words would make the same again
    assert any(f"] wild seed 0: failed: {NO_NUMBERS}: " in line for line in lines)
    assert any("taught 0.6 seed 0: not started: it reads wild seed 0 (failed: its figures" in line for line in lines)


DIVERGES = '(out / "summary.json").write_text(json.dumps({**summary, "result": {**result, "ppl": float("nan")}}))'
NO_NUMBERS = "its figures are no numbers (perplexity nan)"


def test_nothing_runs_when_something_is_wrong(tmp_path: Path, fake: Path) -> None:
    file = write_comparison(tmp_path)
    with pytest.raises(UserError, match="--jobs 0"):
        slimtune.compare(file, jobs=0)
    with pytest.raises(UserError, match=r"cannot be (created|written)"):
        slimtune.compare(file, out=file)
    with pytest.raises(UserError, match="cannot be written"):
        slimtune.compare(file, rows=file / "rows.json")
    with pytest.raises(UserError, match=r"methods.late: unknown key"):
        slimtune.compare(write_comparison(tmp_path, methods={"atp": {}, "late": {"lora.rnk": 1}}))
    assert not fake.exists()


def test_an_interrupt_between_two_runs_stops_the_others(tmp_path: Path, fake: Path) -> None:
    methods = {"atp": {}, "endless": {"lora.rank": 99}}
    file = write_comparison(tmp_path, methods=methods, keep=0.6, seeds=0)
    pid = tmp_path / "out" / "endless-0.6-0" / "pid"

    def interrupted(_: str) -> None:
        while not pid.is_file() or not pid.read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        slimtune.compare(file, jobs=2, say=interrupted)
    assert caught.value is not None  # which holds the frames
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert set(ppl(read(tmp_path / "out" / "rows.json"))) == {("atp", 0.6, 0)}


def test_as_many_runs_side_by_side_as_gpus_unless_told_otherwise() -> None:
    assert [run.side_by_side(*words) for words in ((None, []), (None, ["0", "1"]), (3, ["0", "GPU-5b1f"]))] == [1, 2, 3]


def test_the_time_left_is_that_of_runs_which_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    job, clock = jobs_of(load(write_comparison(tmp_path)))[0], run._Clock(4, 1)
    other, made = launch.Ended(job, None, 0.0, "left to another call"), launch.Ended(job, None, 40.0)
    assert clock.line(other) == "[1/4] atp 0.8 seed 0: left to another call"
    now[0] = 40.0
    assert clock.line(made) == "[2/4] atp 0.8 seed 0: stopped from outside, 40 s; about 80 s left"
    assert clock.line(other) == "[3/4] atp 0.8 seed 0: left to another call; about 40 s left"
    assert clock.line(made) == "[4/4] atp 0.8 seed 0: stopped from outside, 40 s"


def test_the_time_left_counts_the_runs_beside_the_first_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    job, clock = jobs_of(load(write_comparison(tmp_path)))[0], run._Clock(101, 10)
    now[0] = 40.0
    assert clock.line(launch.Ended(job, None, 40.0)).endswith("40 s; about 7 min left")  # not 100 times 40 s
    for second in range(1, 20):  # two rounds of ten, the second twice as slow, for what they share
        now[0] = 40.0 if second < 10 else 120.0
        line = clock.line(launch.Ended(job, None, 40.0 if second < 10 else 80.0))
    assert line.endswith("80 s; about 8 min left")  # 81 runs at 20 in 120 s


@pytest.mark.parametrize(("seconds", "text"), [(3, "3 s"), (300, "5 min"), (12_000, "3 h 20 min")])
def test_durations(seconds: float, text: str) -> None:
    assert run.duration(seconds) == text


def test_two_methods_of_a_tiny_model(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a process of its own, the other by the same words in this one: imports take longer than such a run."""
    wait = launch.Launcher._wait

    def wait_or_run(self: launch.Launcher, words: list[str], log: Path, gpu: str, lock: tuple[int, ...]) -> int | None:
        if log.name.startswith("dense_lora"):
            return wait(self, words, log, gpu, lock)
        assert tuple(words[:4]) == launch.TUNE
        result = CliRunner().invoke(app, words[3:])
        log.write_text(result.output)
        return result.exit_code

    monkeypatch.setattr(launch.Launcher, "_wait", wait_or_run)
    file = write_comparison(tmp_path, keep=0.7, seeds=0)
    (tmp_path / "recipe.yaml").write_text(bench.recipe(tmp_path / "unused").to_yaml())
    rows = slimtune.compare(file, threads=1)
    assert not [row["value"] for row in rows if row["metric"] == "failed"]
    figures = {(row["method"], row["metric"]): row for row in rows}
    metrics = ("domain_ppl", "valid_ppl", "parameters")
    assert set(figures) == {(method, metric) for method in ("atp", "dense_lora") for metric in metrics}
    atp, dense = figures["atp", "domain_ppl"], figures["dense_lora", "domain_ppl"]
    assert atp["dense_value"] == dense["value"]
    assert figures["atp", "parameters"]["value"] < figures["dense_lora", "parameters"]["value"]
    assert json.loads((tmp_path / "out" / "atp-0.7-0" / "summary.json").read_text())["keep"] == 0.7
    # equal cost: (4 + 4) x 4 windows of tuning and 4 x 4 of decisions are 12 steps of 4; packed windows differ in tokens
    assert dense["tokens"] == pytest.approx(atp["tokens"], rel=0.05)
