"""A run watched: what is read of its folder, how it is said to stand, what a frame shows, how the command ends."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bases import Bench
from runs import plan_of, write_run
from slimtune.cli import app
from slimtune.pipeline import tune
from slimtune.recipe import parse
from slimtune.report import glyphs, pace
from slimtune.report.follow import Tail, Watched
from slimtune.report.frame import frame
from slimtune.report.watch import BREACHED, BROKEN_OFF, FINE, watch
from slimtune.runtime import RunFolder
from slimtune.train.claim import place
from slimtune.train.loop import SEARCHES

Row = dict[str, Any]
UNITS = {"ffn": [100, 100, 100, 100], "kv_group": [4, 4, 4, 4]}
COSTS = {"tune": 150.0, "search": 40.0, "recover": 50.0}


def step(phase: str, number: int, stage: str = "main", **more: Any) -> Row:
    """A row: half a second a step."""
    return {
        "stage": stage,
        "phase": phase,
        "step": number,
        "adapt_loss": 3.0 - number / 10,
        "kept": 1.0,
        "seconds": 0.5,
        **more,
    }


def closing(number: int, **more: Any) -> Row:
    """A row of a search that closes gates."""
    widths = {"widths_ffn": [90 - number, 80, 70, 60], "widths_kv_group": [4, 3, 2, 1], "closed": 0.03, "reopened": 0.01}
    return step("search", number, decide_loss=3.5, decide_target=0.9 - number / 100, **widths, **{"kept": 0.9, **more})


REFERENCE = [step("tune", number, "dense_lora") for number in range(15)]
SEARCH = [closing(number) for number in range(5)]
RECOVERY = [step("recover", number, kept=0.6) for number in range(10)]


class Folder:
    """A run of dense LoRA (15 steps), search (5) and recovery (10), as far as a test lets it come."""

    def __init__(self, path: Path, **recipe: Any):
        self.path = path
        path.mkdir()
        raw = {
            "out": str(path),
            "model": {"path": "org/base"},
            "data": {"train": "rows.jsonl"},
            "budget": {"keep": 0.6},
            "search": {"steps": 5},
            "recover": {"steps": 10},
            **recipe,
            "evaluate": {"dense_lora": True, **recipe.get("evaluate", {})},
        }
        (path / "recipe.yaml").write_text(parse(raw).to_yaml(), encoding="utf-8")

    def stages(self, **stages: Any) -> Folder:
        """What tune writes of the run's facts."""
        facts = {"costs": COSTS, "units": UNITS, "place": place(), "base": {"valid_ppl": 36.0}}
        (self.path / "stages.json").write_text(json.dumps(facts | stages), encoding="utf-8")
        return self

    def rows(self, *rows: Row) -> Folder:
        """Append rows."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return self

    def look(self) -> Watched:
        """At the folder anew."""
        watched = Watched(self.path)
        watched.look()
        return watched

    def held(self) -> AbstractContextManager[None]:
        """As by a process that is at it."""
        return RunFolder(self.path).held()

    def shown(self, width: int = 80) -> str:
        """A frame as text, while a process is at the run."""
        with self.held():
            return text(self.look(), width)


def text(watched: Watched, width: int = 80, height: int | None = None, **how: Any) -> str:
    console = Console(file=StringIO(), width=width, **how)
    console.print(frame(watched, console, height))
    written: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(each.rstrip() for each in written.splitlines())


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "health").stages()


def line(frame: str, start: str) -> str:
    """The line of a frame that begins so."""
    return next(each for each in frame.splitlines() if each.startswith(start))


# --- reading ------------------------------------------------------------------------------------------------------------------


def numbered(first: int, last: int) -> bytes:
    return b"".join(json.dumps(step("recover", number)).encode() + b"\n" for number in range(first, last))


def test_only_what_was_appended_is_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = Tail(file)
    assert tail.read() == ([], False)
    file.write_bytes(numbered(0, 100))
    assert [row["step"] for row in tail.read()[0]] == list(range(100))
    assert tail.read() == ([], False)
    with file.open("r+b") as handle:
        handle.write(b"#" * 5000)  # whoever reads it again finds other rows
        handle.seek(0, os.SEEK_END)
        handle.write(numbered(100, 102))
    rows, void = tail.read()
    assert [row["step"] for row in rows] == [100, 101]
    assert not void


def test_half_a_line_waits_and_what_is_no_row_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail, (first, second) = Tail(file), numbered(0, 2).splitlines(keepends=True)
    file.write_bytes(first + second[:20])
    assert [row["step"] for row in tail.read()[0]] == [0]
    with file.open("ab") as handle:
        handle.write(
            second[20:] + b'{"checkpoint": ["main", "recover", 2]}\n\x80\xff\n[1]\nnull\n\n{"step": "3"}\n' + numbered(2, 3)
        )
    rows, void = tail.read()
    assert [row["step"] for row in rows] == [1, 2]
    assert not void


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("steps", [3, 10, 40])
def test_a_file_that_was_cut_back_or_replaced_is_read_anew(tmp_path: Path, steps: int, in_place: bool) -> None:
    """Also where the new one is as long or longer, and has the number of the old one."""
    file, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    tail = Tail(file)
    file.write_bytes(numbered(0, 10))
    tail.read()
    new = numbered(0, steps).replace(b'"seconds": 0.5', b'"seconds": 0.7')
    if in_place:
        file.write_bytes(new)
    else:
        other.write_bytes(new)
        os.replace(other, file)
    rows, void = tail.read()
    assert void
    assert [row["step"] for row in rows] == list(range(steps))
    assert tail.read() == ([], False)
    file.unlink()
    assert tail.read() == ([], True)
    assert tail.read() == ([], False)


def test_a_run_that_was_cut_back_forgets_what_was_beyond(run: Folder) -> None:
    watched = run.rows(*SEARCH, *RECOVERY[:6]).look()
    assert watched.seen.stretches["main", "recover"].done == 6
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SEARCH[:3]), encoding="utf-8")
    watched.look()
    assert list(watched.seen.stretches) == [("main", "search")]
    assert watched.seen.stretches["main", "search"].done == 3
    assert list(watched.seen.lines["main"]["adapt_loss"]) == [row["adapt_loss"] for row in SEARCH[:3]]
    assert watched.seen.reopened == pytest.approx(0.03)


def test_files_that_stay_the_same_are_read_once(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    watched, read = run.rows(*SEARCH).look(), []
    monkeypatch.setattr(Path, "read_text", lambda self, **how: read.append(self.name) or "{}")
    watched.look()
    assert [name for name in read if name != "locks" and name != "boot_id"] == []
    (run.path / "stages.json").touch()
    watched.look()
    assert [name for name in read if name != "locks" and name != "boot_id"] == ["stages.json"]


def test_fifty_thousand_steps_are_looked_at_in_no_time(run: Folder) -> None:
    run.rows(*(step("recover", number) for number in range(50_000)))
    watched = run.look()
    began = time.perf_counter()
    for number in range(50_000, 50_020):
        run.rows(step("recover", number))
        watched.look()
    assert time.perf_counter() - began < 1.0  # read as a whole each time: 5 s and more
    assert len(watched.seen.lines["main"]["adapt_loss"]) == 50_020


# --- how it stands ------------------------------------------------------------------------------------------------------------


def test_the_states_of_a_run(run: Folder, tmp_path: Path) -> None:
    empty = tmp_path / "new"
    empty.mkdir()
    assert Watched(empty).state == "absent"
    with RunFolder(empty).held():
        watched = Watched(empty)
        watched.look()
        assert watched.state == "starting"
        assert "data and model are being checked" in text(watched)
    with run.held():
        assert run.look().state == "starting"
        run.rows(*SEARCH)
        assert run.look().state == "running"
    assert run.look().state == "broken off"
    assert run.look().over
    assert "Search is done, recover comes next, 0 s ago. No process is at it any more" in " ".join(
        text(run.look(), 110).split()
    )


def test_what_cannot_be_seen_is_not_guessed(run: Folder) -> None:
    """As of a run of another machine, or of a system that does not list its locks."""
    run.stages(place="elsewhere").rows(*SEARCH[:2])
    assert run.look().state == "running"
    long_ago = time.time() - 200
    for name in ("metrics.jsonl", "stages.json", "recipe.yaml"):
        os.utime(run.path / name, (long_ago, long_ago))
    assert run.look().state == "silent"
    assert not run.look().over
    assert "Search, step 2 of 5. No step for 3 min 20 s, and whether a process is still at it" in " ".join(
        text(run.look()).split()
    )
    with run.held():
        assert run.look().state == "running"
        assert "Search, step 2 of 5. No step for 3 min 20 s; a process holds the folder." in text(run.look())


def test_a_step_that_takes_long_is_waited_for(run: Folder) -> None:
    run.stages(place="elsewhere").rows(*(step("search", number, seconds=100.0) for number in range(4)))
    for name in ("metrics.jsonl", "stages.json", "recipe.yaml"):
        os.utime(run.path / name, (time.time() - 200, time.time() - 200))
    assert run.look().state == "running"


def test_a_guard_that_ended_the_run_is_told(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run", guard={"ppl": "<= 30"}, alarm={"then": "stop"}, evaluate={"every": 5}).stages()
    run.rows(*SEARCH[:4], closing(4, valid_ppl=41.0, breached=["ppl"]))
    with run.held():
        assert run.look().state == "running"
    assert run.look().state == "stopped"
    assert "BREACHED    ppl is 41, to be <= 30" in text(run.look())
    assert watch(run.path) == BREACHED
    run.rows(RECOVERY[0])  # it went on, and broke off later
    assert run.look().state == "broken off"


def test_a_summary_is_an_earlier_runs_while_another_process_holds_the_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    watched = Watched(folder)
    watched.look()
    assert watched.state == "finished"
    with RunFolder(folder).held():
        watched.look()
        assert watched.state == "running"


# --- pace ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        ({}, {("main", "search"): 5, ("main", "recover"): 10}),
        ({"evaluate": {"dense_lora": True}}, {("dense_lora", "tune"): 15, ("main", "search"): 5, ("main", "recover"): 10}),
        (
            {"lora": {"semantics": "lora_aware", "settle": 0.4}},
            {("main", "search"): 5, ("main", "settle"): 2, ("main", "recover"): 8},
        ),
        ({"method": "finetune", "train": {"steps": 7}, "evaluate": {"dense_lora": True}}, {("main", "tune"): 7}),
        ({"method": "twostage"}, {("main", "recover"): None}),
        ({"method": "twostage", "twostage": {"scores": "generator"}}, {("main", "decide"): 5, ("main", "recover"): None}),
    ],
)
def test_the_phases_of_a_recipe(recipe: dict[str, Any], steps: dict[Any, int | None]) -> None:
    found = parse({"search": {"steps": 5}, "recover": {"steps": 10}, **recipe})
    assert pace.steps_of(found) == {key: value or found.tuning_steps for key, value in steps.items()}


def test_time_left_goes_by_what_phases_cost_and_counts_evaluations(tmp_path: Path) -> None:
    """In the reference, 10 of 15 steps: a step of the search costs 0.8 of its, one of the recovery half."""
    run = Folder(tmp_path / "run", evaluate={"every": 5, "search_every": 2}).stages()
    rows = REFERENCE[:10]
    rows[0] = rows[0] | {"seconds": 60.0}  # in which kernels were made
    rows[4], rows[9] = (rows[at] | {"valid_ppl": 20.0, "evaluate_seconds": 3.0} for at in (4, 9))
    found = pace.phases(run.rows(*rows).look())
    reference, search, recover = found
    assert (reference.done, reference.steps, reference.step) == (10, 15, 0.5)
    assert reference.spent == pytest.approx(60 + 9 * 0.5 + 2 * 3)
    assert reference.left == pytest.approx(5 * 0.5 + 3)
    assert search.left == pytest.approx(5 * 0.8 * 0.5 + 2 * 3)
    assert recover.left == pytest.approx(10 * 0.5 * 0.5 + 2 * 3)
    assert pace.left(found) == pytest.approx(5.5 + 8 + 8.5)
    assert pace._SEARCHES == SEARCHES


def test_without_costs_only_the_present_phase_is_told(run: Folder) -> None:
    found = pace.phases(run.stages(costs={}).rows(*SEARCH[:3]).look())
    assert [phase.left for phase in found] == [None, 1.0, None]
    assert pace.left(found) is None
    assert "left 1 s" in line(run.shown(), "search")


# --- what is drawn ------------------------------------------------------------------------------------------------------------


def test_curves_as_characters() -> None:
    assert glyphs.spark([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert glyphs.spark([1, 10, 100]) == "▁▅█"  # logarithms: ▁▂█ else
    assert glyphs.spark([2.0, 2.0]) == "▅▅"
    assert glyphs.spark([]) == ""
    assert glyphs.spark([0, 1], ascii_only=True) == ".@"
    assert glyphs.means([1, 2, 3], 5) == [1, 2, 3]
    assert glyphs.means([1, 3, 5, 7, 9, 11], 3) == [2, 6, 10]
    assert len(glyphs.means(range(1000), 7)) == 7


def test_layers_as_bars() -> None:
    assert glyphs.bars([1, 0.5, 0.125, 0.01, 0]) == ["█▄▁▁░"]
    assert glyphs.bars([1, 0.5, 0.25], height=2) == ["█░░", "██▄"]
    assert glyphs.bars([1, 0], width=3) == ["██ ░░ "]
    assert glyphs.bars([1, 0], ascii_only=True) == ["@ "]


# --- frames -------------------------------------------------------------------------------------------------------------------


def test_before_the_first_step(run: Folder) -> None:
    shown = run.stages(base=None).shown()
    assert "Before the first step." in shown
    (run.path / "stages.json").write_text("{}")
    assert "Before the first step: the base is measured." in run.shown()
    assert line(shown, "search").split()[-1] == "0/5"
    assert "Curves" not in shown
    assert "Shape" not in shown


def test_while_dense_lora_is_tuned(run: Folder) -> None:
    rows = [*REFERENCE[:9], REFERENCE[9] | {"valid_ppl": 21.0}]
    shown = run.rows(*rows).shown()
    assert shown.startswith("health  running  atp, to keep 60% of all parameters\nDense LoRA, step 10 of 15.\n\n")
    assert re.search(r"dense LoRA +━+ +10/15 +500 ms/step +left 2 s", shown)  # 2.5
    assert re.search(r"search +0/5 +about 2 s", shown)
    assert "about 7 s left for all steps" in shown
    assert "Curves (dense LoRA)" in shown
    assert "loss        █▇▆▆▅▄▃▃▂▁  3.000 to 2.100, least 2.100" in shown
    assert "Validation  dense LoRA, step 10" in shown
    assert re.search(r"perplexity +↓ +21\.00 +36\.00", shown)  # beside the base, and not beside itself
    assert "\nkept" not in shown


def test_in_the_search(run: Folder) -> None:
    rows = [closing(1, valid_ppl=36.0), closing(2), closing(3, valid_ppl=40.0, **{"valid_pubmedqa.accuracy": 0.5})]
    stages = {"dense_lora": {"valid_ppl": 20.0}, "valid": {"dense": {"pubmedqa.accuracy": 0.4}}}
    shown = run.stages(**stages).rows(*REFERENCE, closing(0), *rows).shown()
    assert "Search, step 4 of 5." in shown
    assert re.search(r"dense LoRA +━+ +15/15 +500 ms/step +took 8 s", shown)
    assert "perplexity  ▁█    36.00 to 40.00, least 36.00" in shown
    assert line(shown, "kept").endswith("90.0%, target 87.0%, then 60%")
    assert re.search(r"now +change +base +dense LoRA\n", shown)
    assert re.search(r"perplexity +↓ +40\.00 +\+4\.00 +36\.00 +20\.00", shown)
    assert re.search(r"pubmedqa, accuracy +↑ +50\.0% +40\.0%", shown)
    assert "Shape  layer by layer" in shown
    assert "MLP width   ███ ███ ███ ███" in shown
    assert "74% of 400, 60 to 87 a layer" in shown
    assert "62% of 16, 1 to 4 a layer" in shown
    assert "Last step: 3.00% of all units removed, 1.00% came back; so far 4.0% came back." in shown


def test_after_the_cut(run: Folder) -> None:
    shown = run.rows(*REFERENCE, *SEARCH, *RECOVERY[:4]).shown()
    assert "Recover, step 4 of 10." in shown
    assert line(shown, "kept").endswith("60.0%, budget 60%")
    assert "Shape  layer by layer, at step 5 of the search\n" in shown
    assert "74% of 400" in shown
    assert "Last step" not in shown  # nothing changes any more
    shown = run.rows(*RECOVERY[4:]).shown()
    assert "All steps are done; the model is written and measured." in shown
    assert "left" not in shown


def test_a_run_without_widths_or_facts(run: Folder) -> None:
    """As those were that an earlier version made."""
    (run.path / "stages.json").unlink()
    bare = [{key: value for key, value in row.items() if "widths" not in key} for row in SEARCH]
    shown = text(run.rows(*bare, *RECOVERY[:2]).look())
    assert "Shape" not in shown
    assert "Recover, step 2 of 10" in shown
    shown = text(run.rows(*SEARCH).look())
    assert "full height: the widest that was seen" in shown
    assert "60 to 86 a layer" in shown


def test_a_recipe_of_another_version(run: Folder) -> None:
    with (run.path / "recipe.yaml").open("a") as file:
        file.write("unheard_of: 3\n")
    shown = run.rows(*SEARCH).shown()
    assert "Search, step 5." in shown
    assert re.search(r"search +━+ +5 +500 ms/step", shown)


def test_figures_that_are_no_numbers_and_names_with_brackets(tmp_path: Path) -> None:
    run = Folder(tmp_path / "[bold]x").stages()
    rows = [closing(0, adapt_loss="nan", valid_ppl="inf", seconds=None), closing(0, adapt_loss=float("nan"))]
    shown = run.rows(*rows, closing(1)).shown()
    assert shown.startswith("[bold]x  running")
    assert "2.900 to 2.900" in shown


def guarded(path: Path, begin: str = "search") -> Folder:
    """Of a run with guards of all kinds."""
    guard = {"seconds": "<= 100", "rqe.accuracy": ">= 0.9 x dense", "ppl": "<= 1.2 x dense_lora"}
    tasks = {"every": 5, "tasks": ["rqe"]}
    run = Folder(path, guard=guard, alarm={"begin": begin}, evaluate=tasks)
    return run.stages(valid={"dense": {"rqe.accuracy": 0.5}, "dense_lora": {"ppl": 20.0}})


def test_guards_by_the_latest_validation_figures(tmp_path: Path) -> None:
    run = guarded(tmp_path / "run")
    shown = run.rows(*SEARCH[:4]).shown()
    assert "not yet     ppl, to be <= 1.2 x dense_lora" in shown
    assert "at the end  seconds, to be <= 100" in shown
    shown = run.rows(closing(4, valid_ppl=25.0, **{"valid_rqe.accuracy": 0.46}), RECOVERY[0]).shown()
    guards = shown[shown.index("Guards") :].splitlines()
    assert guards[0] == "Guards  by the validation figures of search, step 5"
    assert guards[1:4] == [
        "BREACHED    ppl is 25, to be <= 1.2 x dense_lora = 24",  # first
        "holds       rqe.accuracy is 0.46, to be >= 0.9 x dense = 0.45",
        "at the end  seconds, to be <= 100",
    ]


def test_guards_that_begin_after_the_cut_are_not_judged_before(tmp_path: Path) -> None:
    run = guarded(tmp_path / "run", "recover").rows(closing(4, valid_ppl=25.0, **{"valid_rqe.accuracy": 0.4}))
    assert "BREACHED" not in run.shown()
    run.rows(*RECOVERY[:4], step("recover", 4, valid_ppl=25.0, **{"valid_rqe.accuracy": 0.4}))
    assert run.shown().count("BREACHED") == 2
    assert guarded(tmp_path / "end", "end").rows(closing(4, valid_ppl=25.0)).shown().count("at the end") == 3


def test_a_guard_on_a_task_whose_file_is_not_here_goes_by_what_the_run_said(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run", guard={"mine.cited": ">= 0.5"}, evaluate={"every": 5, "tasks": ["mine.yaml"]}).stages()
    assert "holds       mine.cited, to be >= 0.5" in run.rows(closing(4, valid_ppl=25.0)).shown()
    assert (
        "BREACHED    mine.cited, to be >= 0.5" in run.rows(step("recover", 4, valid_ppl=25.0, breached=["mine.cited"])).shown()
    )


def finished(path: Path, holds: bool = True) -> Path:
    """A run with a guard that holds, or does not."""
    folder = write_run(path, guard={"ppl": "<= 1.2 x dense"})
    summary = json.loads((folder / "summary.json").read_text())
    ruling = {
        "guard": "ppl",
        "figure": "ppl",
        "condition": "<= 1.2 x dense",
        "value": 20.0,
        "limit": 24.0,
        "words": {"dense": 20.0},
    }
    summary["guard"] = [{**ruling, "holds": holds}]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_finished_run(tmp_path: Path) -> None:
    watched = Watched(finished(tmp_path / "run"))
    watched.look()
    shown = text(watched)
    assert shown.startswith("run  finished  atp, to keep 60% of all parameters\n40.0% smaller (600,000 of 1.0 M parameters)")
    assert "Guards  by test figures of the written model\nholds       ppl is 20, to be <= 1.2 x dense = 24" in shown
    kept = plan_of(12, 0.6, 0).kept
    total = sum(len(layer["ffn"]) for layer in kept)
    assert f"{total / (12 * 1024):.0%} of 12,288" in shown
    assert "about" not in shown


@pytest.mark.parametrize("layers", [1, 12, 80, 130])
@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_frame_fits_any_width_and_any_number_of_layers(tmp_path: Path, width: int, layers: int) -> None:
    watched = Watched(write_run(tmp_path / "run", layers=layers, guard={"ppl": "<= 1.2 x dense", "loss": "<= 3"}))
    watched.look()
    shown = text(watched, width)
    assert max(map(len, shown.splitlines())) <= min(width, 124)
    assert "MLP width" in shown
    assert ("layers a bar" in shown) == (layers > (34 if width >= 112 else width - 12))
    assert "…" not in shown[: shown.index("Validation")]
    if width >= 112:
        assert re.search(r"^Curves.* Shape  ", shown, re.MULTILINE)  # beside one another


@pytest.mark.parametrize("height", [24, 30, 40])
def test_a_frame_is_cut_down_to_the_height_of_a_terminal(tmp_path: Path, height: int) -> None:
    watched = guarded(tmp_path / "run").rows(*REFERENCE, *SEARCH[:4]).look()
    row = {f"valid_task{number}.accuracy": 0.5 for number in range(12)}
    with (watched.folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(closing(4, valid_ppl=25.0, **row)) + "\n")
    watched.look()
    shown = text(watched, 80, height)
    assert len(shown.splitlines()) <= height < len(text(watched, 80).splitlines())
    assert "in a taller window" in shown
    assert ("to be <= 100" in shown) == (height == 40)  # guards that hold, or are not judged yet, by their names alone
    assert "BREACHED    ppl is 25" in shown
    assert "KV groups" in shown


def test_colour_says_nothing_that_is_not_in_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = guarded(tmp_path / "run").rows(*SEARCH[:4], closing(4, valid_ppl=25.0)).look()
    plain = text(watched)
    assert "\x1b[" in text(watched, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text(watched, force_terminal=True, color_system="standard"))
    assert "BREACHED" in plain


def test_without_block_characters(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(StringIO):
        encoding = "ascii"

    console = Console(file=Old(), width=80)
    console.print(frame(run.rows(*SEARCH, closing(4, valid_ppl=9.0)).look(), console))
    console.file.getvalue().encode("ascii")  # type: ignore[attr-defined]


# --- the command --------------------------------------------------------------------------------------------------------------


def test_exit_codes_of_one_look(run: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run.held():
        assert watch(run.path) == FINE
    assert watch(run.path, once=True) == BROKEN_OFF
    assert watch(finished(tmp_path / "well")) == FINE
    assert watch(finished(tmp_path / "ill", holds=False), wait=True) == BREACHED
    shown = capsys.readouterr().out
    assert shown.count("MLP width") == 2
    assert not re.search(r" +$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{out}/absent"], "absent' does not exist; give the folder of a run (its recipe's out), or --wait for it"),
        (["{out}/empty"], "empty' holds no run; give the folder of a run (its recipe's out), or --wait for one in it"),
        (["{out}/file"], "file' is no folder; give the folder of a run (its recipe's out)"),
        (["{out}/file", "--wait"], "file' is no folder; give the folder of a run (its recipe's out)"),
        (["{out}/run/model"], "run/model' is a run's model: give '"),
        (["{out}/run", "--every", "0"], "--every 0 is no time between looks; give seconds from 0.05 to 3600, e.g. --every 5"),
        (["{out}/run", "--every", "nan"], "--every nan is no time between looks"),
        (["{out}/run", "--once", "--wait"], "--once and --wait exclude each other"),
        (["{out}/damaged"], "damaged/summary.json' cannot be read"),
    ],
)
def test_bad_input_is_told_in_a_line(tmp_path: Path, words: list[str], told: str) -> None:
    for name in ("empty", "run/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "recipe.yaml").write_text(parse({"out": "x"}).to_yaml())
    (write_run(tmp_path / "damaged") / "summary.json").write_text('{"result": ')
    result = CliRunner().invoke(app, ["watch", *(word.replace("{out}", str(tmp_path)) for word in words)])
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_summary_or_recipe_stand_for_their_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path / "run")
    for name in ("summary.json", "recipe.yaml"):
        assert watch(folder / name) == FINE
        assert capsys.readouterr().out.startswith("run  finished")


def test_a_summary_alone_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = finished(tmp_path / "run", holds=False)
    for path in folder.iterdir():
        if path.name != "summary.json":
            path.unlink()
    assert watch(folder) == BREACHED
    assert "BREACHED    ppl is 20" in capsys.readouterr().out


def test_watching_needs_no_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from slimtune.cli import app; import slimtune.cli_watch; assert 'rich' not in sys.modules\n"
        "from slimtune.report.watch import watch; code = watch(sys.argv[1])\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'jinja2'} & set(sys.modules); assert not heavy, heavy\n"
        "sys.exit(code)"
    )
    folder = guarded(tmp_path / "run").rows(*SEARCH, closing(4, valid_ppl=25.0)).path
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == BROKEN_OFF, done.stderr
    assert "BREACHED" in done.stdout


def on_terminal(folder: Path, *words: str, rows: int = 40) -> tuple[subprocess.Popen[bytes], int]:
    """``slimtune watch`` on a terminal of 80 columns, and the terminal's other end."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "LINES": str(rows), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "slimtune", "watch", str(folder), "--every", "0.1", *words]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    return child, ours


