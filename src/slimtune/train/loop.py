"""The only loop: phases of steps, steps of turns."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from slimtune.errors import UserError
from slimtune.models.sharded import gathered_state
from slimtune.recipe import Recipe
from slimtune.runtime import no_full_collections
from slimtune.train import checkpoint, shards
from slimtune.train.session import Figures, Session

Step = Callable[[int], dict[str, Any]]

COLLECT_EVERY = 200
"""Steps between full collections of garbage, which all processes make together."""

SEARCHES = ("search", "decide")
"""Phases in which gates close."""


@dataclass(frozen=True)
class Turn:
    """One kind of update: its name, what it does at a step (returns figures, ``loss`` among them), and its cadence."""

    name: str
    run: Step
    every: int = 1


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with the same turns.

    Attributes:
        capture: everything a resumed run needs besides (phase, step).
        kept: the present kept ratio, for the progress bar and the metrics.
        figures: validation figures of the current hard Plan, taken every ``evaluate.every`` or ``search_every`` steps.
        shape: what a row tells of the present masks, while they move.
        before: steps of the stage's earlier phases; trackers count on from there.
        in_parts: all weights are trained: of a sharded model each process writes its part of a checkpoint.
    """

    name: str
    steps: int
    turns: Sequence[Turn]
    capture: Callable[[], dict[str, Any]]
    kept: Callable[[], float]
    figures: Callable[[], Figures]
    shape: Callable[[], Mapping[str, Any]] = dict
    before: int = 0
    in_parts: bool = False


def seed_turn(seed: int, phase: str, turn: str, step: int, rank: int = 0) -> None:
    """Everything random inside a turn (dropout) depends on nothing but these, so resuming needs no saved RNG state."""
    torch.manual_seed(hash_seed(seed, phase, turn, step, rank))


def hash_seed(*parts: Any) -> int:
    """A stable 63-bit seed (Python's own hash of strings changes between processes)."""
    value = 1469598103934665603
    for byte in "/".join(map(str, parts)).encode():
        value = ((value ^ byte) * 1099511628211) % 2**63
    return value


def checkpoint_path(session: Session) -> Any:
    """The one checkpoint file of a stage."""
    return session.folder / f"checkpoint-{session.stage}.pt"


def resumed(session: Session) -> dict[str, Any] | None:
    """The stage's last checkpoint, where the run is to go on from one."""
    # whole tensors: of a sharded model they are more than its device is there for
    place = torch.device("cpu") if session.sharded else session.device
    saved = checkpoint.load(checkpoint_path(session), place) if session.resume else None
    if saved:
        session.earlier, session.earlier_peak = saved["seconds"], saved.get("memory", 0)
    return saved


def run_phase(session: Session, phase: Phase, first: int = 0) -> None:
    """Run steps ``first``..``phase.steps`` and leave a checkpoint at the end.

    Raises:
        UserError: a loss, or another figure of a turn such as its gradient norm, is not finite.
        Breach: validation figures left a bound at which the recipe ends a run; a checkpoint is there.
    """
    session.progress.start(phase.name, first, phase.steps)
    try:
        with no_full_collections():
            for step in range(first, phase.steps):
                _run_step(session, phase, step)
                if session.stop:
                    _checkpoint(session, phase, step + 1)
                    raise session.stop
                if (step + 1) % COLLECT_EVERY == 0:
                    gc.collect()
                every = session.recipe.train.checkpoint_every
                if every and (step + 1) % every == 0 and step + 1 < phase.steps:
                    _checkpoint(session, phase, step + 1)
    finally:
        session.progress.stop()
    if first < phase.steps or not first:  # a resumed phase that was already complete has its checkpoint
        _checkpoint(session, phase, phase.steps)


def _run_step(session: Session, phase: Phase, step: int) -> None:
    started = time.perf_counter()
    row: dict[str, Any] = {"stage": session.stage, "phase": phase.name, "step": step}
    loss = math.nan
    for turn in phase.turns:
        if step % turn.every:
            continue
        seed_turn(session.recipe.seed, phase.name, turn.name, step, session.accelerator.process_index)
        begun = time.perf_counter()
        figures = {key: float(value) for key, value in turn.run(step).items()}  # which waits for the device
        row[f"{turn.name}_seconds"] = round(time.perf_counter() - begun, 4)
        loss = figures["loss"]
        for key, value in figures.items():
            # not the loss alone: one infinite gradient ruins the weights at once and the loss a step later
            if not math.isfinite(value):
                _stop_on_nan(session, phase, turn, step, f"{key.replace('_', ' ')} is {value}")
        row |= {f"{turn.name}_{key}": value for key, value in figures.items()}
    row["kept"] = phase.kept()
    row |= phase.shape()
    row["seconds"] = round(time.perf_counter() - started, 4)
    every = _cadence(session, phase)
    if every and (step + 1) % every == 0:
        begun = time.perf_counter()
        figures = phase.figures()
        row |= {f"valid_{key}": value for key, value in figures.items()}
        judged = session.judge(figures, phase.name, step)
        session.stop = judged.stop
        if judged.breached:
            row["breached"] = list(judged.breached)
        row["evaluate_seconds"] = round(time.perf_counter() - begun, 4)
    session.metrics.write(**row)
    if session.trackers:
        session.trackers.step(row, phase.before + step)
    session.progress.step(phase.name, step, loss, row["kept"])


def _cadence(session: Session, phase: Phase) -> int:
    """Steps between validation figures; 0: none."""
    evaluate = session.recipe.evaluate
    return evaluate.search_every if evaluate.every and evaluate.search_every and phase.name in SEARCHES else evaluate.every


def _stop_on_nan(session: Session, phase: Phase, turn: Turn, step: int, what: str) -> None:
    *others, last = (f"{key} (now {rate})" for key, rate in _rates(session.recipe).items())
    lower = f"{', '.join(others)} or {last}" if others else last
    raise UserError(
        f"the {what} in phase {phase.name!r}, turn {turn.name!r}, step {step}: lower {lower}, or set train.precision=float32, "
        "and start anew with --overwrite"
    )


def _rates(recipe: Recipe) -> dict[str, float]:
    """Learning rates that the recipe's method has."""
    rates = {"train.lr": recipe.train.lr}
    if recipe.method == "tomoe":
        return rates | {"moe.lr": recipe.moe.lr, "moe.router_lr": recipe.moe.router_lr}
    decides = recipe.method == "atp" or (recipe.method == "twostage" and recipe.twostage.scores == "generator")
    return rates | ({"generator.lr": recipe.generator.lr} if decides else {})


def _checkpoint(session: Session, phase: Phase, step: int) -> None:
    # the row first: a kill between the two leaves a row too many, which the resumed run cuts off again
    session.metrics.write(checkpoint=[session.stage, phase.name, step])
    state = {"phase": phase.name, "step": step, "seconds": session.seconds, "memory": session.peak, **phase.capture()}
    if session.sharded and phase.in_parts:
        shards.save(checkpoint_path(session), state, f"{phase.name}-{step}")
    else:
        checkpoint.save(checkpoint_path(session), gathered_state(state))
    session.accelerator.wait_for_everyone()
