"""The arithmetic of a run: bytes.

Legend: as in ``cost``, s bytes of a number in the compute dtype. After the cut every axis keeps the same part of its units.

Bytes of activations, a token and layer: ``16 D + s (2 A + 2 K + 4 F) + 28 r`` with LoRA and
``24 D + s (2 A + 2 K + 4 F)`` without: what autograd saves in a llama block, as saved-tensor hooks count it (norms stay
fp32; families with more norms save a little more), plus ``10 T heads`` where attention is eager. With checkpointing
``s D`` a layer and one whole block. Compensation keeps ``s d^2`` bytes of a matrix of innovations (of consumers of d
inputs, A or F, up to ``compensate.matrices``), and, in host memory unless told otherwise, ``9/4 (A^2 + F^2)`` a layer of second
moments and the weights of ``o_proj`` and ``down_proj`` once more.
Trained weights cost 16 bytes each (fp32 weight, gradient, two AdamW moments), logits ``12 B T V`` bytes (``14 B T V`` in
16-bit), twice with a teacher; ``2 s B T V`` in an adapt turn whose loss is compiled (``train.compile``, no teacher); a decide
turn of more windows may need more.

With ``model.quantize: nf4`` a weight of the blocks takes 4.127 bits: 4, an 8-bit scale for 64 of them, an fp32 scale for 256 of
those. The widest of a block is dequantised in a pass; originals are in host memory (a file's pages where the types agree).

Of W processes that share one model (``train.shard``) each has 1/W of its weights, all of LoRA and of the generator, and in a
pass whole: what is in no block (embeddings, head, norms) and two blocks, the present one and the next on its way.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from slimtune import runtime
from slimtune.estimate import experts
from slimtune.estimate.cost import GRADIENTS, Job, windows
from slimtune.models.head import AFTERWARDS, MOST, MOST_COMPILED
from slimtune.models.weights import BITS
from slimtune.recipe import Recipe
from slimtune.structure.axes import FFN, KV_GROUP

SOLVE = 25
"""Bytes a squared input of the widest consumer while it is solved for: moments, half and whole, their factor, its inverse."""


ROOM = 0.9
"""Part of a device's memory that what is expected may fill."""


def with_room(job: Job, kind: str, room: int | None) -> Job:
    """``job`` with ``recover.quantize=auto`` decided: whole weights where they fit in ``room`` bytes, or nobody knows."""
    if job.recipe.recover.quantize != "auto":
        return job
    fits = room is None or sum(memory(job, kind).values()) <= ROOM * room
    recover = job.recipe.recover.model_copy(update={"quantize": not fits})
    return replace(job, recipe=job.recipe.model_copy(update={"recover": recover}))


def memory(job: Job, kind: str) -> dict[str, int]:
    """Bytes of one process at the fullest moment: before the cut, or after it where the recovery keeps more."""
    if job.shape:
        return _of_experts(job, _weight_bytes(job, kind))
    recipe, one = job.recipe, _weight_bytes(job, kind)
    tokens = job.pass_tokens
    teacher = 2 if recipe.distill.weight > 0 and recipe.method == "atp" else 1
    logits = _logits(job, tokens, teacher)
    passing = {"activations": _activations(job, tokens), "logits": logits, **_meanwhile(job, one)}
    solves: dict[str, float] = {"solves": SOLVE * max(job.consumers) ** 2} if job.solves().flops else {}
    dense = _trained(job, one)
    if not job.whole:
        dense |= {"generator, gradients, AdamW": 16 * job.generator, **_compensation(job, one)}
    dense |= passing if sum(passing.values()) > sum(solves.values()) else solves  # one after the other
    moments = [dense]
    if recipe.prunes:
        small, again = job.recovering, _activations(job, tokens, job.part, recipe.recover.checkpointed)
        passing = {"activations": again, "logits": logits, **_meanwhile(small, one, job.part)}
        decided = {"generator, AdamW": 12 * job.generator} if recipe.method == "atp" else {}  # a checkpoint has it to the end
        moments.append(_trained(small, one, job.part) | decided | passing)
    items = max(moments, key=lambda each: sum(each.values()))
    if recipe.distill.teacher and teacher == 2:
        items["teacher weights"] = dense["weights"]
    elif recipe.distill.recover and teacher == 2:  # it shares the frozen weights until the cut gives the student others
        kept = moments[-1] if items is dense else dense  # whichever of the two is not counted yet
        items["cut weights beside the teacher's (recover)"] = kept["weights"]
    return {name: int(value) for name, value in items.items() if value}


