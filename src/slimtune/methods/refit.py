"""At the decision: o_proj and down_proj fitted anew by least squares, so that what is left adds what the whole added.

Of a consumer with weight W and inputs x, of which gates leave y = m x, the W + D that minimises
``E |W x - (W + D) y|^2 + damping |D|^2`` has ``D = W E (x - y) y^T (E y y^T + damping)^-1``. Where m is the same for all tokens
that is ``prune.least_squares``; here a router chooses it for each.
Shapes: N tokens, d inputs of a consumer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from slimtune.methods.passes import Passes
from slimtune.models.surgery import linears_of
from slimtune.prune.gates import MaskBank, Site
from slimtune.prune.least_squares import WIDE
from slimtune.structure.axes import Side, Structure
from slimtune.train.session import Batches, Session


@torch.no_grad()
def refit(session: Session, model: nn.Module, bank: MaskBank, batches: Batches, steps: int, damping: float) -> int:
    """Fit all consumers under the closed gates of ``bank``, in place; the tokens read.

    Layers whose moments do not fit in memory together come one part after another, each read anew.
    """
    passes, layers = Passes(session, model, batches, steps), len(session.structure.layers)
    together = _together(session)
    for first in range(0, layers, together):
        _refit(session, model, bank, passes, range(first, min(layers, first + together)), damping)
    return passes.tokens


def _together(session: Session) -> int:
    """Layers whose moments may lie on the device at once: in half of what is free there, the same of all processes."""
    layers = session.structure.layers
    if session.device.type != "cuda":
        return len(layers)
    rows = [row.into for row in session.structure.family.linears if row.into]
    widths = [layers[0].units[side.axis] * session.structure.rows(side) for side in rows]
    free = torch.tensor(float(torch.cuda.mem_get_info(session.device)[0]), device=session.device)
    if session.accelerator.num_processes > 1:
        torch.distributed.all_reduce(free, torch.distributed.ReduceOp.MIN)
    return max(1, min(len(layers), int(float(free) / 2 / sum(8 * width**2 for width in widths))))


def _refit(session: Session, model: nn.Module, bank: MaskBank, passes: Passes, layers: range, damping: float) -> None:
    structure = session.structure
    sides: dict[str, Side] = {row.into.axis: row.into for row in structure.family.linears if row.into}
    left: dict[Site, Tensor] = {}
    gone: dict[Site, Tensor] = {}

    def watchers(real: Tensor) -> dict[str, Any]:
        at = real.flatten().nonzero().flatten()

        def see(layer: int, axis: str, x: Tensor) -> None:
            mask = bank.consumer(layer, axis) if layer in layers else None
            if mask is None:
                return
            spread = mask.repeat_interleave(structure.rows(sides[axis]), dim=-1) if mask.ndim == 1 else mask.flatten(0, 1)[at]
            whole = x.flatten(0, 1)[at].float()
            with torch.autocast(x.device.type, enabled=False):
                kept = whole * spread
                found = (kept.T @ kept, (whole - kept).T @ kept)
            for sums, value in zip((left, gone), found, strict=True):
                sums[layer, axis] = sums[layer, axis].add_(value) if (layer, axis) in sums else value

        return {"consumers": see}

    passes.run(watchers)
    for layer, row, module in linears_of(model, structure):
        if row.into and (layer, row.into.axis) in left:
            site = (layer, row.into.axis)
            moments, missing = (session.accelerator.reduce(sums.pop(site)) for sums in (left, gone))
            inner: Any = module.base_layer if isinstance(module, LoraLayer) else module
            change = _correction(_effective(module), moments, missing, damping).to(inner.weight)
            inner.weight = _frozen(inner.weight + change)


def taken_refit(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """The weights of all consumers, by layer and path: of a model whose attention is cut already."""
    return {f"{layer}.{path}": inner.weight.detach() for layer, path, inner in _consumers(model, structure)}


@torch.no_grad()
def put_refit(model: nn.Module, structure: Structure, saved: dict[str, Tensor]) -> None:
    """Give the consumers what ``taken_refit`` took."""
    for layer, path, inner in _consumers(model, structure):
        inner.weight = _frozen(saved[f"{layer}.{path}"].to(inner.weight))


def _consumers(model: nn.Module, structure: Structure) -> Iterator[tuple[int, str, Any]]:
    for layer, row, module in linears_of(model, structure):
        if row.into:
            yield layer, row.path, module.base_layer if isinstance(module, LoraLayer) else module


def _frozen(weight: Tensor) -> nn.Parameter:
    """Another parameter: a teacher may share the one that was there."""
    return nn.Parameter(weight, requires_grad=False)


def _effective(module: Any) -> Tensor:
    """The weight with LoRA merged, fp32."""
    if not isinstance(module, LoraLayer):
        weight: Tensor = module.weight.float()
        return weight
    found: Tensor = module.base_layer.weight.float()
    for name in module.active_adapters:
        left, right = module.lora_B[name].weight, module.lora_A[name].weight
        found = found + float(module.scaling[name]) * left.float() @ right.float()
    return found


def _correction(weight: Tensor, moments: Tensor, missing: Tensor, damping: float) -> Tensor:
    """D [out, d], by ``E y y^T`` and ``E (x - y) y^T`` [d, d] up to one factor."""
    exact = torch.float64 if len(moments) <= WIDE else torch.float32
    inside = moments.to(exact)
    damped = damping * inside.diagonal().mean() + torch.finfo(torch.float32).tiny
    inside.diagonal().add_(damped)
    added = weight.to(exact) @ missing.to(exact)
    return torch.cholesky_solve(added.T, torch.linalg.cholesky(inside)).T
