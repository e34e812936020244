"""The budget while searching: ramp, loss and ratio by hand, and threshold masks that hit the target."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shapes import random_scores, sizes, small_structure, tiny_structure
from slimtune.prune.budget import budget_loss, kept_ratio, sampling_level, target_at, threshold_masks
from slimtune.prune.sampling import keep_probability

SMALL, TINY = small_structure(), tiny_structure()


def test_the_ramp_by_hand() -> None:
    values = [target_at(step, 10, 0.4, 0.5) for step in range(10)]
    assert values == pytest.approx([0.5**0.25, 0.5**0.5, 0.5**0.75] + [0.5] * 7)
    assert [target_at(step, 10, 0.0, 0.5) for step in (0, 9)] == [0.5, 0.5]
    assert target_at(9, 10, 1.0, 0.5) == 0.5
    assert target_at(0, 1, 0.4, 0.3) == 0.3


def test_the_budget_loss_by_hand() -> None:
    assert float(budget_loss(torch.tensor(1.0), 0.5)) == pytest.approx(math.log(2))
    assert float(budget_loss(torch.tensor(0.25), 0.5)) == pytest.approx(math.log(2))
    ratio = torch.tensor(0.8, requires_grad=True)
    budget_loss(ratio, 0.5).backward()
    assert float(ratio.grad) == pytest.approx(1 / 0.8)


@pytest.mark.parametrize("of", ["total", "block"])
def test_the_kept_ratio_by_hand_and_its_gradient(of: str) -> None:
    # a tiny layer: 4 groups of 1536 and 48 channels of 48 parameters; outside 10 x 16 + 16 + 3 x 2 x 16 = 272
    prunable, total = 3 * (4 * 1536 + 48 * 48), 3 * (4 * 1536 + 48 * 48) + 272
    assert (TINY.prunable_params, TINY.total_params) == (prunable, total)
    masks = {site: torch.ones(n) for site, n in sizes(TINY).items()}
    masks[0, "kv_group"][:3] = 0.0
    masks[2, "ffn"][:40] = 0.5
    leaves = {site: mask.requires_grad_() for site, mask in masks.items()}
    ratio = kept_ratio(leaves, TINY, of)
    gone = 3 * 1536 + 20 * 48
    expected = (prunable - gone) / prunable if of == "block" else (total - gone) / total
    assert float(ratio.detach()) == pytest.approx(expected, rel=1e-6)
    ratio.backward()
    whole = prunable if of == "block" else total
    assert torch.allclose(leaves[1, "kv_group"].grad, torch.full((4,), 1536 / whole))
    assert torch.allclose(leaves[1, "ffn"].grad, torch.full((48,), 48 / whole))


@given(seed=st.integers(0, 10**6), keep=st.floats(0.3, 1.0), of=st.sampled_from(["total", "block"]))
@settings(max_examples=30)
def test_threshold_masks_hit_the_target_within_one_unit(seed: int, keep: float, of: str) -> None:
    scores = random_scores(SMALL, seed, by_axis=1.0)
    masks = threshold_masks(scores, SMALL, keep, of)
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} and mask.sum() >= 1 for mask in masks.values())
    whole = SMALL.total_params if of == "total" else SMALL.prunable_params
    forced = sum(  # sites whose best unit lies below the common level are kept at one unit
        SMALL.layers[layer].unit_params[axis] for (layer, axis), mask in masks.items() if mask.sum() == 1
    )
    left = (keep - float(kept_ratio(masks, SMALL, of))) * whole
    rounding = 1e-6 * whole  # the ratio is fp32
    assert -forced - rounding <= left <= rounding + max(SMALL.layers[0].unit_params.values())
    for site, mask in masks.items():
        if 0 < mask.sum() < len(mask):
            assert scores[site][mask == 1].min() >= scores[site][mask == 0].max()


def test_threshold_masks_take_one_level_for_the_whole_model() -> None:
    scores = random_scores(TINY, 1)
    masks = threshold_masks(scores, TINY, 0.6, "block")
    kept = torch.cat([scores[site][masks[site] == 1] for site in masks if masks[site].sum() > 1])
    dropped = torch.cat([scores[site][masks[site] == 0] for site in masks])
    assert kept.min() >= dropped.max()


@pytest.mark.parametrize("keep", [0.4, 0.6, 0.9])
def test_uniform_masks_have_one_width_an_axis_and_keep_the_best(keep: float) -> None:
    scores = random_scores(SMALL, 3)
    masks = threshold_masks(scores, SMALL, keep, "block", uniform=True)
    for axis in ("kv_group", "ffn"):
        widths = {int(mask.sum()) for (_, other), mask in masks.items() if other == axis}
        assert len(widths) == 1
    for site, mask in masks.items():
        worst_kept = scores[site][mask == 1].min()
        assert (mask == 1).all() or worst_kept >= scores[site][mask == 0].max()
    free = threshold_masks(scores, SMALL, keep, "block")
    # the widths are rounded means: off by at most half a unit a layer
    slack = 0.5 * sum(sum(layer.unit_params.values()) for layer in SMALL.layers) / SMALL.prunable_params
    assert float(kept_ratio(masks, SMALL, "block")) == pytest.approx(float(kept_ratio(free, SMALL, "block")), abs=slack)


@given(
    seed=st.integers(0, 10**6),
    keep=st.floats(0.3, 0.999),
    spread=st.sampled_from([0.0, 0.1, 2.0, 30.0]),
    noise=st.sampled_from(["logistic", "gumbel"]),
)
@settings(max_examples=30)
def test_samples_at_the_level_keep_the_target_in_expectation(seed: int, keep: float, spread: float, noise: str) -> None:
    scores = random_scores(SMALL, seed, spread=spread, by_axis=1.0)
    level = sampling_level(scores, SMALL, keep, "block", noise)
    expected = {site: keep_probability(logits.double() - level, noise) for site, logits in scores.items()}
    assert float(kept_ratio(expected, SMALL, "block")) == pytest.approx(keep, abs=1e-5)


def test_the_level_of_a_target_of_one_keeps_everything() -> None:
    scores = random_scores(SMALL, 0)
    level = sampling_level(scores, SMALL, 1.0, "total", "logistic")
    assert all((keep_probability(logits - level, "logistic") > 1 - 1e-6).all() for logits in scores.values())


@pytest.mark.parametrize("noise", ["logistic", "gumbel"])
def test_the_levels_gradient_is_that_of_the_implicit_function(noise: str) -> None:
    scores = {site: logits.double() for site, logits in random_scores(TINY, 2).items()}

    def level(moved: dict[tuple[int, str], torch.Tensor]) -> torch.Tensor:
        return sampling_level(moved, TINY, 0.6, "block", noise)

    leaves = {site: logits.clone().requires_grad_() for site, logits in scores.items()}
    found = level(leaves)
    assert float(found.detach()) == float(level(scores))
    found.backward()
    assert sum(float(leaf.grad.sum()) for leaf in leaves.values()) == pytest.approx(1)  # a common shift shifts the level
    for site, unit in (((0, "kv_group"), 1), ((2, "ffn"), 7)):
        up, down = ({**scores, site: scores[site].clone()} for _ in range(2))
        up[site][unit] += 1e-3
        down[site][unit] -= 1e-3
        slope = float(level(up) - level(down)) / 2e-3
        assert float(leaves[site].grad[unit]) == pytest.approx(slope, rel=1e-3)