def _of_experts(job: Job, one: int) -> dict[str, int]:
    """The same of a run that makes experts: its prior, its search, its fits, or its recovery."""
    recipe, small = job.recipe, experts.cut(job)
    deciding = _decide_windows(recipe) * recipe.data.max_length
    searching, both = job.pass_tokens if recipe.moe.tune else deciding, 2 if recipe.moe.factors[0] else 1
    learned = {"generator, gradients, AdamW": 16 * job.generator, "routers, gradients, AdamW": 16 * experts.router_params(job)}
    dense = _trained(job, one) | learned
    squares = experts.closes(job)
    prior: dict[str, float] = {"tokens of the prior": experts.prior_bytes(job) if recipe.moe.prior != "none" else 0}
    prior |= {"activations": squares * _activations(job, deciding), "logits": squares * _whole_logits(job, deciding)}
    masks = {"masks": experts.mask_bytes(job)}
    search = masks | {
        "activations": _activations(job, searching, more=experts.token_bytes(job, searching=True)),
        "logits": _pass_logits(job, searching, both),
    }
    fitted = {"fitted consumers": experts.fitted_bytes(job)}
    search |= fitted
    refit = masks | fitted | {"moments of refit": experts.refit_bytes(job) if recipe.moe.refit else 0}
    recover = _trained(small, one) | learned | {"generator, gradients, AdamW": 12 * job.generator} | masks
    recover["activations"] = _activations(small, job.pass_tokens, more=experts.token_bytes(small, searching=False))
    recover["logits"] = _pass_logits(job, job.pass_tokens, 2 if recipe.distill.weight > 0 else 1)
    moments = [dense | prior, dense | search, dense | refit, recover]
    items = max(moments, key=lambda each: sum(each.values()))
    if recipe.distill.teacher:
        items["teacher weights"] = dense["weights"]
    return {name: int(value) for name, value in items.items() if value}


def _activations(job: Job, tokens: int, part: float = 1.0, checkpointed: float = 1.0, more: float = 0.0) -> float:
    """Of all blocks, ``checkpointed`` of which keep what comes in alone; ``more``: of a token in all of them."""
    layers = len(job.structure.layers)
    block = (activation_bytes(job, part) + more) * tokens / layers
    if job.recipe.model.checkpointing == "none":
        return layers * block
    again = round(checkpointed * layers)
    return (layers - again) * block + again * job.bytes_ * job.config.hidden_size * tokens + (block if again else 0.0)


def _meanwhile(job: Job, weight_bytes: int, part: float = 1.0) -> dict[str, float]:
    """What processes that share a model have whole in a pass, or a model in 4 bits has in more."""
    if job.quantized:
        return {"a weight that is dequantised meanwhile": job.bytes_ * part * job.config.hidden_size * max(job.consumers)}
    if job.parts == 1:
        return {}
    block = weight_bytes * part * job.structure.prunable_params / len(job.structure.layers)
    return {"weights that are whole meanwhile": weight_bytes * job.structure.constant_params + 2 * block}


def _weight_bytes(job: Job, kind: str) -> int:
    """Of a weight in a pass: one that is trained has a gradient beside it."""
    return 8 if job.whole else int(runtime.pick_dtype(job.recipe.model.dtype, kind).itemsize)


def _block_bytes(job: Job, weight_bytes: int) -> float:
    """Of a weight of the blocks, at rest."""
    return BITS / 8 if job.quantized else weight_bytes


def _trained(job: Job, weight_bytes: int, part: float = 1.0) -> dict[str, float]:
    """What stays on the device of one process, of a model with ``part`` of its units."""
    if job.whole:
        return {"weights, gradients, AdamW": 16 * job.structure.total_params / job.parts}
    weights = (
        weight_bytes * job.structure.constant_params + _block_bytes(job, weight_bytes) * part * job.structure.prunable_params
    )
    return {
        "weights": weights / job.parts,
        "LoRA, gradients, AdamW": 16 * job.lora(part),
    }


def host_memory(job: Job, kind: str) -> dict[str, int]:
    """Bytes in host memory of all processes: what is offloaded, and the model while one process reads and hands it round."""
    wanted, ranks = job.recipe.compensate, runtime.world_size()
    one, items = _weight_bytes(job, kind), dict[str, float]()
    if wanted.weights != "none" and job.searches and wanted.offload:
        moments = sum(9 / 4 * width**2 for width in job.consumers)
        weights = job.config.hidden_size * sum(job.consumers)
        # shared, every part has its original beside the whole that a fit reads; else every process has the whole
        copies = 2 if job.parts > 1 else ranks
        copies += (wanted.weights == "adapt") * (1 if job.parts > 1 else ranks)  # closed ones wait while decide turns are open
        consumers = copies * weights * _block_bytes(job, one)
        if job.quantized:  # and what a fit reads is another
            consumers += weights * one
        items = {"second moments": moments, "weights of consumers": consumers}
        if job.parts == 1 and ranks * moments > sum(items.values()):  # each process's own sums, before they are added up
            items = {"second moments": ranks * moments}
    if job.parts > 1 and job.recipe.model.init == "pretrained":
        items["weights, while they are read"] = one * job.structure.total_params
    if job.quantized:
        items["original weights"] = _originals(job, one)
    return {name: int(value) for name, value in items.items()}


