"""Least squares among the inputs of a consumer, held against a solver that knows nothing of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimtune.prune import least_squares
from slimtune.prune.least_squares import Takeover

KEPT = [0, 1, 4, 5, 8, 9]
GONE = [2, 3, 6, 7]


def data() -> Tensor:
    """[500, 10] inputs of five units of two, mixed so that each says something about the others."""
    rng = torch.Generator().manual_seed(0)
    mixed = torch.randn(500, 10, generator=rng) @ torch.randn(10, 10, generator=rng)
    return mixed.double() + 0.5


def takeover(x: Tensor, damping: float = 1e-9) -> Takeover:
    found = Takeover.of(x.T @ x, torch.tensor(KEPT), damping)
    assert found is not None
    return found


def test_kept_columns_take_over_what_a_regression_on_them_explains() -> None:
    x, weight = data(), torch.randn(3, 10, generator=torch.Generator().manual_seed(1)).double()
    wanted = x @ weight.T
    best = torch.linalg.lstsq(x[:, KEPT], wanted).solution.T
    changed = takeover(x).weight(weight)
    torch.testing.assert_close(changed[:, KEPT], best, rtol=1e-5, atol=1e-5)
    assert torch.equal(changed[:, GONE], weight[:, GONE])
    left = (wanted - x[:, KEPT] @ changed[:, KEPT].T).square().sum()
    assert left < 0.9 * (wanted - x[:, KEPT] @ weight[:, KEPT].T).square().sum()


def test_the_innovation_of_a_unit_is_what_the_other_kept_ones_do_not_explain() -> None:
    x = data()
    residual = x @ takeover(x).innovation(rows=2).T.double()
    for start in range(0, 10, 2):
        own = [start, start + 1]
        others = [index for index in KEPT if index not in own]
        expected = x[:, own] - x[:, others] @ torch.linalg.lstsq(x[:, others], x[:, own]).solution
        torch.testing.assert_close(residual[:, own], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kept", [KEPT, list(range(10))], ids=["some gone", "none gone"])
@pytest.mark.parametrize("damping", [1e-9, 0.1])
def test_the_share_is_the_innovations_own_best_multiple(
    damping: float, kept: list[int], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "LEAF", 3)
    x = data()
    moments = x.T @ x
    found = Takeover.of(moments, torch.tensor(kept), damping)
    assert found is not None
    residual = x @ found.innovation(rows).T.double()
    best = (residual * x).sum(0) / x.square().sum(0)
    share = found.share(moments, rows)
    assert share.dtype == torch.float32
    torch.testing.assert_close(share.double(), best, rtol=1e-4, atol=1e-5)
    assert bool((share[kept] > 0).all())
    assert bool((share < 1).all())


def test_an_input_that_is_always_zero_has_a_share() -> None:
    moments = torch.diag(torch.tensor([1.0, 2.0, 0.0, 0.0]))
    found = Takeover.of(moments, torch.tensor([0, 2]), 0.01)
    assert found is not None
    assert found.share(moments, 1).isfinite().all()


def test_wide_consumers_are_solved_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = data(), torch.ones(3, 10)
    exact = takeover(x, 0.01).weight(weight)
    monkeypatch.setattr(least_squares, "WIDE", 5)
    single = takeover(x, 0.01)
    assert single.onto.dtype == torch.float32
    torch.testing.assert_close(single.weight(weight), exact, rtol=1e-4, atol=1e-4)


def test_damping_holds_back_what_is_taken_over() -> None:
    x, weight = data(), torch.ones(1, 10).double()
    moved = [float((takeover(x, damping).weight(weight) - weight).norm()) for damping in (1e-6, 1.0, 1e6)]
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 1e-5


def test_where_nothing_is_gone_weights_stay_and_innovations_are_told() -> None:
    x = data()
    found = Takeover.of(x.T @ x, torch.arange(10), 1e-9)
    assert found is not None
    weight = torch.randn(3, 10)
    assert torch.equal(found.weight(weight), weight)
    residual = x @ found.innovation(rows=2).T.double()
    expected = x[:, 2:4] - x[:, [0, 1, *range(4, 10)]] @ torch.linalg.lstsq(x[:, [0, 1, *range(4, 10)]], x[:, 2:4]).solution
    torch.testing.assert_close(residual[:, 2:4], expected, rtol=1e-3, atol=1e-3)


def test_where_all_is_gone_there_is_nothing_to_take_over() -> None:
    assert Takeover.of(torch.eye(4), torch.tensor([], dtype=torch.long), 0.01) is None


def test_inputs_that_are_always_zero_take_over_nothing() -> None:
    found = Takeover.of(torch.zeros(4, 4), torch.tensor([0, 1]), 0.01)
    assert found is not None
    assert torch.equal(found.weight(torch.ones(2, 4)), torch.ones(2, 4))
    assert torch.isfinite(found.innovation(rows=1)).all()
