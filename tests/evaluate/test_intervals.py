"""Intervals: the same statistic as the figure, seeded, and as wide as theory has them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slimtune.evaluate import intervals, metrics
from slimtune.evaluate.intervals import chance, interval, majority


def test_of_a_mean_it_is_about_that_of_theory() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = interval("accuracy", values.tolist(), 0, "t") or (0, 0)
    width = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - width, abs=0.1 * width)
    assert high == pytest.approx(values.mean() + width, abs=0.1 * width)


def test_draws_are_seeded_and_a_tasks_own() -> None:
    values = np.random.default_rng(0).random(30).tolist()
    assert interval("rouge1", values, 0, "a") == interval("rouge1", values, 0, "a")
    assert interval("rouge1", values, 1, "a") != interval("rouge1", values, 0, "a")
    assert interval("rouge1", values, 0, "b") != interval("rouge1", values, 0, "a")


def test_statistics_are_those_of_the_figures() -> None:
    rng = np.random.default_rng(1)
    pairs = rng.integers(0, 3, (20, 2)).astype(float)
    scores = np.stack([-rng.random(20) * 9, rng.integers(1, 9, 20)], 1)
    assert intervals._STATISTICS["macro_f1"](pairs) == pytest.approx(metrics.macro_f1(pairs.astype(int).tolist()))
    assert intervals._STATISTICS["perplexity"](scores) == pytest.approx(metrics.token_perplexity(scores.tolist()))
    assert intervals._STATISTICS["bits_per_byte"](scores) == pytest.approx(metrics.bits_per_byte(scores.tolist()))


def test_one_row_has_no_interval() -> None:
    assert interval("accuracy", [1.0], 0, "t") is None


def test_majority() -> None:
    assert majority([0, 1, 1, 1]) == {"accuracy": 0.75, "macro_f1": pytest.approx((0 + 6 / 7) / 2)}


def test_chance_of_rouge_is_what_the_next_rows_answer_gets() -> None:
    docs = [{"completion": " the cat sat"}, {"completion": " the dog sat"}, {"completion": " nothing"}]
    found = chance(docs)
    assert found["rouge1"] == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert found["rouge2"] == 0
    assert chance(docs[:1]) == {}


@pytest.mark.parametrize("rows", [2, 20, 100])
def test_all_right_or_all_wrong_is_not_certainty(rows: int) -> None:
    """The exact ends are where such a result has a probability of 2.5%; a bootstrap would have no width at all."""
    low, high = interval("accuracy", [1.0] * rows, 0, "t") or (0, 0)
    assert (low**rows, high) == (pytest.approx(0.025), 1.0)
    low, high = interval("accuracy", [0.0] * rows, 0, "t") or (0, 0)
    assert (low, (1 - high) ** rows) == (0.0, pytest.approx(0.025))


def test_other_figures_keep_the_bootstrap_and_have_none_of_rows_all_alike() -> None:
    assert interval("rouge1", [1.0] * 9, 0, "t") is None  # no share of hits
    assert interval("macro_f1", [[1, 1]] * 9, 0, "t") is None
    low, high = interval("accuracy", [1.0] * 8 + [0.0], 0, "t") or (0, 0)
    assert 0 < low < 8 / 9 < high


def test_a_share_of_what_is_true_has_exact_ends_too() -> None:
    assert interval("f", [True] * 20, 0, "t") == interval("accuracy", [1.0] * 20, 0, "t")
    assert interval("f", [False] * 20, 0, "t") == interval("accuracy", [0.0] * 20, 0, "t")
    assert interval("f", [1.0] * 20, 0, "t") is None  # it may be of something that is not a share
    assert interval("f", [True, False] * 10, 0, "t") == interval("f", [1.0, 0.0] * 10, 0, "t")