def until(terminal: int, wanted: bytes | None, seconds: float = 20.0) -> bytes:
    """What comes until ``wanted`` has come, or to the end."""
    found, end = b"", time.monotonic() + seconds
    while time.monotonic() < end and (wanted is None or wanted not in found):
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                found += os.read(terminal, 65536)
            except OSError:  # the other end is closed
                return found
    assert wanted is None or wanted in found, found
    return found


def test_on_a_terminal_it_follows_the_run_to_its_end(tmp_path: Path) -> None:
    """It waits for the folder, follows what is appended, and leaves the last frame below what was there."""
    done = finished(tmp_path / "done", holds=False)
    child, terminal = on_terminal(tmp_path / "run", "--wait")
    try:
        until(terminal, b"no run yet")
        run = Folder(tmp_path / "run").stages()
        with run.held():
            until(terminal, b"starting")
            run.rows(*SEARCH[:2])
            until(terminal, b"Search, step 2 of 5.")
            run.rows(*SEARCH[2:], *RECOVERY[:7])
            until(terminal, b"Recover, step 7 of 10.")
            for name in ("plan.json", "summary.json"):
                (run.path / name).write_text((done / name).read_text())
        rest = until(terminal, None)
        assert child.wait(10) == BREACHED
        left = rest[rest.index(b"\x1b[?1049l") :]  # the other screen is left
        assert b"finished" in left
        assert b"BREACHED" in left
    finally:
        child.kill()
        os.close(terminal)


