"""A model whose parameters lie spread over all processes (FSDP2), and every way in and out of it.

What is spread is the base. LoRA is small, and to gather it and scatter its gradients block by block takes longer than one sum
of them at the end: every process has all of it.

A *template* is the model on the meta device (its buffers, which are small, are real): LoRA attached, no gates, no weights. A
sharded model keeps one of itself, so that a smaller or a whole model can be built anew and filled tensor by tensor: at no time
does one process hold more than one whole tensor on its device.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from slimtune.models.surgery import Replaced, along, blocks_of, cut, linears_of
from slimtune.models.weights import put
from slimtune.runtime import rank, world_size
from slimtune.structure.axes import Structure
from slimtune.structure.plan import Plan

BUCKET = 1 << 24
"""Gradients that are summed over processes at once."""


def is_sharded(model: nn.Module) -> bool:
    """Whether ``sharded`` made it."""
    return hasattr(model, "template")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor on every process, each of which must call this where the tensor is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which each process has, as ``like`` lies: this process's part of it, where that is sharded."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def put_whole(tensor: Tensor, onto: Tensor) -> None:
    """Copy a tensor that is whole, or lies as ``onto`` does, into a parameter that may be sharded."""
    put(local(onto), local(spread(tensor, onto)))


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of it where it is not sharded."""
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


@torch.no_grad()
def share_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the mean of all gradients of what each has whole. FSDP has seen to those of what is spread."""
    own = [parameter.grad for parameter in parameters if parameter.grad is not None and not isinstance(parameter, DTensor)]
    while own:
        size, some = 0, list[Tensor]()
        while own and (not some or size + own[-1].numel() <= BUCKET):
            some.append(own.pop())
            size += some[-1].numel()
        flat = torch.cat([gradient.flatten() for gradient in some])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        parts = flat.split([gradient.numel() for gradient in some])
        torch._foreach_copy_(some, [part.view_as(gradient) for part, gradient in zip(parts, some, strict=True)])


def owner_of(layer: int) -> int:
    """The process that does what only one need do for a layer."""
    return layer % world_size()


def template_of(config: PreTrainedConfig, dtype: torch.dtype, **how: Any) -> PreTrainedModel:
    """The model that ``config`` describes without its weights; ``how`` as for ``from_config``."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **how)
    model.tie_weights()  # what is empty was made apart
    model.config.use_cache = False
    return model.eval()


@torch.no_grad()
def sharded(template: nn.Module, structure: Structure, device: torch.device, source: nn.Module | None) -> nn.Module:
    """A model like ``template``, spread over all processes, with the weights of rank 0's ``source``, which it gives up.

    Args:
        source: the whole model, on any device; None on the other ranks.
    """
    theirs = dict(source.named_parameters()) if source is not None else {}
    _like_rank_0(template, theirs)
    model = _spread_empty(template, structure, device)
    for name, parameter in model.named_parameters():
        if rank() == 0:
            full = theirs[name].detach().to(device)
            theirs[name].data = torch.empty(0, dtype=full.dtype)
        else:
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=0)
        else:
            dist.broadcast(full, 0)
        local(parameter).copy_(local(full))
    # what stands in buffers may have been corrected after loading
    buffers = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        if rank() == 0:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    return model


def _like_rank_0(template: nn.Module, theirs: dict[str, nn.Parameter]) -> None:
    """Files may hold single tensors in another precision than the rest: rank 0 has read them."""
    told: list[Any] = [{name: (parameter.dtype, parameter.requires_grad) for name, parameter in theirs.items()}]
    dist.broadcast_object_list(told, 0)
    for name, parameter in template.named_parameters():
        dtype, trained = told[0][name]
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(trained)


def _spread_empty(template: nn.Module, structure: Structure, device: torch.device) -> nn.Module:
    """A copy of ``template`` on all processes; what its parameters hold is undefined."""
    model: Any = copy.deepcopy(template)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # the causal model is the root, not PEFT's wrapper: who generates calls it by itself
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    lora = {parameter for parameter in model.parameters() if parameter.requires_grad} if inner is not model else None
    blocks = blocks_of(model, structure)
    for module in (*blocks, inner):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=lora)
    for module, following in pairwise((inner, *blocks)):  # else it is begun on when the host comes to it, which may be late
        module.set_modules_to_forward_prefetch([following])
    tied = _tied(model)
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device))
    for name, *others in tied:
        _put_at(model, others, model.get_parameter(name))
    # a function, because a module as an attribute would become a part of the model
    model.template = lambda: template
    return model


