"""What is seen of a run: phase, step, kept ratio, loss, time left here and in the whole run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from slimtune.train import progress
from slimtune.train.progress import Progress


class Clock:
    """Every look takes no time; a step takes what the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


STEPS = (30.0,) * 4


def shown(
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
    costs: dict[str, float] | None,
    first: int = 0,
    seconds: tuple[float, ...] = STEPS,
) -> str:
    clock, file = Clock(), io.StringIO()
    monkeypatch.setattr(progress, "time", clock)
    bar = Progress(Console(file=file, width=80, force_terminal=terminal), costs)
    bar.start("search", first, 4)
    for step in range(first, 4):
        clock.now += seconds[step]
        bar.step("search", step, 2.5, 0.75)
    bar.stop()
    return file.getvalue()


COSTS = {"tune": 7.0, "search": 2.0, "recover": 3.0}


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, False, COSTS).splitlines() == [
        "search   1/4  kept  75.0%  loss 2.500  left 01:30 (run 04:30)",
        "search   2/4  kept  75.0%  loss 2.500  left 01:00 (run 04:00)",
        "search   3/4  kept  75.0%  loss 2.500  left 00:30 (run 03:30)",
        "search   4/4  kept  75.0%  loss 2.500  left 00:00 (run 03:00)",
    ]


def test_a_first_step_that_took_long_is_not_held_against_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    told = shown(monkeypatch, False, None, seconds=(600.0, 30.0, 60.0, 30.0)).splitlines()  # kernels are made in it
    assert [line.split("left ")[1] for line in told] == ["30:00", "01:00", "00:45", "00:00"]


def test_hours_are_told_where_there_are_any() -> None:
    assert [progress._clock(seconds) for seconds in (5.4, 754, 3605, 90_000)] == ["00:05", "12:34", "1:00:05", "25:00:00"]


def test_a_resumed_phase_counts_its_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(monkeypatch, False, None, first=2).splitlines()[0] == "search   3/4  kept  75.0%  loss 2.500  left 00:30"


def test_the_bar_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, True, COSTS)
    assert "…" not in text
    for part in ("search", "4/4", "kept  75.0%  loss 2.500", "left 00:00 (run 03:00)"):
        assert part in text


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown(monkeypatch, True, COSTS) == shown(monkeypatch, False, COSTS) == ""
