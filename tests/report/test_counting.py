"""Counts on a terminal and off it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from slimtune.report import counting
from slimtune.report.counting import Counting


def test_off_a_terminal_a_line_comes_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(counting.time, "monotonic", lambda: clock[0])
    text = io.StringIO()
    with Counting(Console(file=text, width=80)) as count:
        for done in range(1, 31):
            clock[0] += 1.0
            count("answers", done * 100, 3000)
    assert text.getvalue().splitlines() == ["answers 1,100/3,000", "answers 2,200/3,000"]


def test_on_a_terminal_there_is_one_bar_at_a_time_and_none_is_left() -> None:
    text = io.StringIO()
    with Counting(Console(file=text, width=80, force_terminal=True)) as count:
        count("likelihoods", 1, 4)
        count("likelihoods", 4, 4)
        count("answers", 1, 2)
        assert [task.description for task in count._bar.tasks] == ["answers"]
        assert count._bar.tasks[0].completed == 1
        assert count._bar.live.is_started
    assert not count._bar.live.is_started
    assert "answers" in text.getvalue()
