"""Tune only: LoRA on a pretrained model, or all weights of one made from a config (the same loop)."""

from __future__ import annotations

from typing import Any

import torch

from slimtune.methods.outcome import Outcome
from slimtune.methods.start import base_model
from slimtune.models.compiled import compile_blocks
from slimtune.runtime import pick_dtype
from slimtune.structure.plan import Plan
from slimtune.train.loop import Phase, Turn, resumed, run_phase
from slimtune.train.session import Session
from slimtune.train.shards import SHARDS
from slimtune.train.tuner import Tuner


def run(session: Session) -> Outcome:
    """Train for ``train.steps`` steps; as the dense reference of ``atp``, for as many as its adapt turns."""
    recipe = session.recipe
    steps = recipe.train.steps if recipe.method == "finetune" else recipe.updates
    model = _model(session)
    tuner = Tuner(session, model, steps)

    def adapt(step: int) -> dict[str, Any]:
        return tuner.update(step, tuner.loss)

    first = 0
    saved = resumed(session)
    if saved:
        tuner.restore(saved["tuner"], saved.get(SHARDS))
        first = saved["step"]
    phase = Phase(
        name="tune",
        steps=steps,
        turns=[Turn("adapt", adapt)],
        capture=lambda: {"tuner": tuner.capture()},
        kept=lambda: 1.0,
        figures=lambda: session.valid_figures(model),
        in_parts=recipe.model.init == "config",
    )
    run_phase(session, phase, first)
    return Outcome(model.eval(), Plan.uncut(session.structure), {"adapt": tuner.tokens})


def _model(session: Session) -> Any:
    recipe = session.recipe
    scratch = recipe.model.init == "config"
    # weights trained from scratch stay in fp32 and are autocast; frozen ones may rest in bf16
    dtype = torch.float32 if scratch else pick_dtype(recipe.model.dtype, str(session.device))
    # the seeds of atp, so that the dense reference of a run starts from the same weights as the run itself
    model = base_model(session, dtype, lora=not scratch)
    if recipe.train.compile is True:
        compile_blocks(model, session.structure)
    return model
