"""Which way a figure is the better."""

from __future__ import annotations

import pytest

from slimtune.train.task_figures import better


@pytest.mark.parametrize(
    ("figure", "way"),
    [
        ("ppl", "lower"),
        ("valid_ppl", "lower"),
        ("loss", "lower"),
        ("read.perplexity", "lower"),
        ("valid_read.bits_per_byte", "lower"),
        ("accuracy", "higher"),
        ("rqe.macro_f1", "higher"),
        ("valid_mine.errors", "lower"),
        ("mine.errors", "lower"),
        ("valid_mine.late", "lower"),
        ("mine.late", "higher"),
        ("other.errors", "higher"),
    ],
)
def test_a_figures_direction_goes_by_its_name_and_by_what_tasks_say(figure: str, way: str) -> None:
    assert better(figure, ["mine.errors", "valid_mine.late"]) == way  # the second of a task that is called valid_mine


def test_names_alone_do_not_make_a_figure_lower() -> None:
    assert [better(figure) for figure in ("mine.errors", "valid_mine.errors")] == ["higher", "higher"]
