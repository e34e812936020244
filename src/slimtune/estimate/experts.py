"""The arithmetic of a run that makes experts (``method: tomoe``): sizes, operations, bytes.

Legend: as in ``cost``; L layers, E experts, S slots of the logits (E, of a partition E + 2), G parameters of the
generator. The MLP stays whole while experts are learned and tuned, attention until the recovery. Beside an ``adapt`` turn
(without ``moe.tune`` in the search a ``decide`` turn), a token and layer:

- mask ``r @ M`` of [E] x [E, F]: ``2 E F`` forward, backward twice that while experts are found, once when they are fixed
- router: ``2 E D`` forward, twice that backward
- a teacher: one forward pass (``moe.kd`` in the search, ``distill.weight`` in the recovery)

and a step ``8 S G`` of the generator (forward, backward, and forward once more for masks without noise). A fit of ``refit``
takes two products of ``2 d^2`` a token of each consumer's d inputs, in fp32, then ``d^3 / 3 + 4 D d^2``, in every process.

Bytes: 4 of each number of ``L F S`` logits, their softmax, masks and those in force, and 8 more each pass of a step (masks that
collect gradients, and these). A gated token keeps its mask and the gated input. Of all layers the prior keeps
``moe.prior_tokens``: what channels add, in 16 bits, and the MLP's input. A fit has two fp32 matrices of every consumer at once,
and what it fitted stays beside the base's until the experts are decided.

Masks inside heads (``moe.attention``) save no operation, for what they leave out is computed and multiplied by zero; what they
take themselves is not counted.

Not counted: assignment (Sinkhorn: 16 ms of a step by its bytes, at Llama-3-8B's shape on an H200), clustering of the prior, the
launching of both, and what processes send one another.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import PreTrainedConfig

from slimtune import runtime
from slimtune.errors import UserError
from slimtune.estimate import launches, traffic
from slimtune.estimate.cost import Job, Rounds, Solves, Turn, windows
from slimtune.models import moe
from slimtune.prune.experts import ExpertGenerator
from slimtune.prune.least_squares import WIDE
from slimtune.prune.shape import Shape, shape_of
from slimtune.recipe import Recipe
from slimtune.structure.axes import FFN, KV_GROUP, Structure
from slimtune.structure.experts import host_of
from slimtune.structure.heads import attention_params, check_pairs, module_params

MASKS = 54
"""Bytes that a mask a token moves for each channel, there and back: counted by its operations in 16 bits, not measured."""


# --- sizes -----------------------------------------------------------------------------------------------------------


def check(recipe: Recipe, config: PreTrainedConfig, structure: Structure) -> None:
    """Raise UserError where no shape meets the budget, a key does not go with experts, or no stock class holds them."""
    if recipe.model.quantize != "none":
        raise UserError(f"model.quantize={recipe.model.quantize} does not go with method=tomoe; leave it out")
    if recipe.moe.prior == "none" and not recipe.search.steps:
        raise UserError(
            "moe.prior=none with search.steps=0 leaves nothing to decide by; set moe.prior=energy or a number of steps"
        )
    if recipe.moe.experts == "overlap" and recipe.moe.prior == "cmoe":
        raise UserError(
            "moe.prior=cmoe gives every channel to one expert, and with moe.experts=overlap they may share them; set "
            "moe.prior=energy, or moe.experts=partition"
        )
    if recipe.search.steps and not any(recipe.moe.factors):
        raise UserError(
            "moe.kd=0 with moe.ce=0 leaves the search nothing to learn by; leave one of them out, or set search.steps=0"
        )
    host_of(structure.family, recipe.moe.shared)  # a family that has none can have no masks either
    if recipe.moe.attention != "groups":
        check_pairs(structure, config.to_dict(), f"moe.attention={recipe.moe.attention}")
    shape = shape_of(structure, recipe.budget, recipe.moe)
    if recipe.moe.prior != "none" and recipe.moe.prior_tokens < shape.number:
        raise UserError(
            f"moe.prior_tokens={recipe.moe.prior_tokens} are too few to tell {shape.number} experts apart; give {shape.number} "
            "at least (default: 4096)"
        )
    sizes = (shape.number, shape.top_k, shape.width, shape.shares, shape.groups, shape.values)
    moe.config_of(config, structure, moe.Layout(*sizes))


def shape_or_base(recipe: Recipe, structure: Structure) -> Shape:
    """The shape of a run's experts; where there is none, one expert of all channels, which is the base."""
    try:
        return shape_of(structure, recipe.budget, recipe.moe)
    except UserError:
        units = structure.layers[0].units
        return Shape(1, 1, units[FFN], 0, units[KV_GROUP], units[FFN])


