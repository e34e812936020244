"""The contract of every family: the table is whole, masked = cut, counts are true, gates at one change nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from families import FAMILY_NAMES, tiny_config
from gated import greedy, logits_of, ones, padded_sample, random_model, random_plan, sample_ids
from slimtune.errors import UserError
from slimtune.models import selfcheck
from slimtune.models.hooks import place_gates
from slimtune.models.load import structure_of
from slimtune.models.surgery import blocks_of, cut, linears_of, lora_slices, merge_lora
from slimtune.prune.budget import kept_ratio, masks_of
from slimtune.prune.gates import MaskBank
from slimtune.prune.penalties import proximal
from slimtune.structure.axes import Structure
from slimtune.structure.families import FAMILIES
from slimtune.structure.plan import Plan, count

TOLERANCE = 1e-5
MERGED = 1e-4
"""Folding LoRA into the weights rounds in another order, which gemma2's post-norms amplify."""

each_family = pytest.mark.parametrize("name", FAMILY_NAMES)


def test_every_family_of_the_table_has_a_tiny_config() -> None:
    assert {tiny_config(name).model_type for name in FAMILY_NAMES} == set(FAMILIES)


@each_family
def test_every_linear_of_a_block_is_in_the_table(name: str) -> None:
    model, structure = random_model(name)
    listed = {row.path for row in structure.family.linears}
    for block in blocks_of(model, structure):
        assert {path for path, module in block.named_modules() if isinstance(module, nn.Linear)} == listed


@each_family
def test_the_structure_counts_what_the_model_holds(name: str) -> None:
    model, structure = random_model(name)
    assert structure.total_params == sum(parameter.numel() for parameter in model.parameters())
    assert len(structure.layers) == 3
    assert all(layer.units == {"kv_group": 2, "ffn": 96} for layer in structure.layers)
    assert (structure.group, structure.head_dim) == (2, 16)
    # by hand, for the widths of the tiny configs: q, k, v, o and two or three MLP matrices of 64
    matrices = 3 * sum(module.weight.numel() for layer, _, module in linears_of(model, structure) if layer == 0)
    biases = sum(module.bias.numel() for _, row, module in linears_of(model, structure) if row.out and module.bias is not None)
    assert structure.prunable_params == matrices + biases
    assert structure_of(model.config) == structure


@pytest.mark.parametrize("rank", [None, 3], ids=["plain", "lora"])
@each_family
def test_masked_equals_cut(name: str, rank: int | None) -> None:
    sample = padded_sample()
    for seed in range(2):
        model, structure = random_model(name, seed, rank)
        plan = random_plan(structure, seed + 10)
        untouched = logits_of(model, sample)
        masked, tokens = _masked(model, structure, plan)
        assert (masked - untouched).abs().max() > 1e-2, "the masks have no effect: this test proves nothing"
        cut(model, structure, plan)
        assert (logits_of(model, sample) - masked).abs().max() <= TOLERANCE
        assert greedy(model, sample) == tokens
        assert (logits_of(merge_lora(model), sample) - masked).abs().max() <= MERGED


def _masked(model: nn.Module, structure: Structure, plan: Plan) -> tuple[torch.Tensor, list[list[int]]]:
    bank = MaskBank()
    handles = place_gates(model, structure, bank.consumer, bank.base)
    bank.close(masks_of(plan))
    masked, tokens = logits_of(model, padded_sample()), greedy(model, padded_sample())
    for handle in handles:
        handle.remove()
    return masked, tokens


@given(seed=st.integers(0, 2**31), name=st.sampled_from(FAMILY_NAMES), rank=st.sampled_from([None, 2]))
@settings(max_examples=15)
def test_masked_equals_cut_for_any_masks(seed: int, name: str, rank: int | None) -> None:
    model, structure = random_model(name, seed, rank, num_hidden_layers=2, layer_types=None)
    plan = random_plan(structure, seed)
    masked, _ = _masked(model, structure, plan)
    cut(model, structure, plan)
    assert (logits_of(model, padded_sample()) - masked).abs().max() <= TOLERANCE


@each_family
def test_multi_query_models_are_cut_in_the_mlp_alone(name: str) -> None:
    model, structure = random_model(name, num_key_value_heads=1)
    plan = Plan.of(structure, [{"kv_group": [0], "ffn": range(layer, 96, 3)} for layer in range(3)])
    masked, _ = _masked(model, structure, plan)
    cut(model, structure, plan)
    assert structure.group == 4
    assert (logits_of(model, padded_sample()) - masked).abs().max() <= TOLERANCE


