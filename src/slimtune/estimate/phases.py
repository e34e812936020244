"""The phases of a run: steps, tokens, operations, and the time that they take on a machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slimtune.estimate import experts, launches, traffic
from slimtune.estimate.cost import GRADIENTS, NONE, Job, Rounds, Solves, Turn
from slimtune.estimate.machines import FIRST_GRAPH, SYMBOLIC, Machine
from slimtune.models.compiled import MOST_GRAPHS, decided


@dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        tokens: of all turns.
        flops: floating-point operations; ``step_flops`` leaves out what comes before the first step (the prior).
        seconds: with what is compiled; None without a machine. ``step_seconds`` leaves out that, what comes before the first
            step, fits outside the steps, and filling host memory.
        solve_flops: of the solves that each process makes.
        carried: bytes that come from host memory for them.
    """

    name: str
    steps: int
    tokens: int
    flops: float
    seconds: float | None
    step_flops: float
    step_seconds: float | None = None
    solve_flops: float = 0.0
    carried: float = 0.0


def phases(job: Job, machine: Machine | None, ranks: int = 1) -> list[Phase]:
    """The phases of the run, and their time on ``ranks`` of a machine."""
    recipe, phase = job.recipe, _timed(job, machine, ranks)
    compiled, part = job.compiled, job.part
    dense = job.adapt(), traffic.turn(job, compiled=compiled), launches.turn(job, compiled=compiled)
    if recipe.method == "finetune":
        return _compiling([phase("tune", recipe.train.steps, [Turn(recipe.train.steps, *dense)])], job, machine)
    search, recover = recipe.search.steps, recipe.recover.steps
    updates = search + recover
    reference = [phase("dense LoRA", updates, [Turn(updates, *dense)])] if recipe.evaluate.dense_lora else []
    if job.shape:
        rows = [phase("search", search, [experts.search(job)], first=experts.passes(job), solves=experts.solves(job))]
        rows.append(phase("recover", recover, [experts.recovery(job, recover)]))
        return _compiling(rows + reference, job, machine)
    kept = recipe.recover.checkpointed
    moved = traffic.turn(job.recovering, part, compiled=compiled, checkpointed=kept)
    small = job.adapt(part, kept), moved, launches.turn(job, kept, compiled)
    decide, prior = _decide(job)
    if recipe.method == "twostage":
        score = decide if recipe.twostage.scores in GRADIENTS else Turn(0, job.forward(), traffic.look(job), launches.look(job))
        steps = search if recipe.twostage.scores == "generator" else 0
        rows = [phase("decide", steps, [], first=_scoring(job, score), solves=job.solves())]
        rows.append(phase("recover", recipe.tuning_steps, [Turn(recipe.tuning_steps, *small)]))
        return _compiling(rows + reference, job, machine)
    settle, teacher = recipe.settle_steps, _teacher(job)
    gated = Turn(search, job.adapt(), traffic.turn(job, gates=traffic.GATES), launches.turn(job)).beside(teacher)
    rows = [phase("search", search, [gated, decide], first=prior, solves=job.solves())]
    if settle:  # on the uncut model, out of the recovery's steps
        rows.append(phase("settle", settle, [replace(gated, steps=settle)]))
    after = Turn(recover - settle, *small)
    taught = recipe.distill.recover or recipe.distill.teacher
    rows.append(phase("recover", recover - settle, [after.beside(teacher) if taught else after]))
    return _compiling(rows + reference, job, machine)


def with_compiling(job: Job, machine: Machine | None) -> Job:
    """``job`` with ``train.compile=auto`` decided: where it may (``Job.may_compile``), on a GPU, and is expected to pay."""
    if job.recipe.train.compile != "auto":
        return job

    def made(compiled: bool) -> Job:
        return replace(job, recipe=decided(job.recipe, compiled))

    def seconds(compiled: bool) -> float:
        return sum(phase.seconds or 0.0 for phase in phases(made(compiled), machine))

    return made(bool(machine and machine.graph and job.may_compile) and seconds(True) < seconds(False))


