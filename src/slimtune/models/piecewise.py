"""A model's weights a few at a time, so that no second model is held: cut values one by one, and fp32 as long as it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.structure.axes import Structure
from slimtune.structure.plan import Plan


@torch.no_grad()
def cut_values(model: nn.Module, structure: Structure, plan: Plan) -> Iterator[tuple[str, Tensor]]:
    """Names and values that the parameters of a plain ``model`` would have after ``surgery.cut``; it stays as it is.

    Raises:
        UserError: the plan does not fit ``structure``.
    """
    plan.check(structure)
    blocks, numbers = f"{structure.family.blocks}.", {layer: index for index, layer in enumerate(plan.layers)}
    linears = {row.path: row for row in structure.family.linears}
    for name, parameter in model.named_parameters():
        tensor: Tensor = parameter
        if not name.startswith(blocks):
            yield name, tensor
            continue
        number, _, inner = name.removeprefix(blocks).partition(".")
        layer = int(number)
        if layer not in numbers:
            continue
        row = linears.get(inner.rpartition(".")[0])
        for dim, side in ((0, row.out), (1, row.into)) if row else ():
            if side and dim < tensor.ndim and len(plan.kept[layer][side.axis]) < structure.layers[layer].units[side.axis]:
                keep = structure.indices(side, plan.kept[layer][side.axis])
                tensor = tensor.index_select(dim, torch.tensor(keep, device=tensor.device))
        yield f"{blocks}{numbers[layer]}.{inner}", tensor


@contextmanager
def in_fp32(model: nn.Module) -> Iterator[None]:
    """Inside, each module computes with its weights in fp32 and has them in their own type again afterwards.

    The numbers of ``model.float()``; what rests in 16 bits needs room for one weight more, not for two models.
    """
    resting: dict[nn.Module, list[Tensor]] = {}

    def widen(module: nn.Module, _: Any) -> None:
        resting[module] = [each.data for each in module.parameters(recurse=False)]
        for each in module.parameters(recurse=False):
            each.data = each.data.float()

    def rest(module: nn.Module, _: Any, __: Any) -> None:
        for each, data in zip(module.parameters(recurse=False), resting.pop(module), strict=True):
            each.data = data

    handles = []
    for module in model.modules():
        if any(each.dtype is not torch.float32 for each in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(widen))
            handles.append(module.register_forward_hook(rest, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
