from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from slimtune.errors import UserError
from slimtune.models.load import load_config, structure_of
from slimtune.prune.shape import Shape, active_ratio, groups_of, shape_of, stored_more
from slimtune.sections import BudgetConfig, ModelConfig, MoeConfig
from slimtune.structure.axes import Structure
from slimtune.structure.experts import Division
from slimtune.structure.plan import Plan, count


@pytest.fixture(scope="module")
def llama3() -> Structure:
    """Of Llama-3-8B, with two layers."""
    return structure_of(
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            num_hidden_layers=2,
            vocab_size=128,
        )
    )


@pytest.mark.parametrize("keep", [0.8, 0.7, 0.6, 0.5])
@pytest.mark.parametrize("moe", [{}, {"shared": False}, {"experts": "overlap"}, {"top_k": 8}, {"groups": "all"}])
def test_a_token_uses_what_the_budget_says(llama3: Structure, keep: float, moe: dict[str, Any]) -> None:
    budget = BudgetConfig(keep=keep, of="block")
    shape = shape_of(llama3, budget, MoeConfig(**moe))
    assert abs(active_ratio(llama3, shape, "block") - keep) <= budget.tolerance
    assert shape.width % 8 == 0
    assert shape.dropped >= 0
    assert (shape.shares > 0) == ("shared" not in moe and moe.get("experts") != "overlap")
    assert sum(shape.sizes(1.0)) == 14336 or shape.overlap


@pytest.mark.parametrize("keep", [0.8, 0.5])
@pytest.mark.parametrize(
    "moe", [{"attention": "pairs"}, {"attention": "tokens"}, {"attention": "tokens", "experts": "overlap"}]
)
@pytest.mark.parametrize("of", ["block", "total"])
def test_masks_inside_heads_count_as_a_plan_counts_them(llama3: Structure, keep: float, moe: dict[str, Any], of: Any) -> None:
    budget, config = BudgetConfig(keep=keep, of=of), MoeConfig(**moe)
    shape = shape_of(llama3, budget, config)
    assert (shape.groups, shape.pairs) == (8, {0.8: 58, 0.5: 48}[keep])
    assert shape.values == (2 * shape.pairs - (keep == 0.8) if config.attention == "tokens" else 0)
    first = shape.shares * shape.width
    shared = range(first)
    starts = [0 if shape.overlap else first + each * shape.width for each in range(shape.number)]
    routed = [range(start, start + shape.width) for start in starts]
    pairs = [range(shape.pairs)] * 2
    plan = Plan.divided(llama3, [range(8)] * 2, [Division.of(shared, routed)] * 2, shape.top_k, pairs, shape.values)
    counts = count(llama3, plan, active=True)
    ratio = counts.total_ratio if of == "total" else counts.block_ratio
    assert ratio == pytest.approx(active_ratio(llama3, shape, of), abs=1e-12)
    assert abs(ratio - keep) <= budget.tolerance


@pytest.fixture(scope="module")
def small() -> Structure:
    """Of the embedded base."""
    return structure_of(load_config(ModelConfig(path="builtin:base-10m")))


@pytest.mark.parametrize("shared", [True, False])
def test_what_number_auto_finds_is_never_more_to_store_than_the_dense_model(small: Structure, shared: bool) -> None:
    told = 0
    for keep in (0.5, 0.7, 0.9, 0.94, 0.965, 0.98, 0.99, 0.996):
        budget = BudgetConfig(keep=keep, of="block")
        try:
            shape = shape_of(small, budget, MoeConfig(shared=shared))
        except UserError as error:
            told += "more to store than the dense model; ask for less" in str(error)
            continue
        assert not stored_more(small, shape)
    assert bool(told) == shared


def test_all_of_the_model_is_no_budget(small: Structure) -> None:
    with pytest.raises(UserError, match=r"budget\.keep=1\.0 leaves a router nothing to choose; .* less than 1"):
        shape_of(small, BudgetConfig(keep=1.0, of="block"), MoeConfig())


def test_groups_do_not_go_where_masks_do(llama3: Structure) -> None:
    with pytest.raises(UserError, match=r"moe\.groups=4 is for moe\.attention=groups, and it is pairs: leave it out"):
        shape_of(llama3, BudgetConfig(keep=0.6, of="block"), MoeConfig(groups=4, attention="pairs"))
    all_ = shape_of(llama3, BudgetConfig(keep=0.6, of="block"), MoeConfig(groups="all", attention="pairs"))
    assert (all_.groups, all_.pairs, all_.values) == (8, 51, 0)


