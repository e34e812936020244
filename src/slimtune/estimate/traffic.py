"""The arithmetic of a run: bytes that pass through a GPU's memory, apart from those of matrix products.

Norms, activations, rotary embeddings, casts and the sums of LoRA and base are hardly any operations, but each reads and writes
whole activations: on an H200 they take 0.33 of the 0.89 s of a LoRA step of Llama-3-8B's shape. Legend: as in ``cost``.

A block's forward pass moves ``180 D + 15 U`` bytes a token and its backward pass ``236 D + 19 U``, with ``U = 2 A + 2 K + 3 F``
what its linears take and give of the axes that are cut: fitted to the kernels of a LoRA step in bf16 at full width and at 54%
of it (``benchmarks/cost.py --profile``; how it divides between the passes is taken, not measured). Compiled blocks move 0.42 of
that. Gates add 30 ``(A + F)``, and 82 where they collect gradients; a loss taken in chunks 34 V. A pass over weights in 4
bits makes them whole again, which takes the time of 15 bytes a weight (a decide turn's 9, a recovery step's 24; H100).
"""

from __future__ import annotations

from slimtune.estimate.cost import Job
from slimtune.structure.axes import FFN, KV_GROUP

FORWARD, BACKWARD = (180, 15), (236, 19)
COMPILED = 0.42
GATES, LEAVES = 30, 82
HEAD = 34
DEQUANTISED = 15


def _widths(job: Job) -> tuple[float, float]:
    """U, and A + F, summed over the layers."""
    head = job.structure.head_dim
    wide = gated = 0.0
    for layer in job.structure.layers:
        keys, channels = layer.units[KV_GROUP] * head, layer.units[FFN]
        queries = keys * job.structure.group
        wide += 2 * queries + 2 * keys + 3 * channels
        gated += queries + channels
    return wide, gated


def _blocks(job: Job, of: tuple[int, int], part: float) -> float:
    dims = len(job.structure.layers) * int(job.config.hidden_size)
    return job.bytes_ / 2 * (of[0] * dims + of[1] * part * _widths(job)[0])


def look(job: Job) -> float:
    """Bytes of one token in a forward pass that keeps nothing."""
    return _blocks(job, FORWARD, 1.0) + _dequantised(job, 1.0)


def _dequantised(job: Job, part: float) -> float:
    """What one token bears of a pass's dequantising."""
    return DEQUANTISED * part * job.structure.prunable_params / job.pass_tokens if job.quantized else 0.0


def turn(job: Job, part: float = 1.0, gates: int = 0, compiled: bool = False, checkpointed: float = 1.0) -> float:
    """Bytes of one token in a turn with a backward pass.

    Args:
        part: of the units that is left.
        gates: bytes a gated input takes: ``GATES``, ``LEAVES`` or none.
        compiled: whether the blocks are.
        checkpointed: part of the blocks, where the model is.
    """
    again = checkpointed if job.recipe.model.checkpointing != "none" else 0.0
    blocks = (1 + again) * _blocks(job, FORWARD, part) + _blocks(job, BACKWARD, part)
    blocks += (2 + again) * _dequantised(job, part)
    return (COMPILED if compiled else 1.0) * blocks + gates * _widths(job)[1] + HEAD * int(job.config.vocab_size)
