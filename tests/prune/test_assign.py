from __future__ import annotations

from itertools import permutations

import pytest
import torch

from slimtune.prune.assign import assign, prices, widest


@pytest.mark.parametrize("sizes", [[300, 50, 50, 50, 50, 12], [0, 128, 128, 128, 128, 0], [500, 3, 3, 3, 3, 0]])
def test_every_slot_is_as_full_as_it_should_be(sizes: list[int]) -> None:
    scores = torch.randn(3, 512, 6, generator=torch.Generator().manual_seed(0))
    found = assign(scores, torch.tensor(sizes))
    for layer in found:
        assert torch.bincount(layer, minlength=6).tolist() == sizes


def test_the_sum_of_scores_is_nearly_the_largest() -> None:
    rng = torch.Generator().manual_seed(1)
    sizes = [2, 2, 3]
    seats = torch.tensor([slot for slot, size in enumerate(sizes) for _ in range(size)])
    orders = torch.tensor(sorted({tuple(seats[list(order)].tolist()) for order in permutations(range(7))}))
    best, reached = 0.0, 0.0
    for _ in range(20):
        scores = torch.randn(7, 3, generator=rng)
        best += float(scores[torch.arange(7), orders].sum(1).max())
        reached += float(scores.gather(1, assign(scores[None], torch.tensor(sizes))[0][:, None]).sum())
    assert reached > 0.97 * best


def test_ties_go_to_the_lower_index_and_layers_do_not_meet() -> None:
    same = torch.zeros(1, 6, 2)
    assert assign(same, torch.tensor([4, 2]))[0].tolist() == [0, 0, 0, 0, 1, 1]
    scores = torch.randn(2, 40, 4, generator=torch.Generator().manual_seed(2))
    sizes = torch.tensor([10, 10, 10, 10])
    assert torch.equal(assign(scores, sizes)[1], assign(scores[1:], sizes)[0])


def test_prices_fill_slots_in_expectation() -> None:
    scores, sizes = torch.randn(2, 400, 5, generator=torch.Generator().manual_seed(3)), torch.tensor([200, 50, 50, 60, 40])
    shares = torch.softmax((scores + prices(scores, sizes, 0.5)[:, None]) / 0.5, -1).sum(1)
    torch.testing.assert_close(shares, sizes.float().expand(2, -1), rtol=0.01, atol=0.5)


def test_widest_keeps_the_best_of_each_expert() -> None:
    logits = torch.tensor([[[1.0, 5.0], [3.0, 4.0], [2.0, 4.0], [0.0, 6.0]]])
    assert widest(logits, 2)[0].T.tolist() == [[False, True, True, False], [True, False, False, True]]