def test_ctrl_c_ends_it_without_a_word(run: Folder) -> None:
    run.rows(*SEARCH[:2])
    with run.held():
        child, terminal = on_terminal(run.path)
        try:
            until(terminal, b"Search, step 2 of 5.")
            child.send_signal(signal.SIGINT)  # not as a key: the terminal would throw away what waits to be read
            rest = until(terminal, None)
            assert child.wait(10) == 130
            assert rest.rpartition(b"\x1b[?25h")[2] == b"\x1b[?1049l"  # cursor and screen are as before; no word follows
        finally:
            child.kill()
            os.close(terminal)


WATCHER = """
import json, sys, time
from pathlib import Path
from rich.console import Console
from slimtune.report.follow import Watched
from slimtune.report.frame import frame

watched, seen = Watched(Path(sys.argv[1])), {}
print("ready", flush=True)
while not watched.over:
    time.sleep(0.005)
    watched.look()
    name = watched.state if watched.seen.last is None or watched.over else str(watched.seen.last["phase"])
    if name not in seen:
        console = Console(width=60)
        with console.capture() as captured:
            console.print(frame(watched, console))
        seen[name] = captured.get()
print(json.dumps(seen))
"""


def test_a_run_that_goes_on_is_watched_from_another_process(tmp_path: Path) -> None:
    """Frames of a real run are whole at any moment, come forward, and it ends as it is said to."""
    out = tmp_path / "run"
    recipe = Bench(tmp_path).recipe(out, evaluate__every=2, evaluate__dense_lora=True, guard={"ppl": "<= 1e9"})
    with subprocess.Popen([sys.executable, "-c", WATCHER, str(out)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "ready\n"
        try:
            tune(recipe)
            seen = json.loads(child.communicate(timeout=20)[0])
        finally:
            child.kill()
    order = ["absent", "starting", "tune", "search", "recover", "finished"]
    assert list(seen) == [name for name in order if name in seen]  # a watcher that has to wait for a processor may miss some
    assert {"starting", "tune", "search", "recover"} & seen.keys()
    assert "to be <= 1e9" in seen.get("tune", "to be <= 1e9")
    assert seen["finished"].startswith("run  finished")
    watched = Watched(out)
    watched.look()
    assert [(phase.name, phase.done, phase.steps) for phase in pace.phases(watched)] == [
        ("tune", 8, 8),
        ("search", 4, 4),
        ("recover", 4, 4),
    ]
    assert "holds       ppl is" in text(watched)
    assert watched.stages["place"] == place()
    assert set(watched.stages["costs"]) == {"tune", "search", "recover"}
    assert watched.stages["units"] == {"kv_group": [2, 2, 2], "ffn": [96, 96, 96]}
    assert all(stretch.evaluations for stretch in watched.seen.stretches.values())
    assert watch(out, wait=True) == FINE