def block_params(structure: Structure, shape: Shape) -> tuple[int, int]:
    """Of the blocks, what is stored and what a token uses of it, routers included."""
    extra = host_of(structure.family, shape.shares > 0).extra(structure.hidden, shape.number) if structure.family.experts else 0
    used = stored = 0
    for layer in structure.layers:
        groups = min(shape.groups, layer.units[KV_GROUP])
        used += attention_params(structure, layer, groups, shape.pairs, shape.values)
        stored += groups * layer.unit_params[KV_GROUP] + (module_params(structure) if shape.values else 0)
    channel = sum(layer.unit_params[FFN] for layer in structure.layers)
    routers = len(structure.layers) * extra
    every = (shape.shares + shape.number) * shape.width * channel
    return stored + routers + every, used + routers + shape.active * channel


def generator_params(recipe: Recipe, structure: Structure, shape: Shape) -> int:
    """Of what makes the logits."""
    with torch.device("meta"):
        pairs = structure.head_dim // 2 if shape.pairs else 0
        generator = ExpertGenerator(len(structure.layers), shape.channels, _slots(shape), recipe.moe, pairs)
    return sum(parameter.numel() for parameter in generator.parameters())


def cut(job: Job) -> Job:
    """The same in the recovery: attention is cut, the MLP whole."""
    groups = job.experts.groups
    layers = [
        replace(layer, units={**layer.units, KV_GROUP: min(groups, layer.units[KV_GROUP])}) for layer in job.structure.layers
    ]
    gone = sum(whole.params - layer.params for whole, layer in zip(job.structure.layers, layers, strict=True))
    structure = replace(job.structure, layers=tuple(layers), total_params=job.structure.total_params - gone)
    return replace(job, structure=structure)


def closes(job: Job) -> bool:
    """Whether any KV group goes: which, gradients say."""
    return job.experts.groups < job.structure.layers[0].units[KV_GROUP]


def _slots(shape: Shape) -> int:
    return shape.number if shape.overlap else shape.number + 2


# --- operations ------------------------------------------------------------------------------------------------------


def search(job: Job) -> Turn:
    """All turns in which experts are found."""
    recipe, steps, kd = job.recipe, job.recipe.search.steps, job.recipe.moe.factors[0]
    part = 1.0 if recipe.moe.tune else _decided(job)
    own = (job.adapt() if recipe.moe.tune else _decide(job)) + _routed(job, 4)
    own += 8 * _slots(job.experts) * job.generator / (part * job.step_tokens)
    launched = launches.GATED * launches.turn(job) if recipe.moe.tune else launches.decide(job)
    turn = Turn(part * steps, own, traffic.turn(job) + _moved(job), launched)
    batch = None if recipe.moe.tune else recipe.search.batch
    return turn.beside(_look(job, batch)) if kd else turn


def recovery(job: Job, steps: int) -> Turn:
    """All turns after it."""
    small = cut(job)
    launched = launches.GATED * launches.turn(small)
    turn = Turn(steps, small.adapt() + _routed(small, 2), traffic.turn(small) + _moved(small), launched)
    return turn.beside(_look(job if job.recipe.distill.teacher else small)) if job.recipe.distill.weight > 0 else turn


