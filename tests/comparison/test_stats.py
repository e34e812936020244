"""What differences between seeds tell."""

from __future__ import annotations

import random

import pytest

from slimtune.comparison.stats import beyond_chance


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0], False),
        ([1.0, 1.2], True),
        ([1.0, 2.0], False),
        ([0.1, 0.1, 0.4], False),  # t = 2.0, to be above 2.92
        ([0.1, 0.12, 0.15], True),
        ([-0.1, -0.12, -0.15], True),
        ([1.0, 1.0], True),
        ([0.0, 0.0], False),
        ([1.0, -1.0] * 8 + [3.0], False),
        ([1.0, 2.0] * 8, True),
    ],
)
def test_beyond_chance(differences: list[float], expected: bool) -> None:
    assert beyond_chance(differences) is expected


def test_of_twenty_equal_rivals_one_is_beyond_chance_on_each_side() -> None:
    chance = random.Random(0)
    drawn = [[chance.gauss(0, 1) for _ in range(3)] for _ in range(8_000)]
    for sign in (1, -1):
        beyond = sum(beyond_chance(each) and sign * sum(each) > 0 for each in drawn)
        assert beyond / len(drawn) == pytest.approx(1 / 20, abs=0.01)  # four standard errors
