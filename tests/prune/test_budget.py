"""The budget: ramp and loss by hand, threshold masks, and the exact, deterministic, rounded Plan on whole-model shapes."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shapes import large_structure, sizes, small_structure, tiny_structure
from slimtune.errors import UserError
from slimtune.prune.budget import (
    budget_loss,
    kept_ratio,
    masks_of,
    smallest_ratio,
    solve,
    target_at,
    threshold_masks,
)
from slimtune.prune.gates import Site
from slimtune.sections import BudgetConfig
from slimtune.structure.axes import Structure
from slimtune.structure.plan import Counts, Plan, count

SMALL, LARGE, TINY = small_structure(), large_structure(), tiny_structure()


def random_scores(
    structure: Structure, seed: int, spread: float = 1.0, by_axis: float = 0.0, by_site: float = 0.0
) -> dict[Site, Tensor]:
    """Normal scores whose level may differ by axis and by site; ``spread`` 0 makes all units of a site equal."""
    generator = torch.Generator().manual_seed(seed)
    level = {axis: by_axis * torch.randn((), generator=generator) for axis in ("kv_group", "ffn")}
    return {
        site: spread * torch.randn(n, generator=generator) + level[site[1]] + by_site * torch.randn((), generator=generator)
        for site, n in sizes(structure).items()
    }


def ratio_of(counts: Counts, of: str) -> float:
    return counts.total_ratio if of == "total" else counts.block_ratio


# --- while searching -------------------------------------------------------------------------------------------------


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


# --- the Plan --------------------------------------------------------------------------------------------------------


def check_plan(plan: Plan, counts: Counts, scores: dict[Site, Tensor], structure: Structure, multiple: int) -> None:
    """Counts are those of the Plan, no layer is empty, and each site keeps its best units."""
    assert counts == count(structure, plan)
    masks = masks_of(plan)
    for (layer, axis), mask in masks.items():
        full, width = len(mask), int(mask.sum())
        assert 1 <= width <= full
        if axis == "ffn":
            assert width % multiple == 0 or width == full
        if width < full:
            assert scores[layer, axis][mask == 1].min() >= scores[layer, axis][mask == 0].max()


@given(
    seed=st.integers(0, 10**6),
    part=st.floats(0.0, 1.0),
    of=st.sampled_from(["total", "block"]),
    spread=st.sampled_from([0.0, 0.01, 1.0, 5.0]),
    by_axis=st.sampled_from([0.0, 4.0]),
    by_site=st.sampled_from([0.0, 2.0]),
)
@settings(max_examples=60)
def test_the_plan_is_exact_on_a_44m_model(
    seed: int, part: float, of: str, spread: float, by_axis: float, by_site: float
) -> None:
    lowest = smallest_ratio(SMALL, of, 8)
    keep = lowest + part * (1 - lowest)
    scores = random_scores(SMALL, seed, spread, by_axis, by_site)
    plan, counts = solve(scores, SMALL, BudgetConfig(keep=keep, of=of))
    assert abs(ratio_of(counts, of) - keep) <= 0.002
    check_plan(plan, counts, scores, SMALL, 8)


@given(seed=st.integers(0, 10**6), part=st.floats(0.0, 1.0), of=st.sampled_from(["total", "block"]))
@settings(max_examples=8)
def test_the_plan_is_exact_on_an_8b_model(seed: int, part: float, of: str) -> None:
    lowest = smallest_ratio(LARGE, of, 128)
    keep = lowest + part * (1 - lowest)
    scores = random_scores(LARGE, seed, by_axis=2.0)
    for layout in ("per-layer", "uniform"):
        started = time.perf_counter()
        plan, counts = solve(scores, LARGE, BudgetConfig(keep=keep, of=of, layout=layout))
        assert time.perf_counter() - started < 10
        assert abs(ratio_of(counts, of) - keep) <= 0.002
        check_plan(plan, counts, scores, LARGE, 8)
        assert plan.is_uniform or layout == "per-layer"


@given(seed=st.integers(0, 10**6), part=st.floats(0.0, 1.0), of=st.sampled_from(["total", "block"]))
@settings(max_examples=30)
def test_uniform_plans_have_equal_widths(seed: int, part: float, of: str) -> None:
    lowest = smallest_ratio(SMALL, of, 4)
    keep = lowest + part * (1 - lowest)
    scores = random_scores(SMALL, seed, by_site=1.0)
    # steps of 8 channels in all layers at once are 0.42% of this small model's blocks, too coarse for the tolerance
    plan, counts = solve(scores, SMALL, BudgetConfig(keep=keep, of=of, layout="uniform", ffn_multiple=4))
    assert plan.is_uniform
    assert abs(ratio_of(counts, of) - keep) <= 0.002
    check_plan(plan, counts, scores, SMALL, 4)


@pytest.mark.parametrize("multiple", [1, 8, 64, 128])
def test_widths_are_multiples(multiple: int) -> None:
    scores = random_scores(SMALL, 3, by_site=1.0)
    plan, counts = solve(scores, SMALL, BudgetConfig(keep=0.6, ffn_multiple=multiple, tolerance=0.01))
    check_plan(plan, counts, scores, SMALL, multiple)
    assert len({len(layer["ffn"]) for layer in plan.kept}) > 1


def test_auto_takes_the_largest_multiple_that_meets_the_tolerance() -> None:
    scores = random_scores(SMALL, 3)
    wide, _ = solve(scores, SMALL, BudgetConfig(keep=0.6, tolerance=0.02))
    tight, _ = solve(scores, SMALL, BudgetConfig(keep=0.6, tolerance=3e-4))
    assert all(len(layer["ffn"]) % 128 == 0 for layer in wide.kept)
    assert not all(len(layer["ffn"]) % 128 == 0 for layer in tight.kept)


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_a_width_that_is_no_multiple_may_stay_whole(layout: str) -> None:
    structure = tiny_structure(ffn=50)
    scores = {(layer, axis): torch.full((n,), 9.0 if axis == "ffn" else -9.0) for (layer, axis), n in sizes(structure).items()}
    # all channels and one group of each layer's four: 50 x 48 + 1536 of 50 x 48 + 4 x 1536
    budget = BudgetConfig(keep=3936 / 8544, of="block", layout=layout, ffn_multiple=8)
    plan, _ = solve(scores, structure, budget)
    assert [len(layer["ffn"]) for layer in plan.kept] == [50] * 3


@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 1.0]), layout=st.sampled_from(["per-layer", "uniform"]))
@settings(max_examples=15)
def test_the_plan_is_deterministic(seed: int, spread: float, layout: str) -> None:
    scores = random_scores(TINY, seed, spread)
    budget = BudgetConfig(keep=0.6, of="block", layout=layout, ffn_multiple=1, tolerance=0.01)
    first, _ = solve(scores, TINY, budget)
    turned = {site: scores[site].clone().requires_grad_() for site in reversed(list(scores))}
    torch.manual_seed(seed)
    assert solve(turned, TINY, budget)[0].digest == first.digest


def test_ties_go_to_the_lower_index() -> None:
    scores = {site: torch.zeros(n) for site, n in sizes(TINY).items()}
    plan, _ = solve(scores, TINY, BudgetConfig(keep=0.6, of="block", ffn_multiple=1))
    for layer in plan.kept:
        for units in layer.values():
            assert units == tuple(range(len(units)))


@given(
    seed=st.integers(0, 10**6),
    multiple=st.sampled_from([1, 4, 8]),
    layout=st.sampled_from(["per-layer", "uniform"]),
    unit=st.integers(0, 47),
    layer=st.integers(0, 2),
    rise=st.floats(0.0, 5.0),
)
@settings(max_examples=60)
def test_a_kept_unit_stays_when_its_score_rises(
    seed: int, multiple: int, layout: str, unit: int, layer: int, rise: float
) -> None:
    scores = random_scores(TINY, seed)
    budget = BudgetConfig(keep=0.6, of="block", layout=layout, ffn_multiple=multiple, tolerance=0.05)
    plan, _ = solve(scores, TINY, budget)
    for axis in ("ffn", "kv_group"):
        kept = plan.kept[layer][axis]
        chosen = kept[unit % len(kept)]
        raised = {site: value.clone() for site, value in scores.items()}
        raised[layer, axis][chosen] += rise
        assert chosen in solve(raised, TINY, budget)[0].kept[layer][axis]


def test_more_budget_keeps_more() -> None:
    scores = random_scores(SMALL, 2, by_site=0.5)
    totals = [solve(scores, SMALL, BudgetConfig(keep=0.9), keep)[1].total for keep in (0.3, 0.5, 0.7, 0.9, 1.0)]
    assert totals == sorted(totals)
    assert totals[-1] == SMALL.total_params


@pytest.mark.parametrize("of", ["total", "block"])
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_keeping_everything_is_the_uncut_plan(of: str, layout: str) -> None:
    plan, counts = solve(random_scores(SMALL, 0), SMALL, BudgetConfig(keep=1.0, of=of, layout=layout))
    assert plan == Plan.uncut(SMALL)
    assert (counts.total_ratio, counts.block_ratio) == (1.0, 1.0)


# --- what cannot be met ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_a_budget_below_the_constant_part_says_what_is_reachable(layout: str) -> None:
    with pytest.raises(UserError, match=r"budget\.keep=0\.2 of total cannot be met.* 0\.249.*budget\.of=block"):
        solve(random_scores(SMALL, 0), SMALL, BudgetConfig(keep=0.2, layout=layout))


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_a_rounding_too_coarse_says_so(layout: str) -> None:
    budget = BudgetConfig(keep=0.602, ffn_multiple=128, tolerance=1e-4, layout=layout)
    with pytest.raises(
        UserError, match=rf"budget\.ffn_multiple=128.*layout={layout} \(the nearest is 0\.\d+\).*smaller multiple"
    ):
        solve(random_scores(SMALL, 0), SMALL, budget)


def test_uniform_needs_layers_that_are_alike() -> None:
    layers = (*TINY.layers[:2], tiny_structure(ffn=40).layers[0])
    uneven = Structure(TINY.family, TINY.head_dim, TINY.group, layers, TINY.total_params - 8 * 48)
    scores = random_scores(uneven, 0)
    with pytest.raises(UserError, match="layout=uniform needs"):
        solve(scores, uneven, BudgetConfig(keep=0.6, layout="uniform"))
    solve(scores, uneven, BudgetConfig(keep=0.6, of="block", ffn_multiple=1))


def test_masks_of_a_plan() -> None:
    plan = Plan.of(TINY, [{"kv_group": [1, 3], "ffn": [0, 47]}] * 3)
    masks = masks_of(plan)
    assert masks[1, "kv_group"].tolist() == [0, 1, 0, 1]
    assert masks[2, "ffn"].nonzero().flatten().tolist() == [0, 47]
    assert {mask.dtype for mask in masks.values()} == {torch.float32}