def passes(job: Job) -> list[Turn]:
    """What is read around the search: gradients of KV groups, the prior (all of it by every process), moments of each fit."""
    config, batch = job.recipe.moe, job.recipe.search.batch
    steps, look, ranks = _decided(job) * config.prior_steps, _look(job, batch), runtime.world_size()
    turns = []
    if closes(job):
        turns.append(Turn(steps, _decide(job), traffic.turn(job, gates=traffic.LEAVES), launches.decide(job)))
    if config.prior != "none":
        turns.append(Turn(steps, ranks * look.flops, ranks * look.traffic, ranks * look.launched))
    fits = config.fits(job.recipe.search.steps)
    turns.append(Turn(fits * steps, look.flops + _routed(job, 0), look.traffic, look.launched))
    return turns


def solves(job: Job) -> Solves:
    """Moments and fits of ``refit``: on the way, and once the experts are decided."""
    config = job.recipe.moe
    tokens = _decided(job) * config.prior_steps * job.step_tokens / runtime.world_size()
    moments = sum(4 * tokens * width**2 for width in job.consumers)
    each = moments + sum(width**3 / 3 + 4 * job.config.hidden_size * width**2 for width in job.consumers)
    last = config.refit_rounds * config.refit
    return Solves(Rounds((config.fits(job.recipe.search.steps) - last) * each), Rounds(last * each))


def _decided(job: Job) -> float:
    """Windows of a decision step, in steps of ``train.batch``."""
    return (job.recipe.search.batch or job.recipe.train.batch) / job.recipe.train.batch


def _decide(job: Job) -> float:
    return 2 * job.forward() + 4 * job.lora() + job.recompute()


def _look(job: Job, batch: int | None = None) -> Turn:
    return Turn(0, job.forward(), traffic.look(job), launches.look(job, batch))


def _routed(job: Job, backward: int) -> float:
    """Operations of one token's masks and routers; ``backward``: of a mask's E F, in its backward pass."""
    again = job.recipe.model.checkpointing != "none" and backward > 0
    forward, number = 2 * (1 + again), job.experts.number
    router = (forward + (4 if backward else 0)) * job.config.hidden_size * len(job.structure.layers)
    return number * (router + (forward + backward) * _channels(job))


def _moved(job: Job) -> float:
    """Bytes that one token's masks move."""
    return job.bytes_ / 2 * MASKS * _channels(job)


def _channels(job: Job) -> int:
    """F summed over the layers."""
    return sum(layer.units[FFN] for layer in job.structure.layers)


# --- bytes -----------------------------------------------------------------------------------------------------------


def token_bytes(job: Job, searching: bool) -> float:
    """Of one token's masks and what they gate, kept for a backward pass, in all layers."""
    heads = job.query_widths if searching else 0
    return job.bytes_ * (2 * _channels(job) + heads) + _ROUTED * job.experts.number * len(job.structure.layers)


_ROUTED = 24
"""Bytes a token and expert of the routers' scores, weights and shares."""


def router_params(job: Job) -> int:
    """Of all layers, with what makes masks of tokens."""
    layers, modules = len(job.structure.layers), module_params(job.structure) if job.experts.values else 0
    return (job.experts.number * int(job.config.hidden_size) + modules) * layers


def mask_bytes(job: Job) -> int:
    """Of logits and masks of a search's step, until the generator has learned of it."""
    batch = job.recipe.train.batch if job.recipe.moe.tune else job.recipe.search.batch or job.recipe.train.batch
    mine, together = windows(job.recipe, batch)
    return 4 * (4 + 2 * -(-mine // together)) * _slots(job.experts) * _channels(job)


def prior_bytes(job: Job) -> int:
    """Of the tokens that are kept for the split."""
    layers = len(job.structure.layers)
    return job.recipe.moe.prior_tokens * (2 * _channels(job) + job.bytes_ * int(job.config.hidden_size) * layers)


def fitted_bytes(job: Job) -> int:
    """Of fitted consumers beside the base's, until the experts are decided."""
    return int(job.bytes_ * job.config.hidden_size * sum(job.consumers)) if job.recipe.moe.refit else 0


def refit_bytes(job: Job) -> int:
    """Of the moments of all consumers, and the widest fit: in fp64 up to ``WIDE`` inputs, beyond beside products."""
    fit = max((24 if width <= WIDE else 8) * width**2 for width in job.consumers)
    return sum(8 * width**2 for width in job.consumers) + fit
