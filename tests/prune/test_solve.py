"""The final Plan: exact, deterministic and rounded on whole-model shapes, or refused with what could be met."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shapes import large_structure, random_scores, sizes, small_structure, tiny_structure
from slimtune.errors import UserError
from slimtune.prune.budget import masks_of
from slimtune.prune.gates import Site
from slimtune.prune.solve import smallest_ratio, solve
from slimtune.sections import BudgetConfig
from slimtune.structure.axes import Structure
from slimtune.structure.plan import Counts, Plan, count

SMALL, LARGE, TINY = small_structure(), large_structure(), tiny_structure()


def ratio_of(counts: Counts, of: str) -> float:
    return counts.total_ratio if of == "total" else counts.block_ratio


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


@pytest.mark.parametrize("keep", [0.953, 0.97, 0.986, 0.995])
def test_the_plan_is_exact_where_only_kv_groups_are_left_to_choose(keep: float) -> None:
    # a group is 0.45% of the model, so whole groups alone would miss by up to 0.22%
    scores = {site: torch.full((n,), 1.0 if site[1] == "ffn" else -5.0) for site, n in sizes(SMALL).items()}
    plan, counts = solve(scores, SMALL, BudgetConfig(keep=keep, ffn_multiple=8))
    assert abs(counts.total_ratio - keep) <= 0.5 * 8 * 1536 / SMALL.total_params + 1e-9
    check_plan(plan, counts, scores, SMALL, 8)


@given(seed=st.integers(0, 10**6), keep=st.floats(0.3, 1.0))
@settings(max_examples=60)
def test_a_short_last_block_is_taken_last(seed: int, keep: float) -> None:
    structure = tiny_structure(ffn=50)
    scores = random_scores(structure, seed)
    plan, counts = solve(scores, structure, BudgetConfig(keep=keep, of="block", ffn_multiple=8, tolerance=0.09))
    check_plan(plan, counts, scores, structure, 8)


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


def test_uniform_plans_prefer_head_counts_that_the_stock_config_takes() -> None:
    picky = replace(SMALL, family=replace(SMALL.family, whole_heads=True), hidden=50, group=1)
    chosen = []
    for seed in range(20):
        scores = random_scores(SMALL, seed, by_site=1.0)
        plans = [solve(scores, each, BudgetConfig(keep=0.6, layout="uniform", tolerance=0.02))[0] for each in (SMALL, picky)]
        chosen.append([len(plan.kept[0]["kv_group"]) for plan in plans])
    assert all(50 % groups == 0 for _, groups in chosen)
    assert any(50 % groups for groups, _ in chosen)


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
    totals = [solve(scores, SMALL, BudgetConfig(keep=keep))[1].total for keep in (0.3, 0.5, 0.7, 0.9, 1.0)]
    assert totals == sorted(totals)
    assert totals[-1] == SMALL.total_params


@pytest.mark.parametrize("of", ["total", "block"])
@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_keeping_everything_is_the_uncut_plan(of: str, layout: str) -> None:
    plan, counts = solve(random_scores(SMALL, 0), SMALL, BudgetConfig(keep=1.0, of=of, layout=layout))
    assert plan == Plan.uncut(SMALL)
    assert (counts.total_ratio, counts.block_ratio) == (1.0, 1.0)


@given(
    seed=st.integers(0, 10**6),
    keep=st.floats(0.35, 0.95),
    multiple=st.sampled_from([64, 128, 256]),
    layout=st.sampled_from(["per-layer", "uniform"]),
    by_axis=st.sampled_from([0.0, 4.0, -4.0]),
)
@settings(max_examples=60)
def test_what_can_be_met_before_the_search_can_be_met_after_it(
    seed: int, keep: float, multiple: int, layout: str, by_axis: float
) -> None:
    # equal widths of whole blocks move the ratio by up to 5% at once: at the default tolerance few budgets could be met
    tolerance = 0.01 if layout == "uniform" else 0.002
    budget = BudgetConfig(keep=keep, ffn_multiple=multiple, layout=layout, tolerance=tolerance)

    def feasible(scores: dict[Site, Tensor]) -> bool:
        try:
            solve(scores, SMALL, budget)
        except UserError:
            return False
        return True

    zeros = {site: torch.zeros(n) for site, n in sizes(SMALL).items()}
    if feasible(zeros):
        assert feasible(random_scores(SMALL, seed, by_axis=by_axis))


@pytest.mark.parametrize(("seed", "by_axis"), [(0, 4.0), (3, 4.0), (4, -4.0), (6, -4.0)])
def test_a_few_kv_groups_are_traded_where_wide_blocks_would_miss_the_budget(
    seed: int, by_axis: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = random_scores(SMALL, seed, by_axis=by_axis)
    budget = BudgetConfig(keep=0.6, ffn_multiple=256)
    _, counts = solve(scores, SMALL, budget)
    assert abs(counts.total_ratio - 0.6) <= 0.002
    monkeypatch.setattr("slimtune.prune.solve._trade", lambda *_: None)
    with pytest.raises(UserError, match=r"cannot be met within budget\.tolerance"):
        solve(scores, SMALL, budget)


# --- what cannot be met ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["per-layer", "uniform"])
def test_a_budget_below_the_constant_part_says_what_is_reachable(layout: str) -> None:
    with pytest.raises(UserError, match=r"budget\.keep=0\.2 of total cannot be met.* 0\.247.*budget\.of=block"):
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
    uneven = Structure(TINY.family, TINY.head_dim, TINY.group, layers, TINY.total_params - 8 * 48, TINY.hidden)
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
