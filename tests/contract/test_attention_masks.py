"""Masks inside heads: what is masked is what is written, and what is left out is not there."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from families import tiny_config
from gated import PADDED, greedy, padded_sample, random_model, sample_ids
from masked import Masked, masked, random_pairs, random_values, written
from slimtune.errors import UserError
from slimtune.methods.masked import head_masks, routed
from slimtune.models import moe
from slimtune.models.head_hooks import place_head_masks
from slimtune.models.hooks import place_gates
from slimtune.models.load import structure_of
from slimtune.prune.gates import MaskBank
from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.structure.experts import Division
from slimtune.structure.heads import PAIR, VALUE, attention_params, check_pairs, module_params
from slimtune.structure.plan import Plan, count

SIZES = {"wide heads": {"head_dim": 32}, "": {}}
WRITTEN = {
    ("llama", 0, ""): "MixtralForCausalLM",
    ("llama", 2, "wide heads"): "Glm4MoeForCausalLM",
    ("llama-tied", 0, ""): "MixtralForCausalLM",
    ("mistral", 0, ""): "MixtralForCausalLM",
    ("qwen2", 0, ""): "Qwen2MoeForCausalLM",
    ("qwen2", 2, ""): "Glm4MoeForCausalLM",
}


@torch.no_grad()
def logits(of: Masked, **sample: Tensor) -> Tensor:
    with routed(of.model, *of.parts):
        found: Tensor = of.model(**sample).logits
    return found


@pytest.mark.parametrize("values", [0, 10])
@pytest.mark.parametrize(("name", "shares", "size"), WRITTEN)
def test_what_is_masked_is_what_is_written(name: str, shares: int, size: str, values: int, tmp_path: Path) -> None:
    of, ids = masked(name, shares, values=values, **SIZES[size]), sample_ids()
    expected = logits(of, input_ids=ids)
    found = written(of, tmp_path / "m")
    with torch.no_grad():
        again = found(input_ids=ids).logits
    assert (again - expected).abs().max() < 1e-5 * expected.abs().max()
    stock = WRITTEN[name, shares, size]
    assert type(found).__name__ == (f"Slimtune{stock}" if values else stock)
    assert [each.name for each in (tmp_path / "m").glob("*.py")] == (["modeling_slimtune_values.py"] if values else [])
    assert sum(each.numel() for each in found.parameters()) == count(of.structure, of.plan).total
    whole = logits(replace(of, plan=replace(of.plan, pairs=(), values=0), values=None), input_ids=ids)
    assert (whole - expected).abs().max() > 0.01 * expected.abs().max()


def test_used_parameters_are_those_that_are_not_zero_and_the_modules(tmp_path: Path) -> None:
    """Of q, k and their biases by the written tensors; of v and o the part of the dimensions that a token has."""
    of = masked("qwen2", values=10)
    found = dict(written(of, tmp_path / "m").named_parameters())
    block = 0
    for name, tensor in found.items():
        if ".self_attn." not in name:
            continue
        if "q_proj" in name or "k_proj" in name:
            rows = (tensor if tensor.ndim == 1 else tensor.abs().sum(1)).count_nonzero()
            block += int(rows) * tensor[0].numel()
        elif "value_mask" in name:
            block += tensor.numel()
        else:
            assert tensor.numel() % 16 == 0
            block += tensor.numel() * 10 // 16
    layers, experts = of.structure.layers, of.plan.experts
    for layer, division in zip(layers, experts, strict=True):
        block += division.used(2) * layer.unit_params[FFN] + 64 * (5 + 1 + 3 * 64)
        parts = 8 * layer.pair_params + 16 * layer.value_params
        assert parts == layer.units[KV_GROUP] * layer.unit_params[KV_GROUP]
        assert attention_params(of.structure, layer, 2, 3, 0) == 3 * layer.pair_params + 16 * layer.value_params
    assert count(of.structure, of.plan, active=True).block == block
    modules = sum(tensor.numel() for name, tensor in found.items() if "value_mask" in name)
    assert of.values is not None
    assert modules == sum(each.numel() for each in of.values.parameters()) == 3 * module_params(of.structure)


def test_open_masks_are_the_base_bit_for_bit() -> None:
    model, structure = random_model("llama")
    ids, bank = sample_ids(), MaskBank()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        bank.values = random_values(structure)
        place_gates(model, structure, bank.consumer, bank.base, None, bank.follow)
        place_head_masks(model, structure, bank.head)
        assert torch.equal(model(input_ids=ids).logits, before)
        bank.close({(0, PAIR): torch.ones(8)})
        assert torch.equal(model(input_ids=ids).logits, before)
        bank.close({(0, PAIR): torch.tensor([0.0] + 7 * [1.0])})
        assert not torch.equal(model(input_ids=ids).logits, before)
        bank.values.configure(15, 1.0)
        bank.close({(0, VALUE): torch.empty(0)})
        assert not torch.equal(model(input_ids=ids).logits, before)
        bank.open()
        assert torch.equal(model(input_ids=ids).logits, before)


def test_all_pairs_and_all_dimensions_change_nothing() -> None:
    of, ids = masked("llama", pairs=8, values=16), sample_ids()
    without = logits(replace(of, plan=replace(of.plan, pairs=(), values=0), values=None), input_ids=ids)
    torch.testing.assert_close(logits(of, input_ids=ids), without, atol=1e-6, rtol=1e-6)


def by_hand(of: Masked, layer: int, x: Tensor) -> Tensor:
    """Attention of a layer with pairs removed from q and k, and every token's values by its own mask."""
    attention, hd, kept = of.model.model.layers[layer].self_attn, of.structure.head_dim, list(of.plan.pairs[layer])
    entries = torch.tensor([*kept, *(each + hd // 2 for each in kept)])
    q, k, v = (getattr(attention, name)(x).unflatten(-1, (-1, hd)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    cos, sin = of.model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
    turned = apply_rotary_pos_emb(q[..., entries], k[..., entries], cos[..., entries], sin[..., entries])
    query, key = turned[0], turned[1].repeat_interleave(of.structure.group, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(hd)  # the trained scale, and not that of what is left
    scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    on = torch.ones(*x.shape[:2], hd)
    if of.values:
        own = of.values.logits(layer, x, of.values.states[layer])
        on = (own >= own.topk(of.plan.values, -1).values[..., -1:]).float()
    seen = v * on[:, None]
    out = scores.softmax(-1) @ seen.repeat_interleave(of.structure.group, 1) * on[:, None]
    found: Tensor = attention.o_proj(out.transpose(1, 2).flatten(2))
    return found


@pytest.mark.parametrize("values", [0, 10])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_attention_by_hand(name: str, values: int) -> None:
    """Of a token's values those dimensions are added that both it and the token that looks at it have."""
    of, seen = masked(name, values=values), dict[str, Tensor]()
    attention = of.model.model.layers[1].self_attn
    handle = attention.register_forward_hook(
        lambda _, args, kwargs, output: seen.update(x=kwargs["hidden_states"], out=output[0]), with_kwargs=True
    )
    logits(of, input_ids=sample_ids())
    handle.remove()
    with torch.no_grad():
        torch.testing.assert_close(seen["out"], by_hand(of, 1, seen["x"]), atol=1e-6, rtol=1e-5)


def test_one_row_is_four_rows_with_padding() -> None:
    of, batch = masked("llama"), padded_sample()
    together = logits(of, **batch)
    assert torch.equal(together, logits(of, **batch))
    for row, padding in enumerate(PADDED):
        alone = logits(of, input_ids=batch["input_ids"][row : row + 1, padding:])[0]
        torch.testing.assert_close(together[row, padding:], alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "shares"), [("llama", 0), ("qwen2", 0), ("llama", 2)])
def test_the_written_class_goes_on_with_a_cache(name: str, shares: int, tmp_path: Path) -> None:
    found, sample = written(masked(name, shares), tmp_path / "m"), padded_sample()
    with_cache = greedy(found, sample)
    found.generation_config.use_cache = False
    assert greedy(found, sample) == with_cache
    other = copy.deepcopy(found)  # whose masks are its own
    with torch.no_grad():
        before = found(**sample).logits
        for layer in other.model.layers:
            layer.self_attn.value_mask.make.bias.neg_()
        assert torch.equal(found(**sample).logits, before)
        assert not torch.equal(other(**sample).logits, before)
        body = AutoModel.from_pretrained(tmp_path / "m").eval()
        hidden = body(**sample).last_hidden_state
        torch.testing.assert_close(found.lm_head(hidden), before)


def test_lora_and_other_linears_in_the_place_of_projections_are_masked_too(tmp_path: Path) -> None:
    """PEFT puts its own around them, quantisers others in their place: what they give must not escape the mask."""
    of = masked("llama", values=10)
    found, ids = written(of, tmp_path / "m"), sample_ids()
    with torch.no_grad():
        before = found(input_ids=ids).logits
    tuned = get_peft_model(found, LoraConfig(r=2, target_modules=["v_proj", "o_proj"]))
    with torch.no_grad():
        torch.testing.assert_close(tuned(input_ids=ids).logits, before)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        attention = tuned.base_model.model.model.layers[0].self_attn
        seen: dict[str, Tensor] = {}
        attention.v_proj.register_forward_hook(lambda _, args, output: seen.update(x=args[0], v=output))
        attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(o=args[0]))
        tuned(input_ids=ids)
    off = attention.value_mask(seen["x"]) == 0
    assert off.float().mean() == 1 - 10 / 16
    for heads in (seen["v"].unflatten(-1, (-1, 16)), seen["o"].unflatten(-1, (-1, 16))):
        assert heads.transpose(-1, -2)[off].abs().max() == 0
        assert heads.transpose(-1, -2)[~off].abs().min() > 0
    other = written(of, tmp_path / "again")
    for layer in other.model.layers:
        own = layer.self_attn.v_proj
        layer.self_attn.v_proj = nn.Linear(own.in_features, own.out_features, bias=False)
        layer.self_attn.v_proj.weight = own.weight
    with torch.no_grad():
        assert torch.equal(other(input_ids=ids).logits, before)
        assert torch.equal(copy.deepcopy(other)(input_ids=ids).logits, before)


def test_in_bfloat16_masks_are_those_of_the_rounded_module(tmp_path: Path) -> None:
    of = masked("llama", values=10)
    assert of.values is not None
    of.values.rounded(torch.bfloat16)
    found = written(of, tmp_path / "m", torch.bfloat16)
    mask, x = found.model.layers[0].self_attn.value_mask, torch.randn(2, 30, 64).bfloat16()
    of.values.configure(10, 1.0)
    with torch.no_grad():
        assert torch.equal(mask.logits(x), of.values.logits(0, x, of.values.states[0]))
        assert torch.equal(mask(x), of.values.mask(0, x, of.values.states[0]))
        assert torch.equal(mask(x).sum(-1), torch.full((2, 30), 10.0))


def changed(plan: Plan, **parts: Any) -> Plan:
    return replace(plan, **parts)


def test_a_plan_with_masks_goes_through_its_file() -> None:
    of = masked("llama")
    back = Plan.from_json(of.plan.to_json())
    assert (back, back.digest) == (of.plan, of.plan.digest)
    bare = replace(of.plan, pairs=(), values=0)
    assert len({each.digest for each in (of.plan, bare, replace(of.plan, values=0), replace(of.plan, values=9))}) == 4
    assert "pairs" not in bare.to_json()
    assert "values" not in bare.to_json()
    assert of.plan.for_good == bare.for_good


def test_plans_whose_masks_do_not_fit_are_refused() -> None:
    of = masked("llama")
    plan, structure = of.plan, of.structure
    first = plan.pairs[0]
    for broken, told in (
        (changed(plan, values=17), "17 value dimensions are not of a head's 16"),
        (changed(plan, pairs=plan.pairs[1:]), "not equally many in each of 3 layers"),
        (changed(plan, pairs=(first[1:], *plan.pairs[1:])), "not equally many"),
        (changed(plan, pairs=((*first[:-1], 8), *plan.pairs[1:])), r"leaves 0\.\.7"),
        (changed(plan, pairs=((first[0], first[0], first[1]), *plan.pairs[1:])), "repeats one"),
        (changed(Plan.uncut(structure), values=4), "no experts"),
    ):
        with pytest.raises(UserError, match=told):
            broken.check(structure)
    divisions = [Division.of(each.shared, each.routed) for each in plan.experts]
    with pytest.raises(UserError, match="fewer KV groups"):
        Plan.divided(structure, [[0]] * 3, divisions, 2, plan.pairs)


@pytest.mark.parametrize(
    ("name", "more", "told"),
    [
        ("qwen3", {}, "'qwen3' models norm q and k"),
        ("gemma3_text", {}, "'gemma3_text' models norm q and k"),
        ("phi", {}, "do not turn whole heads"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "a part of 0.5",
        ),
    ],
)
def test_heads_that_do_not_turn_whole_in_pairs_are_refused(name: str, more: dict[str, Any], told: str) -> None:
    config = tiny_config(name, **more)
    with pytest.raises(UserError, match=rf"moe\.attention=pairs leaves out.*{told}.*use moe\.attention=groups"):
        check_pairs(structure_of(config), config.to_dict(), "moe.attention=pairs")


def test_a_class_with_norms_on_q_and_k_has_no_form_with_masks() -> None:
    config = tiny_config("qwen3")
    with pytest.raises(UserError, match=r"qwen3_moe has no form with masks.*moe\.attention=groups"):
        moe.config_of(config, structure_of(config), moe.Layout(5, 2, 8, 0, 2, values=10))


def test_masks_of_a_plan() -> None:
    structure = structure_of(tiny_config("llama"))
    pairs = random_pairs(structure, 3)
    masks = head_masks(replace(Plan.uncut(structure), pairs=pairs), structure, torch.device("cpu"))
    assert {site: tuple(mask.nonzero().flatten().tolist()) for site, mask in masks.items()} == {
        (layer, PAIR): kept for layer, kept in enumerate(pairs)
    }
