"""The only code that changes a model for good: cut by a Plan, merge LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from slimtune.errors import UserError
from slimtune.models.weights import dense, like
from slimtune.structure.axes import AXES, Linear, Structure
from slimtune.structure.families import check_biases
from slimtune.structure.plan import Plan


def blocks_of(model: nn.Module, structure: Structure) -> list[nn.Module]:
    """The decoder blocks, under PEFT or not."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return list(base.get_submodule(structure.family.blocks))


def checkpoint_fewer(model: nn.Module, structure: Structure, part: float) -> None:
    """Leave the last blocks out of activation checkpointing; those are the first in a backward pass, and freed first.

    Args:
        part: of the blocks for which nothing changes.
    """
    blocks: list[Any] = blocks_of(model, structure)
    for block in blocks[round(part * len(blocks)) :]:
        block.gradient_checkpointing = False


def linears_of(model: nn.Module, structure: Structure) -> Iterator[tuple[int, Linear, nn.Module]]:
    """(layer, row of the table, module) for every linear; the module is the PEFT wrapper where there is one."""
    for index, block in enumerate(blocks_of(model, structure)):
        for row in structure.family.linears:
            yield index, row, block.get_submodule(row.path)


def producers_of(model: nn.Module, structure: Structure) -> Iterator[tuple[int, str, nn.Module]]:
    """(layer, axis, the first of its producers): they all read the same input, before any consumer of it runs."""
    first = {axis: structure.family.producers(axis)[0].path for axis in AXES}
    for layer, row, module in linears_of(model, structure):
        if row.out and row.path == first[row.out.axis]:
            yield layer, row.out.axis, module


@torch.no_grad()
def compensate(model: nn.Module, structure: Structure, plan: Plan, means: Mapping[tuple[int, str], Tensor]) -> None:
    """Before a cut: put what removed inputs add on average into the consumers' biases (FLAP, An et al. 2024, section 3.3).

    Every linear gets a bias then, most of them zero, because the stock configs give all of a part's linears one or none.

    Args:
        means: {(layer, axis): mean of each entry of the consumer's input [units * rows]}.

    Raises:
        UserError: the family's config has no key for such biases.
    """
    check_biases(structure.family)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    for key in structure.family.bias_keys.values():
        setattr(base.config, key, True)
    for layer, row, module in linears_of(model, structure):
        inner: Any = module.base_layer if isinstance(module, LoraLayer) else module
        weight = dense(inner.weight)
        if inner.bias is None:
            inner.bias = nn.Parameter(torch.zeros_like(weight[:, 0]), requires_grad=False)
        if row.into:
            kept = set(structure.indices(row.into, plan.kept[layer][row.into.axis]))
            gone = [index for index in range(inner.in_features) if index not in kept]
            mean = means[layer, row.into.axis][gone].to(weight.device)
            inner.bias += (weight[:, gone].float() @ mean.float()).to(inner.bias.dtype)


@dataclass(frozen=True)
class Replaced:
    """A trainable parameter that a cut replaced, so that an optimiser can take its state along."""

    old: nn.Parameter
    new: nn.Parameter
    dim: int
    index: Tensor


@torch.no_grad()
def cut(model: nn.Module, structure: Structure, plan: Plan) -> list[Replaced]:
    """Delete what ``plan`` does not keep, in place: base weights, biases and LoRA factors, whole layers where both axes go.

    Quantised weights are cut as their originals and quantised anew, one after another.
    ``model.config`` stays the base's but for the number of layers and their types.

    Raises:
        UserError: the plan does not fit ``structure``.
    """
    plan.check(structure)
    replaced: list[Replaced] = []
    for layer, row, module in linears_of(model, structure):
        for dim, side in ((0, row.out), (1, row.into)) if layer in plan.layers else ():
            if side and len(plan.kept[layer][side.axis]) < structure.layers[layer].units[side.axis]:
                replaced += _slice_linear(module, dim, structure.indices(side, plan.kept[layer][side.axis]))
    for index, block in enumerate(blocks_of(model, structure)):
        _set_head_counts(block, plan.widths(index))
    _drop_layers(model, structure, plan)
    return replaced