def _compiling(rows: list[Phase], job: Job, machine: Machine | None) -> list[Phase]:
    """With the seconds before the first step of what is compiled; layers that are cut are taken to differ in their widths."""
    if not (job.compiled and machine and machine.graph):
        return rows
    budget = job.recipe.budget
    differ = budget.layout == "per-layer" and budget.keep < 1
    layers = len(job.structure.layers) if differ else 1
    cut = SYMBOLIC if layers > MOST_GRAPHS else max(FIRST_GRAPH, machine.graph * layers)
    taken = {"recover": 0.0 if job.shape else cut, "tune": FIRST_GRAPH, "dense LoRA": FIRST_GRAPH}
    return [replace(row, seconds=(row.seconds or 0.0) + taken.get(row.name, 0.0)) for row in rows]


def _teacher(job: Job) -> Turn:
    looks = Turn(0, job.forward(), traffic.look(job), launches.look(job))
    return looks if job.recipe.distill.weight > 0 else Turn(0, 0.0, 0.0, 0.0)


def _decide(job: Job) -> tuple[Turn, list[Turn]]:
    """All decide turns, and what is read before the first of them."""
    recipe = job.recipe
    part = (recipe.search.batch or recipe.train.batch) / recipe.train.batch
    own = 2 * job.forward() + 4 * job.lora() + job.recompute() + 6 * job.generator / (part * job.step_tokens)
    moved = traffic.turn(job, gates=traffic.LEAVES)
    gradients, looks = (part * recipe.generator.prior_steps * passes for passes in recipe.prior_passes)
    launched = launches.decide(job)
    look = Turn(looks, job.forward() + job.moments(), traffic.look(job), launches.look(job, recipe.search.batch))
    turns = -(-recipe.search.steps // recipe.search.decide_every) if recipe.search.update == "alternating" else 0
    return Turn(part * turns, own + 2 * job.innovations(), moved, launched), [Turn(gradients, own, moved, launched), look]


def _timed(job: Job, machine: Machine | None, ranks: int) -> Callable[..., Phase]:
    """What makes a phase of its turns."""

    def seconds(turns: Sequence[Turn]) -> float:
        return job.step_tokens / ranks * sum(turn.steps * of_a_token(turn) for turn in turns)

    def of_a_token(turn: Turn) -> float:
        assert machine
        kernels = turn.flops / machine.matmul + (turn.traffic / machine.copied if machine.copied else 0.0)
        return max(kernels, turn.launched * (machine.block or 0.0))

    def fits(machine: Machine, rounds: Rounds) -> float:
        return rounds.flops / machine.exact + (rounds.carried / machine.link if machine.link else 0.0)

    def phase(name: str, steps: int, turns: Sequence[Turn], first: Sequence[Turn] = (), solves: Solves = NONE) -> Phase:
        """``first``: before the first step."""
        whole = [*turns, *first]
        flops, of_steps = (sum(turn.steps * job.step_tokens * turn.flops for turn in each) for each in (whole, turns))
        tokens = round(sum(turn.steps for turn in whole) * job.step_tokens)
        inside = around = 0.0
        if machine:
            inside, around = (fits(machine, rounds) for rounds in (solves.steps, solves.outside))
            around += solves.written / machine.host if machine.host else 0.0
        return Phase(
            name,
            steps,
            tokens,
            flops,
            seconds(whole) + inside + around if machine else None,
            of_steps,
            (seconds(turns) + inside) / max(1, steps) if machine else None,
            solves.flops,
            solves.carried,
        )

    return phase


def _scoring(job: Job, score: Turn) -> list[Turn]:
    """What ``twostage`` reads before its cut; ``score``: what a token costs that a score takes."""
    recipe = job.recipe
    scoring, refit = recipe.scoring_windows - recipe.refit_windows, recipe.refit_windows
    looks = Turn(refit / recipe.train.batch, job.forward() + job.moments(), traffic.look(job), launches.look(job))
    return [replace(score, steps=scoring / recipe.train.batch), looks]
