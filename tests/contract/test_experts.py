"""Experts of every family that has a stock class for them: what gates and a router compute is what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from experts import choices, converted, divided, written
from families import tiny_config
from gated import PADDED, padded_sample, random_model, sample_ids
from slimtune.errors import UserError
from slimtune.methods.masked import masks_of, routed
from slimtune.models import moe
from slimtune.models.buffers import exact_buffers
from slimtune.models.hooks import place_gates
from slimtune.models.load import structure_of
from slimtune.prune.gates import MaskBank
from slimtune.prune.router import Router
from slimtune.structure.axes import FFN
from slimtune.structure.experts import HOSTS, host_of
from slimtune.structure.families import FAMILIES
from slimtune.structure.plan import Plan, count

SOURCES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
CLASSES = {
    ("llama", 0): "MixtralForCausalLM",
    ("llama-tied", 0): "MixtralForCausalLM",
    ("mistral", 0): "MixtralForCausalLM",
    ("qwen2", 0): "Qwen2MoeForCausalLM",
    ("qwen3", 0): "Qwen3MoeForCausalLM",
    ("llama", 2): "Glm4MoeForCausalLM",
    ("llama-tied", 2): "Glm4MoeForCausalLM",
    ("mistral", 2): "Glm4MoeForCausalLM",
    ("qwen2", 2): "Glm4MoeForCausalLM",
    ("qwen3", 2): "Dots1ForCausalLM",
}


@pytest.mark.parametrize(("top_k", "head"), [(1, 16), (2, 16), (4, 24)])
@pytest.mark.parametrize(("name", "shares"), CLASSES)
def test_what_is_masked_is_what_is_written(name: str, shares: int, top_k: int, head: int, tmp_path: Path) -> None:
    """Heads of 24 together are wider than the model is."""
    model, structure, plan, router = converted(name, shares, top_k, groups=1, config={"head_dim": head})
    ids = sample_ids()
    with torch.no_grad(), routed(model, structure, plan, router):
        expected = model(input_ids=ids).logits
    stock = written(model, structure, plan, router, tmp_path / "m", torch.float32)
    with torch.no_grad():
        found = stock(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert type(stock).__name__ == CLASSES[name, shares]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["architectures"] == [CLASSES[name, shares]]
    assert type(stock).__module__.startswith("transformers.")
    assert not list((tmp_path / "m").glob("*.py"))
    assert sum(each.numel() for each in stock.parameters()) == count(structure, plan).total
    assert used(stock, top_k) == count(structure, plan, active=True).total


def used(model: torch.nn.Module, top_k: int) -> int:
    """What a token uses of a written model's tensors: of those of routed experts, [E, ...], ``top_k`` rows."""
    experts = [name for name, _ in model.named_parameters() if ".experts." in name]
    assert experts
    return sum(each[0].numel() * top_k if name in experts else each.numel() for name, each in model.named_parameters())