def _drop_layers(model: nn.Module, structure: Structure, plan: Plan) -> None:
    """Take whole layers out; those that stay are counted anew, for the cache goes by ``layer_idx``."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if len(plan.layers) == len(plan.kept):
        return
    parent, _, name = structure.family.blocks.rpartition(".")
    blocks = [base.get_submodule(structure.family.blocks)[layer] for layer in plan.layers]
    setattr(base.get_submodule(parent), name, nn.ModuleList(blocks))
    for index, block in enumerate(blocks):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
    base.config.num_hidden_layers = len(blocks)
    if getattr(base.config, "layer_types", None):
        base.config.layer_types = [base.config.layer_types[layer] for layer in plan.layers]


def along(module: Any, dim: int) -> list[tuple[Any, str]]:
    """(owner, name) of the parameters that have the output (``dim`` 0) or the input (1) of a linear on that dimension."""
    base = module.base_layer if isinstance(module, LoraLayer) else module
    found = [(base, "weight")]
    if dim == 0 and base.bias is not None:
        found.append((base, "bias"))
    if isinstance(module, LoraLayer):
        # LoRA is B (out x r) times A (r x in): rows of the output live in B, columns of the input in A
        factors: Any = module.lora_B if dim == 0 else module.lora_A
        found += [(factor, "weight") for factor in factors.values()]
    return found


def _slice_linear(module: Any, dim: int, keep: list[int]) -> list[Replaced]:
    parts = along(module, dim)
    name = "out_features" if dim == 0 else "in_features"
    where = getattr(*parts[-1]).device  # LoRA's: an original that waits in host memory comes to where it shall compute
    changed = []
    for owner, leaf in parts:
        changed.append(_slice_parameter(owner, leaf, dim, keep, where))
        setattr(owner, name, len(keep))
    if name in module.__dict__:
        setattr(module, name, len(keep))
    return [item for item in changed if item.old.requires_grad]


def _slice_parameter(owner: nn.Module, name: str, dim: int, keep: list[int], where: torch.device) -> Replaced:
    old = getattr(owner, name)
    index = torch.tensor(keep, device=where)
    new = like(old, dense(old).to(where).index_select(dim, index).contiguous())
    setattr(owner, name, new)
    return Replaced(old, new, dim, index)


def _set_head_counts(block: nn.Module, widths: dict[str, int]) -> None:
    for module in block.modules():
        for name, key in (("num_heads", "num_attention_heads"), ("num_key_value_heads", "num_key_value_heads")):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, widths[key])


@torch.no_grad()
def merge_lora(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold LoRA into the base weights and return the plain transformers model: the same bits on every machine.

    A matrix product is summed in an order that differs between devices and their numbers of threads. Here the products of
    two fp32 factors, exact in fp64, are added one rank after another, and the sum is rounded once.

    Args:
        dtype: that all weights have afterwards; each is merged in fp32 and rounded to it before the next one is touched, so
            no second model is held. None: as they are, and the sum is rounded to that.
    """
    if isinstance(model, PeftModel):
        for module in model.modules():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                wide = weight.data.float() if dtype else weight.data
                wide = wide.to(next(iter(module.lora_A.values())).weight.device)  # an original waits in host memory
                for name in module.active_adapters:
                    left, right = module.lora_B[name].weight, module.lora_A[name].weight
                    _add_product(wide, left, right, float(module.scaling[name]))
                # into the memory that it had, where that fits: with blocks of two sizes by turns the heap would grow by holes
                weight.data = (
                    weight.data.copy_(wide) if weight.dtype is (dtype or weight.dtype) else wide.to(weight.device, dtype)
                )
        model = cast(nn.Module, model.unload())
    for parameter in model.parameters() if dtype else ():
        if parameter.dtype is not dtype:
            parameter.data = parameter.data.float().to(dtype)
    return model


def _add_product(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``weight`` [out, in] += scale * left [out, r] @ right [r, in], in place, by blocks of rows that stay in a CPU's cache."""
    right = right.double()
    rows = max(1, (1 << (17 if weight.device.type == "cpu" else 24)) // right.shape[1])
    for start in range(0, len(weight), rows):
        part = left[start : start + rows].double()
        total = torch.zeros(len(part), right.shape[1], dtype=torch.float64, device=weight.device)
        for rank in range(len(right)):
            total.addcmul_(part[:, rank : rank + 1], right[rank : rank + 1])
        block = weight[start : start + rows]
        block.copy_(block.double() + total.mul_(scale))


@torch.no_grad()
def put(model: nn.Module, structure: Structure, tensors: Mapping[str, Tensor]) -> None:
    """Give parameters of a cut model other values, and biases to linears that have none.

    Raises:
        UserError: a name or a shape is not the model's.
    """
    base: Any = model
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner: Any = base.get_submodule(path)
            old = getattr(owner, leaf)
        except AttributeError:
            old, owner = False, None
        if old is False or (old is not None and old.shape != tensor.shape):
            raise UserError(f"the adapter changes {name!r} {tuple(tensor.shape)}, which this base does not have; give its own")
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False))
    for part, key in structure.family.bias_keys.items():
        if any(f".{part}." in name and name.endswith(".bias") for name in tensors):
            setattr(base.config, key, True)


@dataclass(frozen=True)
class LoraSlice:
    """LoRA entries that belong to the units of one axis: ``tensor`` viewed along ``dim`` as [units, rows]."""

    tensor: Tensor
    dim: int
    rows: int


def lora_slices(model: nn.Module, structure: Structure) -> dict[tuple[int, str], list[LoraSlice]]:
    """For every (layer, axis): rows of B of the producers and columns of A of the consumer (spec: coupled groups)."""
    slices: dict[tuple[int, str], list[LoraSlice]] = {}
    for layer, row, module in linears_of(model, structure):
        if not isinstance(module, LoraLayer):
            continue
        for dim, side, factors in ((0, row.out, module.lora_B), (1, row.into, module.lora_A)):
            if side:
                found = [LoraSlice(factor.weight, dim, structure.rows(side)) for factor in factors.values()]
                slices.setdefault((layer, side.axis), []).extend(found)
    return slices
