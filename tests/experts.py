"""Tiny dense models whose channels are divided at random among experts, and the stock classes that they become."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gated import random_model
from slimtune.export import huggingface
from slimtune.models import moe
from slimtune.models.surgery import cut
from slimtune.prune.router import Router
from slimtune.structure.axes import FFN, KV_GROUP, Structure
from slimtune.structure.experts import Division, host_of
from slimtune.structure.plan import Plan

EXPERTS = 5


def divided(structure: Structure, shares: int, top_k: int, groups: int | None = None, overlap: bool = False) -> Plan:
    """Every layer its own random division: a shared expert of ``shares`` widths of 8, five routed ones, the rest left out."""
    rng, kept, divisions = torch.Generator().manual_seed(3), [], []
    for layer in structure.layers:
        order = torch.randperm(layer.units[FFN], generator=rng).tolist()
        parts = [order[8 * part : 8 * part + 8] for part in range(shares + EXPERTS)]
        if overlap:  # of different widths
            parts = [torch.randperm(layer.units[FFN], generator=rng)[: 20 + 4 * part].tolist() for part in range(EXPERTS)]
        divisions.append(Division.of(order[: 8 * shares], parts[shares:]))
        every = layer.units[KV_GROUP]
        kept.append(torch.randperm(every, generator=rng)[: groups or every].sort().values.tolist())
    return Plan.divided(structure, kept, divisions, top_k)


def converted(
    name: str, shares: int, top_k: int, config: dict[str, Any] | None = None, **more: Any
) -> tuple[Any, Structure, Plan, Router]:
    """A dense model with cut attention, its structure before, the division of its channels, and routers far from ties."""
    overrides = {"sliding_window": None} if name == "mistral" and shares else {}
    model, structure = random_model(name, **overrides, **(config or {}))
    plan = divided(structure, shares, top_k, **more)
    cut(model, structure, plan.for_good)
    host = host_of(structure.family, shares > 0)
    router = Router(structure.hidden, len(structure.layers), EXPERTS, top_k, host).eval()
    with torch.no_grad():
        for weight in router.weights:
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)))
    return model, structure, plan, router


def written(model: Any, structure: Structure, plan: Plan, router: Router, folder: Path, dtype: torch.dtype) -> Any:
    """The stock model that was written for it, loaded again by transformers alone."""
    config = moe.config_of(model.config, structure, moe.Layout.of(plan))  # which a cut leaves as it was
    weights = moe.tensors_of(model, structure, plan, [weight.detach() for weight in router.weights])
    huggingface.write(folder, config, weights, dtype, lambda partial: None)
    found, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return found.eval()


@torch.no_grad()
def choices(model: Any, ids: Tensor, given: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The experts that a stock model chooses, by layer [tokens, top_k], sorted; of routers' ``given`` inputs [B, T, D]."""
    found: list[Tensor] = []
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    assert len(routers) == model.config.num_hidden_layers
    handles = [
        router.register_forward_hook(lambda _, __, output: found.append(output[2].sort(-1).values)) for router in routers
    ]
    for router, x in zip(routers, given or (), strict=bool(given)):
        handles.append(router.register_forward_pre_hook(lambda _, args, x=x: (x.view_as(args[0]), *args[1:])))
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return found
