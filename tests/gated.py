"""Tiny gated models: random biases, norms and LoRA factors, random masks that differ by layer, left-padded samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from families import tiny_config
from slimtune.models.load import attach_lora
from slimtune.prune.gates import Site
from slimtune.sections import LoraConfig
from slimtune.structure.axes import AXES, Structure
from slimtune.structure.families import describe
from slimtune.structure.plan import Plan

PADDED = (0, 4, 9, 13)
"""Padding tokens on the left of each row of ``padded_sample``."""


def random_model(
    name: str, seed: int = 0, rank: int | None = None, dropout: float = 0.0, **overrides: Any
) -> tuple[Any, Structure]:
    """An fp32 model in eval mode and its structure; every one-dimensional parameter and every LoRA factor is random."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name, **overrides)).eval()
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    structure = describe(model.config.to_dict(), shapes)
    if rank is not None:
        model = attach_lora(model, structure, LoraConfig(rank=rank, dropout=dropout)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 or "lora_B" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, structure


def random_plan(structure: Structure, seed: int) -> Plan:
    """Each layer keeps its own random number (at least one) of random units of each axis."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for layer in structure.layers:
        widths = {axis: int(torch.randint(1, layer.units[axis] + 1, (1,), generator=generator)) for axis in AXES}
        kept.append({axis: torch.randperm(layer.units[axis], generator=generator)[:n].tolist() for axis, n in widths.items()})
    return Plan.of(structure, kept)


def ones(structure: Structure) -> dict[Site, Tensor]:
    """Gates at one."""
    return {(layer, axis): torch.ones(structure.layers[layer].units[axis]) for layer, axis in structure.sites()}


def sample_ids(rows: int = 3, tokens: int = 20) -> Tensor:
    """[rows, tokens] words, longer than the sliding windows of the tiny models."""
    return torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(1))


def padded_sample() -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask`` with padding on the left, a different number in each row."""
    ids = sample_ids(len(PADDED))
    attention = torch.ones_like(ids)
    for row, padding in enumerate(PADDED):
        ids[row, :padding] = 0
        attention[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": attention}


@torch.no_grad()
def logits_of(model: Any, sample: dict[str, Tensor]) -> Tensor:
    """Logits of the real (not padding) positions, [N, V]."""
    return model(**sample).logits[sample["attention_mask"].bool()]


def greedy(model: Any, sample: dict[str, Tensor], tokens: int = 8) -> list[list[int]]:
    """``tokens`` greedy tokens after each row."""
    out = model.generate(**sample, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
    return out[:, sample["input_ids"].shape[1] :].tolist()
