"""What a run will cost, without weights, data or training: a config on the meta device and cost.py's arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from transformers import PreTrainedConfig

from slimtune import runtime
from slimtune.errors import UserError
from slimtune.estimate import experts
from slimtune.estimate.cost import Job
from slimtune.estimate.machines import Machine, named, present, timed
from slimtune.estimate.memory import host_memory, memory, with_room
from slimtune.estimate.phases import Phase, phases, with_compiling
from slimtune.models.load import check_length, load_config, structure_of
from slimtune.models.quantized import check_quantizable
from slimtune.prune.generator import Generator
from slimtune.prune.solve import MULTIPLES, check_budget, smallest_ratio
from slimtune.recipe import Recipe
from slimtune.structure.axes import Structure
from slimtune.train.session import check_sharded, check_step


@dataclass(frozen=True)
class Size:
    """A model, whole or cut: parameters, ratios to the whole, and the smallest the structure allows."""

    total: int
    block: int
    total_ratio: float
    block_ratio: float


@dataclass(frozen=True)
class Estimate:
    """Everything ``slimtune estimate`` prints.

    Attributes:
        units: (layers, units by axis), equal neighbours together.
        after: what is stored; ``active``: what a token uses of it, where that is less (experts).
        smallest: None for experts: ``problem`` tells the part nearest to one that cannot be met.
        memory: bytes of one process, by item; ``host_memory``: of all processes of one host, beside it.
        machine: whose times are told, or None.
        compiled: whether blocks and loss are, as the recipe says or, of ``auto``, as it is expected to pay.
        problem: why ``tune`` would refuse the run (its budget, its windows, its processes), or None.
    """

    model_type: str
    units: tuple[tuple[str, dict[str, int]], ...]
    before: Size
    after: Size
    active: Size | None
    smallest: Size | None
    lora_params: int
    lora_params_after: int
    generator_params: int
    phases: tuple[Phase, ...]
    memory: dict[str, int]
    host_memory: dict[str, int]
    device: str
    dtype: str
    machine: Machine | None
    compiled: bool
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def estimate(recipe: Recipe, *, measure: bool = True, gpu: str | None = None) -> Estimate:
    """The cost of a run. Reads config.json (or the inline config) only; times this machine for two seconds at most.

    Args:
        recipe: the run; its data need not exist.
        measure: time this machine; without it the expected times are None.
        gpu: a GPU to tell the times of by its data sheet instead, as ``h200``; it need not be here.

    Raises:
        UserError: the config cannot be had, the family is refused or unknown, or the GPU is unknown.
    """
    kind = "cuda" if gpu else _device_kind(recipe.device)
    dtype = runtime.pick_precision(recipe.train.precision, kind)
    machine = named(gpu, dtype) if gpu else None
    config = load_config(recipe.model)
    structure = structure_of(config)
    smallest, after, active = _sizes(recipe, structure)
    if machine is None and measure and (kind == "cpu" or torch.cuda.is_available()):
        machine = timed(kind, dtype)
    job = with_room(job_of(recipe, config, structure, kind), kind, machine.memory if machine else None)
    here = machine and not gpu  # then it is decided as ``tune`` does, by a data sheet where there is one
    job = with_compiling(job, present(torch.device(kind), dtype, machine) if here else machine)
    return Estimate(
        model_type=structure.family.model_type,
        units=_units(structure),
        before=Size(structure.total_params, structure.prunable_params, 1.0, 1.0),
        after=after,
        active=active,
        smallest=None if active else smallest,
        lora_params=job.lora(),
        lora_params_after=experts.cut(job).lora() if job.shape else job.lora(job.part),
        generator_params=job.generator,
        phases=tuple(phases(job, machine, runtime.world_size())),
        memory=memory(job, kind),
        host_memory=host_memory(job, kind) if kind == "cuda" else {},
        device=kind,
        dtype=str(dtype).removeprefix("torch."),
        machine=machine,
        compiled=job.compiled,
        problem=_problem(recipe, config, structure, smallest),
    )


def job_of(recipe: Recipe, config: PreTrainedConfig, structure: Structure, kind: str | None = None) -> Job:
    """What the formulas of ``cost`` need to know of a run, on ``cpu`` or ``cuda``; by default where the recipe says."""
    dtype = runtime.pick_precision(recipe.train.precision, kind or _device_kind(recipe.device))
    whole = recipe.method == "finetune" and recipe.model.init == "config"
    if recipe.method == "tomoe":
        shape = experts.shape_or_base(recipe, structure)
        generator = experts.generator_params(recipe, structure, shape)
        return Job(recipe, config, structure, 1.0, whole, generator, dtype.itemsize, shape)
    generator = _generator_params(recipe, structure) if recipe.prunes else 0
    return Job(recipe, config, structure, _sizes(recipe, structure)[1].block_ratio, whole, generator, dtype.itemsize)


def _device_kind(device: str) -> str:
    """``cpu`` or ``cuda``; a GPU that is not here can be planned for, but not timed."""
    return "cuda" if device.startswith("cuda") else runtime.pick_device(device).partition(":")[0]


def _sizes(recipe: Recipe, structure: Structure) -> tuple[Size, Size, Size | None]:
    """The smallest possible size, the target's (or the smallest, where that is more), and of experts what a token uses."""

    def size(block: float) -> Size:
        total = structure.constant_params + block
        return Size(round(total), round(block), total / structure.total_params, block / structure.prunable_params)

    budget, whole = recipe.budget, structure.prunable_params
    multiple = min(MULTIPLES) if budget.ffn_multiple == "auto" else budget.ffn_multiple
    smallest = size(smallest_ratio(structure, "block", multiple) * whole)
    if not recipe.prunes:
        return smallest, size(whole), None
    if recipe.method == "tomoe":
        stored, used = experts.block_params(structure, experts.shape_or_base(recipe, structure))
        return smallest, size(stored), size(used)
    wanted = budget.keep * structure.total_params - structure.constant_params if budget.of == "total" else budget.keep * whole
    return smallest, smallest if budget.keep < _least(recipe, smallest) else size(wanted), None