@pytest.mark.parametrize("multiple", [64, 128, 256])
def test_widths_are_multiples_of_what_is_asked_for(llama3: Structure, multiple: int) -> None:
    shape = shape_of(llama3, BudgetConfig(keep=0.6, of="block", ffn_multiple=multiple, tolerance=0.01), MoeConfig())
    assert shape.width % multiple == 0


@pytest.mark.parametrize("experts", ["partition", "overlap"])
@pytest.mark.parametrize("keep", [0.8, 0.7, 0.6, 0.5])
def test_multiples_of_128_meet_a_budget_with_a_kv_group_more_or_fewer(llama3: Structure, keep: float, experts: Any) -> None:
    budget = BudgetConfig(keep=keep, of="block", ffn_multiple=128)
    shape, wished = shape_of(llama3, budget, MoeConfig(experts=experts)), groups_of(llama3, budget, MoeConfig())
    assert shape.width % 128 == 0
    assert abs(active_ratio(llama3, shape, "block") - keep) <= budget.tolerance == 0.002
    assert abs(shape.groups - wished) <= 1


def test_groups_that_are_asked_for_stay(llama3: Structure) -> None:
    budget = BudgetConfig(keep=0.7, of="block", ffn_multiple=128)
    assert shape_of(llama3, budget, MoeConfig()).groups == 6
    with pytest.raises(UserError, match=r"budget\.keep=0\.7 of block cannot be met.*moe\.groups=7"):
        shape_of(llama3, budget, MoeConfig(groups=7))


def test_on_the_way_all_channels_are_shared_at_first(llama3: Structure) -> None:
    shape = shape_of(llama3, BudgetConfig(keep=0.6, of="block"), MoeConfig())
    first, half = shape.sizes(0.0), shape.sizes(0.5)
    assert first[0] == 14336
    assert sum(first[1:]) == 0
    assert sum(half) == 14336
    assert half[1] == round(shape.width / 2)


def test_attention_loses_half_the_part_that_a_token_does_without(llama3: Structure) -> None:
    found = {keep: groups_of(llama3, BudgetConfig(keep=keep, of="block"), MoeConfig()) for keep in (0.9, 0.75, 0.5, 0.25)}
    assert found == {0.9: 8, 0.75: 7, 0.5: 6, 0.25: 5}
    assert groups_of(llama3, BudgetConfig(keep=0.5, of="block"), MoeConfig(groups="all")) == 8
    with pytest.raises(UserError, match=r"moe\.groups=9 is more than the 8 KV groups"):
        groups_of(llama3, BudgetConfig(), MoeConfig(groups=9))


def test_a_budget_that_no_shape_meets_names_the_nearest(llama3: Structure) -> None:
    with pytest.raises(UserError, match=r"budget\.keep=0\.05 of block cannot be met.*the nearest part that a token can use is"):
        shape_of(llama3, BudgetConfig(keep=0.05, of="block"), MoeConfig())
    with pytest.raises(UserError, match=r"moe\.number=3 is less than the 4 experts"):
        shape_of(llama3, BudgetConfig(keep=0.6, of="block"), MoeConfig(number=3, top_k=4))


@pytest.mark.parametrize(
    ("budget", "moe", "said"),
    [
        ({"keep": 0.6}, {"number": 5000}, r"no experts for budget\.keep=0\.6: .*moe\.number=5000\); change budget\.keep"),
        ({"ffn_multiple": 9000}, {"shared": False}, r"and 4 routed experts of 9000 or more have to fit in"),
        ({"keep": 0.6}, {"number": 4}, r"moe\.number=4 experts are as many as a token uses \(moe\.top_k\)"),
    ],
)
def test_where_there_is_no_shape_at_all_the_keys_are_named(llama3: Structure, budget: Any, moe: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        shape_of(llama3, BudgetConfig(of="block", **budget), MoeConfig(**moe))


def test_layers_of_different_widths_are_refused(llama3: Structure) -> None:
    from dataclasses import replace

    first = llama3.layers[0]
    other = replace(first, units={**first.units, "ffn": 128})
    with pytest.raises(UserError, match="whose layers are all alike"):
        shape_of(replace(llama3, layers=(first, other)), BudgetConfig(), MoeConfig())


def test_what_is_left_out_counts_against_a_shape() -> None:
    assert Shape(8, 2, 100, 1, 4, 1000).dropped == 100
    assert Shape(8, 2, 100, 1, 4, 1000, overlap=True).dropped == 0
    assert Shape(8, 2, 100, 1, 4, 1000).active == 300
