"""Before a run: a two-layer random clone of the user's own config must prove that masked = cut."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from slimtune.errors import UserError
from slimtune.models.hooks import place_gates
from slimtune.models.load import attach_lora, structure_of
from slimtune.models.surgery import cut, merge_lora
from slimtune.sections import LoraConfig
from slimtune.structure.axes import AXES, Structure
from slimtune.structure.plan import Plan

LIMIT = 1e-4
"""Largest allowed difference of fp32 logits, relative to the largest logit."""


def shrunken(config: PreTrainedConfig) -> PreTrainedConfig:
    """Two layers, a small vocabulary, same widths and switches."""
    clone = copy.deepcopy(config)
    kinds = getattr(clone, "layer_types", None)
    if kinds:
        clone.layer_types = [kinds[0], kinds[-1]]
    clone.num_hidden_layers = 2
    clone.vocab_size = 128
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(clone, name, None) is not None:
            setattr(clone, name, 0)
    return clone


def random_plan(structure: Structure, seed: int) -> Plan:
    """About half of every axis, another half in every layer, at least one unit."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for layer in structure.layers:
        draw = {axis: torch.rand(layer.units[axis], generator=generator) < 0.5 for axis in AXES}
        for mask in draw.values():
            mask[int(torch.randint(len(mask), (1,), generator=generator))] = True
        kept.append({axis: mask.nonzero().flatten().tolist() for axis, mask in draw.items()})
    return Plan.of(structure, kept)


@torch.no_grad()
def self_check(config: PreTrainedConfig, seed: int = 0) -> float:
    """Compare masked and cut logits (with LoRA attached) on a shrunken clone.

    Returns:
        The largest difference over the largest logit.

    Raises:
        UserError: it exceeds ``LIMIT``; the family's row in the table does not describe this model.
    """
    clone = shrunken(config)
    structure = structure_of(clone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(clone, dtype=torch.float32).eval()
        model = attach_lora(model, structure, LoraConfig(rank=4))
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # biases and B start at zero: give them content
        tokens = torch.randint(clone.vocab_size, (1, 12))
    plan = random_plan(structure, seed)
    masks = {
        (layer, axis): torch.zeros(structure.layers[layer].units[axis]).index_fill_(0, torch.tensor(kept[axis]), 1.0)
        for layer, kept in enumerate(plan.kept)
        for axis in AXES
    }
    handles = place_gates(model, structure, lambda layer, axis: masks[layer, axis], lambda layer, axis: None)
    masked = model(input_ids=tokens).logits
    for handle in handles:
        handle.remove()
    cut(model, structure, plan)
    difference = (merge_lora(model)(input_ids=tokens).logits - masked).abs().max() / masked.abs().max()
    if not difference <= LIMIT:
        raise UserError(
            f"self-check failed for model_type {config.model_type!r}: masked and cut models differ by {difference:.1e} "
            f"(limit {LIMIT:.0e}); the structure table does not describe this model, see docs/add-a-family.md"
        )
    return float(difference)
