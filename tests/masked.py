"""Tiny models with random masks inside heads: rotary pairs of q and k, and a module of value dimensions of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from experts import EXPERTS, divided
from gated import random_model
from slimtune.export import huggingface
from slimtune.models import moe
from slimtune.prune.router import Router
from slimtune.prune.token_masks import TokenMasks
from slimtune.structure.axes import Structure
from slimtune.structure.experts import host_of
from slimtune.structure.plan import Plan


@dataclass(frozen=True)
class Masked:
    """A dense model, and all that says what is masked of it."""

    model: Any
    structure: Structure
    plan: Plan
    router: Router
    values: TokenMasks | None

    @property
    def parts(self) -> tuple[Structure, Plan, Router, TokenMasks | None]:
        """For ``routed``."""
        return self.structure, self.plan, self.router, self.values


def random_pairs(structure: Structure, pairs: int) -> tuple[tuple[int, ...], ...]:
    """Each layer its own."""
    rng = torch.Generator().manual_seed(4)
    half = structure.head_dim // 2
    return tuple(tuple(sorted(torch.randperm(half, generator=rng)[:pairs].tolist())) for _ in range(len(structure.layers)))


def random_values(structure: Structure) -> TokenMasks:
    """Modules whose logits differ clearly from token to token."""
    torch.manual_seed(6)
    found = TokenMasks(structure.hidden, len(structure.layers), structure.head_dim).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            scale = 1.0 if name.startswith(("makes", "biases", "states")) else 0.3
            parameter.add_(scale * torch.randn_like(parameter))
    return found


def masked(name: str, shares: int = 0, top_k: int = 2, pairs: int = 3, values: int = 10, **overrides: Any) -> Masked:
    """The model is whole: no KV group is cut."""
    if name == "mistral" and shares:
        overrides["sliding_window"] = None
    model, structure = random_model(name, **overrides)
    plan = replace(divided(structure, shares, top_k), pairs=random_pairs(structure, pairs) if pairs else (), values=values)
    plan.check(structure)
    torch.manual_seed(5)
    router = Router(structure.hidden, len(structure.layers), EXPERTS, top_k, host_of(structure.family, shares > 0)).eval()
    with torch.no_grad():
        for weight in router.weights:
            weight.copy_(torch.randn(weight.shape))
    return Masked(model, structure, plan, router, random_values(structure) if values else None)


def written(of: Masked, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model that was written for it, loaded again."""
    config = moe.config_of(of.model.config, of.structure, moe.Layout.of(of.plan))
    routers = [weight.detach() for weight in of.router.weights]
    modules = of.values.tensors() if of.values else {}
    weights = moe.tensors_of(of.model, of.structure, of.plan, routers, modules)
    huggingface.write(folder, config, weights, dtype, lambda partial: None)
    found, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found.eval()