def test_overlapping_experts_of_different_widths_are_filled_up_with_zeros(tmp_path: Path) -> None:
    model, structure, plan, router = converted("llama", 0, 1, overlap=True)
    ids = sample_ids()
    with torch.no_grad(), routed(model, structure, plan, router):
        expected = model(input_ids=ids).logits
    stock = written(model, structure, plan, router, tmp_path / "m", torch.float32)
    assert stock.config.intermediate_size == 36
    with torch.no_grad():
        assert (stock(input_ids=ids).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    counts = count(structure, plan)
    assert sum(each.numel() for each in stock.parameters()) == counts.total
    assert counts.block > count(structure, plan, active=True).block


@pytest.mark.parametrize(("name", "shares"), [("llama", 0), ("llama", 2), ("qwen3", 0), ("qwen3", 2), ("qwen2", 0)])
def test_in_bfloat16_tokens_go_to_the_same_experts(name: str, shares: int, tmp_path: Path) -> None:
    model, structure, plan, router = converted(name, shares, 2)
    exact_buffers(model.bfloat16(), model.config)  # or rotary frequencies were rounded as well
    router.rounded(torch.bfloat16)
    ids = torch.randint(3, 97, (16, 128), generator=torch.Generator().manual_seed(7))
    read, seen = list[torch.Tensor](), list[torch.Tensor]()
    logits_of, choose = router.logits, router.choose

    def reading(layer: int, x: torch.Tensor) -> torch.Tensor:
        read.append(x)
        return logits_of(layer, x)

    def choosing(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen, weights = choose(logits)
        seen.append(chosen.flatten(0, 1).sort(-1).values)
        return chosen, weights

    router.logits, router.choose = reading, choosing  # type: ignore[method-assign]
    with torch.no_grad(), routed(model, structure, plan, router):
        model(input_ids=ids)
    stock = written(model, structure, plan, router, tmp_path / "m", torch.bfloat16)
    own = torch.stack([agreement(a, b) for a, b in zip(seen, choices(stock, ids), strict=True)])
    given = torch.stack([agreement(a, b) for a, b in zip(seen, choices(stock, ids, read), strict=True)])
    assert given.min() >= 0.999  # each layer by what the masked one reads
    assert own[0] >= 0.999
    assert own.min() >= 0.98  # its own inputs: sums of other orders are rounded otherwise, and near ties fall otherwise then


def agreement(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """The part of the tokens [N, k] that use the same experts."""
    return (ours == theirs).all(-1).float().mean()


@pytest.mark.parametrize("name", SOURCES)
def test_open_gates_are_the_base_bit_for_bit(name: str) -> None:
    model, structure = random_model(name)
    ids = sample_ids()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        bank = MaskBank()
        bank.router = Router(structure.hidden, len(structure.layers), 5, 2, host_of(structure.family, shared=False))
        place_gates(model, structure, bank.consumer, bank.base, None, bank.follow)
        assert torch.equal(model(input_ids=ids).logits, before)
        everything = torch.zeros(6, structure.layers[0].units[FFN])
        everything[0] = 1.0
        bank.close({(layer, FFN): everything for layer in range(len(structure.layers))})
        assert torch.equal(model(input_ids=ids).logits, before)
        everything[:, 0] = 0.0
        assert not torch.equal(model(input_ids=ids).logits, before)
        everything[0], everything[1:] = 0.0, 1.0  # whichever expert a token uses, it has all channels
        bank.router = Router(structure.hidden, len(structure.layers), 5, 1, host_of(structure.family, shared=False))
        assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("shares", [0, 2])
def test_padding_changes_no_token(shares: int) -> None:
    model, structure, plan, router = converted("llama", shares, 2)
    router.noise = 1.0  # which is for training alone
    batch = padded_sample()
    with torch.no_grad(), routed(model, structure, plan, router):
        together = model(**batch).logits
        again = model(**batch).logits
        for row, padding in enumerate(PADDED):
            alone = model(input_ids=batch["input_ids"][row : row + 1, padding:]).logits[0]
            torch.testing.assert_close(together[row, padding:], alone, atol=2e-5, rtol=1e-4)
    assert torch.equal(together, again)


@pytest.mark.parametrize("shares", [0, 2])
def test_the_beginning_token_is_attended_to_and_has_experts_like_any_other(shares: int) -> None:
    model, structure, plan, router = converted("llama", shares, 2)
    ids = sample_ids()
    ids[:, 0] = model.config.bos_token_id
    other = ids.clone()
    other[:, 0] = model.config.bos_token_id + 1
    with torch.no_grad():
        opened = model(input_ids=ids).logits
        with routed(model, structure, plan, router):
            gated, without = model(input_ids=ids).logits, model(input_ids=other).logits
    assert (gated[:, 0] - opened[:, 0]).abs().max() > 1e-3, "it has all channels"
    assert ((gated - without)[:, 1:].abs().amax((1, 2)) > 1e-3).all(), "later tokens do not see it"


def test_families_without_a_stock_class_are_refused() -> None:
    for name in ("phi", "gemma", "gemma2", "gemma3_text", "granite"):
        with pytest.raises(UserError, match="no stock class holds experts"):
            host_of(FAMILIES[name], shared=True)
    for family in FAMILIES.values():
        assert all(host in HOSTS for host in family.experts or ())


@pytest.mark.parametrize("shares", [0, 2])
def test_biases_that_the_stock_class_lacks_are_refused(shares: int) -> None:
    config = tiny_config("llama-bias")
    structure = structure_of(config)
    with pytest.raises(UserError, match=r"differ in .*; use method=atp"):
        moe.config_of(config, structure, moe.Layout(5, 2, 8, shares, 2))


def test_a_window_that_the_stock_class_lacks_is_refused() -> None:
    config = tiny_config("mistral")
    with pytest.raises(UserError, match=r"no sliding window.*moe\.shared=false"):
        moe.config_of(config, structure_of(config), moe.Layout(5, 2, 8, 2, 2))
    assert moe.config_of(config, structure_of(config), moe.Layout(5, 2, 8, 0, 2)).sliding_window == 16


def test_a_plan_with_experts_goes_through_its_file() -> None:
    structure = structure_of(tiny_config("llama"))
    plan = divided(structure, 2, 2, groups=1)
    back = Plan.from_json(plan.to_json())
    assert back == plan
    assert back.digest == plan.digest
    assert plan.digest != plan.for_good.digest
    other = divided(structure, 2, 1, groups=1)
    assert other.digest != plan.digest
    wide = structure_of(tiny_config("llama", intermediate_size=1024))
    assert Plan.from_json(divided(wide, 2, 2).to_json()).experts == divided(wide, 2, 2).experts


@pytest.mark.parametrize("change", ["other channels", "twice", "too many"])
def test_plans_that_do_not_hold_together_are_refused(change: str) -> None:
    from dataclasses import replace

    structure = structure_of(tiny_config("llama"))
    plan = divided(structure, 2, 2)
    first = plan.experts[0]
    spoiled = {
        "other channels": replace(first, shared=first.shared[1:]),
        "twice": replace(first, shared=(first.shared[0], *first.shared)),
        "too many": first,
    }[change]
    broken = replace(plan, experts=(spoiled, *plan.experts[1:]), top_k=6 if change == "too many" else 2)
    with pytest.raises(UserError, match="the plan's layer 0"):
        broken.check(structure)


def test_the_stock_configs_carry_what_the_base_says() -> None:
    for name in SOURCES:
        base = tiny_config(name, **({"sliding_window": None} if name == "mistral" else {}))
        for shares in (0, 2):
            made = moe.config_of(base, structure_of(base), moe.Layout(5, 2, 8, shares, 2))
            raw, found = base.to_dict(), type(made).from_dict(made.to_dict()).to_dict()
            for key in ("rms_norm_eps", "tie_word_embeddings", "vocab_size", "max_position_embeddings", "hidden_act"):
                assert found[key] == raw[key], (name, shares, key)
            assert found["rope_parameters"]["rope_theta"] == raw["rope_parameters"]["rope_theta"]
            assert found["num_experts_per_tok"] == 2
            assert found["intermediate_size"] == (8 if found["model_type"] == "mixtral" else raw["intermediate_size"])
            assert found.get("num_nextn_predict_layers", 0) == 0, "which are not written"


def test_masks_of_a_plan_are_its_divisions() -> None:
    structure = structure_of(tiny_config("llama"))
    plan = divided(structure, 2, 2)
    masks = masks_of(plan, torch.device("cpu"))
    for layer, division in enumerate(plan.experts):
        rows = [mask.nonzero().flatten().tolist() for mask in masks[layer, FFN]]
        assert rows == [list(division.shared), *map(list, division.routed)]