@each_family
def test_each_sample_may_have_its_own_masks(name: str) -> None:
    model, structure = random_model(name)
    plans = [random_plan(structure, seed) for seed in (1, 2, 3)]
    bank = MaskBank()
    place_gates(model, structure, bank.consumer, bank.base)
    single = []
    with torch.no_grad():
        for row, plan in enumerate(plans):
            bank.close(masks_of(plan))
            single.append(model(input_ids=sample_ids()[row : row + 1]).logits)
        every = [masks_of(plan) for plan in plans]
        bank.close({site: torch.stack([masks[site] for masks in every]) for site in structure.sites()})
        together = model(input_ids=sample_ids()).logits
    assert (together - torch.cat(single)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("rank", [None, 3], ids=["plain", "lora"])
@each_family
def test_open_gates_and_gates_at_one_leave_the_model_bit_for_bit(name: str, rank: int | None) -> None:
    model, structure = random_model(name, rank=rank)
    untouched = logits_of(model, padded_sample())
    bank = MaskBank()
    handles = place_gates(model, structure, bank.consumer, bank.base)
    assert torch.equal(logits_of(model, padded_sample()), untouched)
    for where in ("consumer", "base"):
        bank.close(ones(structure), where)
        assert torch.equal(logits_of(model, padded_sample()), untouched)
    bank.open()
    assert torch.equal(logits_of(model, padded_sample()), untouched)
    bank.close(masks_of(random_plan(structure, 0)))
    assert not torch.equal(logits_of(model, padded_sample()), untouched)
    for handle in handles:
        handle.remove()
    assert torch.equal(logits_of(model, padded_sample()), untouched)


@each_family
def test_lora_aware_gates_equal_hard_ones_once_pruned_lora_entries_are_zero(name: str) -> None:
    model, structure = random_model(name, rank=3)
    plan = random_plan(structure, 5)
    masks, bank = masks_of(plan), MaskBank()
    place_gates(model, structure, bank.consumer, bank.base)
    bank.close(masks, "base")
    leaking = logits_of(model, padded_sample())
    bank.close(masks, "consumer")
    hard = logits_of(model, padded_sample())
    assert (leaking - hard).abs().max() > 1e-3, "no leak to close: this test proves nothing"
    proximal(lora_slices(model, structure), masks, 0.0, share=1.0)  # leaves exactly zero
    assert (logits_of(model, padded_sample()) - hard).abs().max() <= TOLERANCE
    bank.close(masks, "base")
    assert (logits_of(model, padded_sample()) - hard).abs().max() <= TOLERANCE


@each_family
def test_the_budget_of_a_mask_is_what_is_left_after_the_cut(name: str) -> None:
    model, structure = random_model(name)
    for seed in range(3):
        model, structure = random_model(name)
        plan = random_plan(structure, seed)
        counts, masks = count(structure, plan), masks_of(plan)
        cut(model, structure, plan)
        left = sum(parameter.numel() for parameter in model.parameters())
        assert counts.total == left
        assert counts.block == left - structure.constant_params
        for of, ratio in (("total", counts.total_ratio), ("block", counts.block_ratio)):
            assert float(kept_ratio(masks, structure, of)) == pytest.approx(ratio, rel=1e-6)
        for _, row, module in linears_of(model, structure):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape), row.path


@each_family
def test_an_uncut_plan_changes_nothing(name: str) -> None:
    model, structure = random_model(name, rank=2)
    untouched = logits_of(model, padded_sample())
    assert cut(model, structure, Plan.uncut(structure)) == []
    assert torch.equal(logits_of(model, padded_sample()), untouched)


@each_family
def test_self_check_passes(name: str) -> None:
    before = torch.random.get_rng_state()
    config = tiny_config(name)
    keys = config.to_dict()
    assert selfcheck.self_check(config, seed=1) <= 1e-5
    assert config.to_dict() == keys
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["llama-bias", "phi", "gemma3_text"])
@pytest.mark.parametrize("fault", ["no gate on the MLP", "gates in another order", "a cut of other units", "biases", "B"])
def test_self_check_fails_when_the_table_is_wrong(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def place(model, structure, consumer, base):  # type: ignore[no-untyped-def]
        def wrong(layer: int, axis: str) -> torch.Tensor | None:
            mask = consumer(layer, axis)
            if fault == "gates in another order":
                return mask.roll(1)
            return None if axis == "ffn" else mask

        return place_gates(model, structure, wrong, base)

    def cut_others(model, structure, plan):  # type: ignore[no-untyped-def]
        kept = [
            {axis: [units[axis] - 1 - unit for unit in layer[axis]] for axis in layer}
            for layer, units in zip(plan.kept, plan.full, strict=True)
        ]
        return cut(model, structure, Plan.of(structure, kept))

    def cut_then_mix(model, structure, plan):  # type: ignore[no-untyped-def]
        cut(model, structure, plan)
        for _, row, module in linears_of(model, structure):
            mixed = module.base_layer.bias if fault == "biases" else module.lora_B["default"].weight
            if row.out and mixed is not None:
                mixed.copy_(mixed.roll(1, 0))

    if fault in ("biases", "B"):
        monkeypatch.setattr(selfcheck, "cut", cut_then_mix)
    elif fault == "a cut of other units":
        monkeypatch.setattr(selfcheck, "cut", cut_others)
    else:
        monkeypatch.setattr(selfcheck, "place_gates", place)
    with pytest.raises(UserError, match=r"self-check failed.*add-a-family"):
        selfcheck.self_check(tiny_config(name))