def cut_model(model: nn.Module, structure: Structure, plan: Plan) -> tuple[nn.Module, list[Replaced]]:
    """``surgery.cut``, of a sharded model or one that is not: the cut model, and its trained parameters that are new."""
    return _cut_sharded(model, structure, plan) if is_sharded(model) else (model, cut(model, structure, plan))


@torch.no_grad()
def _cut_sharded(model: Any, structure: Structure, plan: Plan) -> tuple[nn.Module, list[Replaced]]:
    """A new model; all its trained parameters are new.

    The old model is left without weights, tensor by tensor as the new one gets them.
    """
    template = copy.deepcopy(model.template())
    cut(template, structure, plan)
    device = next(model.parameters()).device
    small = _spread_empty(template, structure, device)
    for theirs, ours in _pairs(model, small, structure, plan, "named_buffers"):
        ours.copy_(theirs)
    taken = {id(parameter): (dim, index) for parameter, dim, index in _cuts(model, structure, plan)}
    replaced = []
    for old, new in _pairs(_resharded(model), small, structure, plan, "named_parameters"):
        dim, index = taken.get(id(old)) or (0, torch.arange(len(old), device=device))
        if old.shape == new.shape:
            local(new).copy_(local(old))
        else:
            put_whole(whole(old).index_select(dim, index), new)
        local(old).untyped_storage().resize_(0)
        if new.requires_grad:
            replaced.append(Replaced(old, new, dim, index))
    return small, replaced


def _cuts(model: nn.Module, structure: Structure, plan: Plan) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """(parameter, dimension, indices that stay) of all that becomes smaller."""
    for layer, row, module in linears_of(model, structure):
        for dim, side in ((0, row.out), (1, row.into)) if layer in plan.layers else ():
            if side and len(plan.kept[layer][side.axis]) < structure.layers[layer].units[side.axis]:
                keep = structure.indices(side, plan.kept[layer][side.axis])
                for owner, name in along(module, dim):
                    parameter = getattr(owner, name)
                    yield parameter, dim, torch.tensor(keep, device=parameter.device)


def _pairs(old: nn.Module, new: nn.Module, structure: Structure, plan: Plan, kind: str) -> Iterator[tuple[Any, Any]]:
    """(old, new) for all that ``kind`` (``named_parameters``) names in a model after a cut, which may take whole layers."""
    before, after = blocks_of(old, structure), blocks_of(new, structure)

    def named(module: nn.Module) -> dict[str, Tensor]:
        return dict(getattr(module, kind)())

    inside = {id(tensor) for block in after for tensor in named(block).values()}
    for layer, block in zip(plan.layers, after, strict=True):
        theirs = named(before[layer])
        yield from ((theirs[name], tensor) for name, tensor in named(block).items())
    theirs = named(old)
    yield from ((theirs[name], tensor) for name, tensor in named(new).items() if id(tensor) not in inside)


def _resharded(model: nn.Module) -> nn.Module:
    """``model`` with nothing whole that a pass may have left so."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return model


def _tied(model: nn.Module) -> list[list[str]]:
    """The names of every parameter, those of a tied one together."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _put_at(model: nn.Module, names: list[str], parameter: nn.Parameter) -> None:
    for name in names:
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path)._parameters[leaf] = parameter


@torch.no_grad()
def gathered(model: Any) -> nn.Module | None:
    """The whole model, for rank 0 alone; of a sharded one a copy on the CPU, gathered tensor by tensor."""
    if not is_sharded(model):
        return model if rank() == 0 else None
    copied = copy.deepcopy(model.template()) if rank() == 0 else None
    places = {names[0]: names for names in _tied(copied)} if copied is not None else {}
    for name, parameter in _resharded(model).named_parameters():
        full = whole(parameter)
        if copied is not None:
            made = nn.Parameter(full.to("cpu", copy=True), requires_grad=parameter.requires_grad)
            _put_at(copied, places[name], made)
    if copied is not None:
        for buffer, theirs in zip(copied.buffers(), model.buffers(), strict=True):
            buffer.copy_(theirs)
    return copied


def gathered_state(value: Any) -> Any:
    """Nested state with every sharded tensor whole, on rank 0's CPU; the other processes keep nothing of them."""
    if isinstance(value, DTensor):
        full = whole(value.detach())
        return full.cpu() if rank() == 0 else None
    if isinstance(value, dict):
        return {key: gathered_state(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered_state(item) for item in value]
    return value
