"""Weights a few at a time give the numbers of a whole second model, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch

from families import FAMILY_NAMES
from gated import logits_of, padded_sample, random_model, random_plan
from slimtune.models.piecewise import cut_values, in_fp32
from slimtune.models.surgery import cut, merge_lora
from slimtune.structure.plan import Plan

each_family = pytest.mark.parametrize("name", FAMILY_NAMES)


@each_family
def test_cut_values_are_those_of_a_cut(name: str) -> None:
    model, structure = random_model(name)
    kept = [dict(layer) for layer in random_plan(structure, 3).kept]
    dropped = [kept[0], {"kv_group": (), "ffn": ()}, kept[2]]  # a whole layer goes, and the last is counted anew
    for plan in (Plan.of(structure, kept), Plan.of(structure, dropped), Plan.uncut(structure)):
        found = {key: value.clone() for key, value in cut_values(model, structure, plan)}
        smaller = copy.deepcopy(model)
        cut(smaller, structure, plan)
        expected = dict(smaller.named_parameters())
        assert list(found) == list(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@each_family
def test_a_model_at_rest_in_16_bits_computes_as_one_in_fp32(name: str) -> None:
    model, _ = random_model(name)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    whole = copy.deepcopy(model).float()
    with in_fp32(model):
        found = logits_of(model, padded_sample())
    assert torch.equal(found, logits_of(whole, padded_sample()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_weights_rest_again_after_an_error() -> None:
    model, _ = random_model("llama-tied")
    model.bfloat16()
    with pytest.raises(IndexError), in_fp32(model):
        logits_of(model, {"input_ids": torch.tensor([[1, 10_000]])})
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_each_weight_is_merged_in_fp32_and_rounded_once(stored: torch.dtype, dtype: torch.dtype) -> None:
    model, _ = random_model("llama-tied", rank=3)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data if ".lora_" in name else parameter.data.to(stored)
    whole = merge_lora(copy.deepcopy(model).float())
    merged = merge_lora(model, dtype)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight  # type: ignore[union-attr]
    expected = dict(whole.named_parameters())
    assert [key for key, value in merged.named_parameters() if not torch.equal(value, expected[key].to(dtype))] == []
