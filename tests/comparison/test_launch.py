"""Runs as processes: what they see, what they leave, how they end."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from comparisons import stand_in, write_comparison
from slimtune.comparison import launch
from slimtune.comparison.config import load
from slimtune.comparison.jobs import Job, jobs_of
from slimtune.comparison.launch import Launcher
from slimtune.comparison.lock import held
from slimtune.comparison.made import beside, finished
from slimtune.comparison.program import program
from slimtune.train import loop


@pytest.fixture(autouse=True)
def _fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "TUNE", (*stand_in(tmp_path), "tune"))


def jobs(folder: Path, rank: int = 4) -> list[Job]:
    return jobs_of(load(write_comparison(folder, set={"lora.rank": rank})))


def test_runs_share_out_the_gpus_and_leave_a_stamp(tmp_path: Path) -> None:
    work = jobs(tmp_path)[:3]
    ended = {end.job.folder.name: end for end in Launcher(2, ["3", "5"], 1).run_all(work)}
    assert set(ended) == {job.folder.name for job in work}
    assert {(job.folder / "environment").read_text() for job in work} == {"3 1 1 1", "5 1 1 1"}
    summary = finished(work[0], program())
    assert summary is not None
    assert summary == ended["atp-0.8-0"].summary
    assert (summary["result"]["ppl"], summary["kv_groups"], summary["words"]) == (16.0, 3, work[0].digest)
    assert finished(work[0], "another program") is None
    assert finished(replace(work[0], words=("lora.rank=5",)), program()) is None


def test_a_failed_run_tells_the_end_of_its_log(tmp_path: Path) -> None:
    (end,) = Launcher(1).run_all(jobs(tmp_path, rank=13)[:1])
    assert end.summary is not None
    assert end.summary["failed"] == "error: rank 13 is unlucky"
    assert finished(end.job, program()) is None
    assert (tmp_path / "out" / "atp-0.8-0.log").read_text().strip() == "error: rank 13 is unlucky"


def test_a_failed_run_advises_nothing_that_a_comparison_lacks(tmp_path: Path) -> None:
    advice = "lower train.lr (now 1.0), or set train.precision=float32, and "
    assert launch.REMEDY in inspect.getsource(loop)
    with (tmp_path / "fake_tune.py").open("w") as file:
        file.write(f'raise SystemExit("error: {advice}{launch.REMEDY}")')
    (end,) = Launcher(1).run_all(jobs(tmp_path)[:1])
    assert end.summary is not None
    assert end.summary["failed"] == f"error: {advice}give the comparison again"


def test_an_interrupt_stops_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    work = jobs(tmp_path, rank=99)[:3]
    pid = work[0].folder / "pid"

    def interrupt() -> None:
        while not pid.is_file() or not pid.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), 15)  # as a time limit would; Ctrl-C takes the same way

    threading.Thread(target=interrupt).start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        list(Launcher(1).run_all(work))
    assert time.perf_counter() - started < 8  # asked to end, not killed after ten
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert (tmp_path / "out" / "starts").read_text().split() == ["atp-0.8-0"]


def test_a_run_that_is_stopped_from_outside_is_no_result(tmp_path: Path) -> None:
    work = jobs(tmp_path, rank=99)[:1]
    pid = work[0].folder / "pid"

    def stop() -> None:
        while not pid.is_file() or not pid.read_text():
            time.sleep(0.01)
        os.kill(int(pid.read_text()), 15)

    threading.Thread(target=stop).start()
    assert [end.summary for end in Launcher(1).run_all(work)] == [None]


def test_a_run_that_another_call_is_making_is_left_to_it(tmp_path: Path) -> None:
    work = jobs(tmp_path)[:2]
    work[0].folder.mkdir(parents=True)
    (work[0].folder / "summary.json").write_text("theirs")
    with held(beside(work[0], ".lock")) as ours:
        assert ours
        ended = {end.job.folder.name: end for end in Launcher(2).run_all(work)}
    left, made = ended["atp-0.8-0"], ended["atp-0.6-0"]
    assert left.summary is None
    assert left.why == "left to another call, which is making it now"
    assert (work[0].folder / "summary.json").read_text() == "theirs"
    assert made.summary is not None
    (again,) = Launcher(1).run_all(work[:1])
    assert again.summary is not None


KILLED = """
import sys
from slimtune.comparison import launch
from slimtune.comparison.config import load
from slimtune.comparison.jobs import jobs_of
launch.TUNE = (*sys.argv[2:], "tune")
list(launch.Launcher(1).run_all(jobs_of(load(sys.argv[1]))[:1]))
"""


def test_a_run_whose_call_was_killed_is_not_started_beside_itself(tmp_path: Path) -> None:
    work = jobs(tmp_path, rank=99)[:1]
    pid = work[0].folder / "pid"
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "comparison.yaml"), *stand_in(tmp_path)])
    while not pid.is_file() or not pid.read_text():
        assert parent.poll() is None
        time.sleep(0.01)
    child = int(pid.read_text())
    try:
        parent.kill()
        parent.wait()
        (end,) = Launcher(1).run_all(work)
        assert end.why == "left to another call, which is making it now"
        os.kill(child, 0)  # it is there
    finally:
        os.kill(child, signal.SIGKILL)
    lock, until = beside(work[0], ".lock"), time.perf_counter() + 20
    while time.perf_counter() < until:
        with held(lock) as free:
            if free:
                return
        time.sleep(0.01)
    pytest.fail("the lock outlives the child")