def _originals(job: Job, weight_bytes: int) -> float:
    """Of all processes: where files hold weights as they are wanted, these are the mapped files, which all share."""
    model, held = job.recipe.model, getattr(job.config, "dtype", None)
    mapped = model.init == "pretrained" and isinstance(held, torch.dtype) and held.itemsize == weight_bytes
    return (1 if mapped else runtime.world_size()) * weight_bytes * job.structure.prunable_params


def _compensation(job: Job, weight_bytes: int) -> dict[str, float]:
    """Bytes on the device of what ``compensate`` keeps: innovations, and second moments and weights that are not offloaded."""
    wanted = job.recipe.compensate
    if wanted.weights == "none" or not job.searches:
        return {}
    squares = sum(width**2 for width in job.consumers)
    narrow = sum(width**2 for width in job.consumers if width <= wanted.matrices)
    innovations = job.bytes_ * narrow if wanted.weights == "decide" else 0
    weights = _block_bytes(job, weight_bytes) * sum(job.config.hidden_size * width for width in job.consumers)
    # the original weight, shared also whole where it is fitted; closed ones wait while decide turns are made on open ones
    weights *= (1 + (job.parts > 1) + (wanted.weights == "adapt")) / job.parts
    moments = 9 * squares / 4 / job.parts  # without parts each process sums up its own first
    return {"compensation": innovations + (0 if wanted.offload else moments + weights)}


def _logits(job: Job, tokens: int, models: int) -> int:
    """Bytes of the logits, what a loss makes of them and their gradient: of an adapt turn of ``tokens``, or a decide turn.

    Args:
        models: that read the tokens in an adapt turn; two with a teacher.
    """
    deciding = _decide_windows(job.recipe) * job.recipe.data.max_length
    return int(max(_pass_logits(job, tokens, models), _whole_logits(job, deciding)))


def _pass_logits(job: Job, tokens: int, models: int) -> float:
    """Of a pass of training."""
    if models == 1:
        return _whole_logits(job, tokens, job.compiled)
    return models * tokens * int(job.config.vocab_size) * _logit_bytes(job)


def _whole_logits(job: Job, tokens: int, compiled: bool = False) -> float:
    """Of one model, in chunks where they are many."""
    vocabulary = int(job.config.vocab_size)
    chunked = not job.whole and not any(getattr(job.config, key, None) not in (None, 1, 1.0) for key in AFTERWARDS)
    if chunked and tokens * vocabulary > (MOST_COMPILED if compiled else MOST):
        return 12 * MOST + job.bytes_ * job.config.hidden_size * tokens
    return tokens * vocabulary * (2 * job.bytes_ if compiled else _logit_bytes(job))


def _logit_bytes(job: Job) -> int:
    return 12 if job.bytes_ == 4 else 14


def _decide_windows(recipe: Recipe) -> int:
    """Windows of one process in one pass of a decide turn."""
    if recipe.method == "finetune" or (recipe.method == "twostage" and recipe.twostage.scores not in GRADIENTS):
        return 0
    return windows(recipe, recipe.search.batch or recipe.train.batch)[1]


def activation_bytes(job: Job, part: float = 1.0) -> float:
    """What autograd saves for one token in all blocks of ``part`` of their width, without checkpointing (see this module)."""
    rank = 0 if job.whole else job.recipe.lora.rank
    dims = (24 if job.whole else 16) * job.config.hidden_size + 28 * rank
    structure, total = job.structure, 0.0
    eager = job.recipe.model.attention == "eager" or getattr(job.config, "attn_logit_softcapping", None)
    for layer in structure.layers:
        keys = layer.units[KV_GROUP] * structure.head_dim
        wide = 2 * keys * structure.group + 2 * keys + 4 * layer.units[FFN]
        scores = 10 * job.recipe.data.max_length * layer.units[KV_GROUP] * structure.group if eager else 0
        total += dims + part * (job.bytes_ * wide + scores)
    return total