def _least(recipe: Recipe, smallest: Size) -> float:
    return smallest.total_ratio if recipe.budget.of == "total" else smallest.block_ratio


def _problem(recipe: Recipe, config: PreTrainedConfig, structure: Structure, smallest: Size) -> str | None:
    """What ``tune`` would say before it starts.

    To the windows and how processes share them, to keys that do not go together, and to the budget with rounding, layout and
    tolerance.
    """
    budget, least = recipe.budget, _least(recipe, smallest)
    try:
        check_length(config, recipe.data.max_length)
        check_sharded(recipe)
        check_quantizable(recipe)
        _check_steps(recipe)
        if recipe.method == "tomoe":
            experts.check(recipe, config, structure)
    except UserError as error:
        return str(error)
    if not recipe.prunes or recipe.method == "tomoe":
        return None
    if budget.keep < least:
        other = ", or use budget.of=block" if budget.of == "total" else ""
        return (
            f"budget.keep={budget.keep} of {budget.of} cannot be met: embeddings, norms and the least every layer "
            f"must keep are already {least:.3f}; ask for more than that{other}"
        )
    try:
        check_budget(structure, recipe.budget)
    except UserError as error:
        return str(error)
    return None


def _check_steps(recipe: Recipe) -> None:
    ranks, train = runtime.world_size(), recipe.train
    steps = {"train": train.batch, **({"decision": recipe.search.batch or train.batch} if recipe.prunes else {})}
    for purpose, batch in steps.items():
        check_step(batch, purpose, ranks, ranks > 1 and train.shard == "full")


def _units(structure: Structure) -> tuple[tuple[str, dict[str, int]], ...]:
    """(layers, units by axis), equal neighbours together."""
    rows, start = [], 0
    for units, run in groupby(dict(layer.units) for layer in structure.layers):
        last = start + len(list(run)) - 1
        rows.append((f"{start}-{last}" if last > start else str(start), units))
        start = last + 1
    return tuple(rows)


def _generator_params(recipe: Recipe, structure: Structure) -> int:
    with torch.device("meta"):
        generator = Generator(structure, recipe.generator, uniform=recipe.budget.layout == "uniform")
    return sum(parameter.numel() for parameter in generator.parameters())
