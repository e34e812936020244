"""Least squares at a cut: what removed inputs of a consumer did is taken over, as far as it is linear in them, by the kept.

For a consumer with weight W and inputs x = (x_k kept, x_r removed) the D that minimises
``E |W_r x_r - D x_k|^2 + damping |D|^2`` is ``W_r G_rk (G_kk + damping I)^-1``, G = E x x^T; D is added to W_k. This is the
reconstruction of one layer that SparseGPT (Frantar & Alistarh 2023) makes with an order, in one solve.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from slimtune.models.surgery import linears_of
from slimtune.prune.gates import Site
from slimtune.structure.axes import Structure
from slimtune.structure.plan import Plan


def second_moments(totals: dict[Site, Tensor], real: Tensor) -> Callable[[int, str, Tensor], None]:
    """A watcher of consumers' inputs that adds x x^T over the positions ``real`` [B, T] to ``totals`` {site: [d, d]}, fp32."""

    def see(layer: int, axis: str, values: Tensor) -> None:
        with torch.autocast(values.device.type, enabled=False):
            found = values[real].float()
            gram = found.T @ found
        totals[layer, axis] = totals.get((layer, axis), 0) + gram

    return see


@torch.no_grad()
def refit(model: nn.Module, structure: Structure, plan: Plan, moments: Mapping[Site, Tensor], damping: float) -> None:
    """Before a cut: add D to the kept columns of every consumer's base weight, LoRA's part of W_r counted.

    Args:
        moments: {(layer, axis): G up to a factor, of the consumer's inputs [units * rows, units * rows]}.
        damping: in units of the mean diagonal of G_kk.
    """
    for layer, row, module in linears_of(model, structure):
        if not row.into:
            continue
        inner: Any = module.base_layer if isinstance(module, LoraLayer) else module
        device = inner.weight.device
        kept = torch.tensor(structure.indices(row.into, plan.kept[layer][row.into.axis]), device=device)
        gone = torch.ones(inner.in_features, dtype=torch.bool, device=device)
        gone[kept] = False
        if not gone.any() or not len(kept):
            continue
        weight = inner.weight.double()
        if isinstance(module, LoraLayer):
            for name in module.active_adapters:
                weight = weight + module.get_delta_weight(name).double()
        gram = moments[layer, row.into.axis].double()
        inside = gram[kept][:, kept]
        inside = inside + damping * inside.diagonal().mean() * torch.eye(len(kept), dtype=gram.dtype, device=device)
        right = weight[:, gone] @ gram[gone][:, kept]
        inner.weight[:, kept] += torch.linalg.solve(inside, right.T).T.to(inner.weight.dtype)
