"""The arithmetic of a run: passes through blocks that the host launches, which take it as long however few tokens there are.

In forward passes of a block with LoRA on its linears; a backward pass is 1.2 of them, and gates that collect gradients make 1.4
of one. What one takes is the machine's (``Machine.block``); a step takes that or its kernels, whichever is longer. Blocks all
of whose weights are trained were not measured: nothing is counted for them.
"""

from __future__ import annotations

from slimtune.estimate.cost import Job, windows

BACKWARD = 1.2
GATED = 1.4
"""By decide turns of 4 windows on 8 layers (docs/results/growth.json) and search steps of an earlier program on 28
(docs/results/dry-run.json)."""
COMPILED = 0.22
"""Of what an eager block takes: a thousand steps of two passes through 12 compiled layers took 59 s on an H100's host, waiting
for launches (docs/RESULTS.md, "Seconds of each method")."""


def look(job: Job, batch: int | None = None) -> float:
    """For one token, in a forward pass that keeps nothing, of steps of ``batch`` windows (None: an adapt turn's)."""
    return _of_a_token(job, 1.0, batch or job.recipe.train.batch)


def turn(job: Job, checkpointed: float = 1.0, compiled: bool = False) -> float:
    """For one token, in a turn with a backward pass, ``checkpointed`` of whose blocks are."""
    return (COMPILED if compiled else 1.0) * _of_a_token(job, _passes(job, checkpointed), job.recipe.train.batch)


def decide(job: Job) -> float:
    """For one token, in a decide turn."""
    return GATED * _of_a_token(job, _passes(job), job.recipe.search.batch or job.recipe.train.batch)


def _passes(job: Job, checkpointed: float = 1.0) -> float:
    again = checkpointed if job.recipe.model.checkpointing != "none" else 0.0
    return 1 + again + BACKWARD


def _of_a_token(job: Job, passes: float, batch: int) -> float:
    mine, together = windows(job.recipe, batch)
    times = -(-mine // together)
    return 0.0 if job.whole else passes * len(job.structure.layers) * times / (mine * job.recipe.data.max_length)
