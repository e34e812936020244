"""Bounds on figures, read from text."""

from __future__ import annotations

import math

import pytest

from slimtune.condition import Condition
from slimtune.errors import UserError

VALUES = {"dense": 0.8, "dense_lora": 0.9, "baseline": 0.5, "noise": 0.04}


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        (">= 0.95 x dense", 0.76),
        (">= 0.95x dense", 0.76),
        (">= 0.95*base", 0.76),
        (">= 95% x dense", 0.76),
        ("<= dense + 0.05", 0.85),
        ("≤ dense+0.05", 0.85),
        (">= baseline - noise", 0.46),
        (">= 0.98 x baseline - 2 x noise", 0.41),
        ("< 30", 30.0),
        ("> -0.5", -0.5),
        ("<= 1e-4", 1e-4),
        ("<= 1.5E+2", 150.0),
        ("<= .5 x dense_lora + 1e-1 - dense", -0.25),
    ],
)
def test_limits_by_hand(text: str, limit: float) -> None:
    assert Condition.of(text).limit(VALUES) == pytest.approx(limit, abs=1e-12)


def test_signs() -> None:
    cases = {"<=": (True, True, False), "<": (True, False, False), ">=": (False, True, True), ">": (False, False, True)}
    for sign, expected in cases.items():
        condition = Condition.of(f"{sign} 2")
        assert tuple(condition.holds(value, {}) for value in (1.0, 2.0, 3.0)) == expected


def test_nothing_is_within_a_bound_that_is_not_known() -> None:
    condition = Condition.of(">= 0.9 x dense_lora")
    assert condition.words == ("dense_lora",)
    assert math.isnan(condition.limit({"dense": 1.0}))
    assert not condition.holds(5.0, {"dense": 1.0})
    assert not Condition.of("<= 5").holds(math.nan, {})
    assert Condition.of("<= base + dense - noise").words == ("dense", "noise")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.95 x dense", "does not begin with <=, >=, < or >; write e.g."),
        ("== 3", "does not begin with"),
        (">=", "does not begin with"),
        (">= 0.95 x dens", r"'dens' in '>= 0.95 x dens' is unknown\. Did you mean 'dense'\?"),
        (">= 0.95 dense", "'0.95 dense' in '>= 0.95 dense' is no number, word or number x word"),
        (">= 0.95 x", "'0.95 x' in"),
        (">= x dense", "'x dense' in"),
        (">= dense +", "'' in"),
        (">= 1..5", "'1..5' in"),
        (">= nan", "'nan' in '>= nan' is unknown"),
        (">= dense / 2", "'dense / 2' in"),
        ("", "'' does not begin"),
    ],
)
def test_what_is_no_condition_says_so(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Condition.of(text, "guard.ppl")
    assert str(caught.value).startswith("guard.ppl: ")


def test_numbers_that_are_none_are_refused_and_overflow_is_not_within() -> None:
    with pytest.raises(UserError, match=r"'1e999' in '<= 1e999' is too large a number"):
        Condition.of("<= 1e999")
    assert math.isnan(Condition.of("<= 1e308 x dense - 1e308 x dense").limit({"dense": 1e9}))
