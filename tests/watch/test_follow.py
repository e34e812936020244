"""What is read of a run's folder while it grows, and how it is said to stand."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from runs import write_run
from slimtune.runtime import RunFolder
from slimtune.watch.follow import Tail, Watched
from slimtune.watch.view import BREACHED, watch
from watched import RECOVERY, SEARCH, Folder, closing, step, text


@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "health").stages()


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
