"""The arithmetic of a run's cost: operations and bytes.

Legend: B windows in a step, T tokens in a window, D model width, A query width (heads x head_dim), K key/value width,
F MLP width, V vocabulary, r LoRA rank, s bytes of a number in the compute dtype, P parameters. After the cut every
axis is taken to keep the same part of its units, the part that meets the budget.

Floating-point operations of a token (2 a multiply-add): forward ``f = 2 (block linears + V D) + 4 T A``. A turn costs
``2 f + 6 P_lora`` (LoRA: forward, and a backward that needs no gradient of the frozen weights), ``3 f`` (all weights)
or ``2 f + 4 P_lora + 6 P_generator / tokens`` (decide); activation checkpointing adds the blocks' forward once more,
a teacher one ``f``. Taking second moments of the consumers' inputs costs ``2 (A^2 + F^2)`` a layer, and so does each of the
two passes through matrices of innovations in a decide turn (``compensate.matrices``). Evaluation and data are not counted.

Apart from the tokens, in fp32 or fp64: each decide turn with ``compensate`` moves the masks and fits every consumer anew. With
k inputs kept and g gone, ``k^3 / 3`` for the Cholesky factor, ``2 g k (k + D)`` for what kept columns take over; where decide
turns judge by innovations, ``2 k^3`` more for a matrix of them and ``2 k^3 / 3`` for ``share``s. The k falls with the search's
target; a consumer whose mask stays costs nothing.

Bytes of activations, a token and layer: ``16 D + s (2 A + 2 K + 4 F) + 28 r`` with LoRA and
``24 D + s (2 A + 2 K + 4 F)`` without: what autograd saves in a llama block, as saved-tensor hooks count it (norms stay
fp32; families with more norms save a little more), plus ``10 T heads`` where attention is eager. With checkpointing
``s D`` a layer and one whole block. Compensation keeps ``s d^2`` bytes of a matrix of innovations (of consumers of d
inputs, A or F, up to ``compensate.matrices``), and, in host memory unless told otherwise, ``9/4 (A^2 + F^2)`` a layer of second
moments and the weights of ``o_proj`` and ``down_proj`` once more.
Trained weights cost 16 bytes each (fp32 weight, gradient, two AdamW moments), logits ``12 B T V`` bytes (``14 B T V`` in
16-bit), twice with a teacher; ``2 s B T V`` in an adapt turn whose loss is compiled (``train.compile``, no teacher); a decide
turn of more windows may need more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from slimtune import runtime
from slimtune.recipe import Recipe
from slimtune.structure.axes import FFN, KV_GROUP, Side, Structure

GRADIENTS = ("taylor", "generator")
"""Scores of ``twostage`` that need a gradient; the others only look on."""


@dataclass(frozen=True)
class Phase:
    """One phase: steps, tokens of all turns, floating-point operations, seconds (None without a measured rate).

    ``step_flops`` leaves out what comes before the first step (the prior), ``flops`` the solves that each process makes.
    """

    name: str
    steps: int
    tokens: int
    flops: float
    seconds: float | None
    step_flops: float
    solve_flops: float = 0.0


@dataclass(frozen=True)
class Job:
    """What the formulas need, collected once."""

    recipe: Recipe
    config: PreTrainedConfig
    structure: Structure
    part: float
    whole: bool
    generator: int
    bytes_: int

    @property
    def step_tokens(self) -> int:
        """Tokens of an adapt turn over all processes."""
        return self.recipe.train.batch * self.recipe.data.max_length

    @property
    def query_widths(self) -> int:
        """A summed over the layers."""
        head = self.structure.group * self.structure.head_dim
        return sum(layer.units[KV_GROUP] * head for layer in self.structure.layers)

    @property
    def searches(self) -> bool:
        """Whether a generator learns in this run."""
        return self.recipe.method == "atp" or (self.recipe.method, self.recipe.twostage.scores) == ("twostage", "generator")

    @property
    def consumers(self) -> list[int]:
        """Input widths of all consumers: A and F of every layer."""
        return [
            layer.units[row.into.axis] * self.structure.rows(row.into)
            for layer in self.structure.layers
            for row in self.structure.family.linears
            if row.into
        ]

    @property
    def head_params(self) -> int:
        """V D: the output head is a matmul whether or not it is tied."""
        return int(self.config.vocab_size * self.config.hidden_size)

    def lora(self, part: float = 1.0) -> int:
        """LoRA parameters when ``part`` of the units is left (0 when all weights are trained)."""
        if self.whole:
            return 0
        return sum(
            round(self.recipe.lora.rank * (self._dim(layer, row.out, part) + self._dim(layer, row.into, part)))
            for layer in range(len(self.structure.layers))
            for row in self.structure.family.linears
        )

    def _dim(self, layer: int, side: Side | None, part: float) -> float:
        if side is None:
            return float(self.config.hidden_size)
        return part * self.structure.layers[layer].units[side.axis] * self.structure.rows(side)

    def forward(self, part: float = 1.0) -> float:
        """Operations of one token's forward pass."""
        blocks = 2 * self.structure.prunable_params + 4 * self.recipe.data.max_length * self.query_widths
        return part * blocks + 2 * self.head_params

    def adapt(self, part: float = 1.0) -> float:
        """Operations of one token in a turn that trains the model."""
        turn = 3 * self.forward(part) if self.whole else 2 * self.forward(part) + 6 * self.lora(part)
        return turn + self.recompute(part)

    def moments(self) -> float:
        """Operations of one token that takes the second moments of all consumers' inputs once."""
        return sum(2 * width**2 for width in self.consumers)

    def innovations(self) -> float:
        """Those of one token that goes through all matrices of innovations once."""
        wanted = self.recipe.compensate
        judges = self.searches and wanted.weights == "decide"
        return sum(2 * width**2 for width in self.consumers if judges and width <= wanted.matrices)

    def solve(self, part: float, judging: bool = False) -> float:
        """Operations of fitting all consumers when ``part`` of the inputs is kept; for ``judging``, with innovations."""
        matrices, total = self.recipe.compensate.matrices, 0.0
        for width in self.consumers:
            kept, gone = part * width, (1 - part) * width
            total += kept**3 / 3 + 2 * gone * kept * (kept + self.config.hidden_size)
            if judging:
                total += kept**3 * (2 if width <= matrices else 2 / 3)
        return total

    def solves(self) -> float:
        """Those of the decide turns of a search, whose target falls geometrically over ``search.ramp``, and at a cut."""
        search, weights, rival = self.recipe.search, self.recipe.compensate.weights, self.recipe.method == "twostage"
        refit = self.solve(self.part) if rival and self.recipe.twostage.least_squares else 0.0
        if not self.searches or weights == "none":
            return refit
        fall, moved = max(1.0, search.ramp * search.steps), range(0, search.steps, search.decide_every)
        judging = weights == "decide"
        before = self.solve(1.0, judging) if judging else 0.0  # innovations of the open model, for the first turn
        return before + sum(self.solve(self.part ** min(1.0, (step + 1) / fall), judging) for step in moved) + refit

    def recompute(self, part: float = 1.0) -> float:
        """The blocks' forward, once more, with activation checkpointing."""
        again = self.recipe.model.checkpointing != "none"
        return self.forward(part) - 2 * self.head_params if again else 0.0


Turn = tuple[float, float]


def phases(job: Job, speed: float | None, solving: float | None = None) -> list[Phase]:
    """The phases of the run.

    Args:
        job: the run.
        speed: operations a second over all processes.
        solving: in fp32, of one process, for the solves that each of them makes; without it they take no time.
    """
    recipe, phase = job.recipe, _timed(job, speed, solving)
    if recipe.method == "finetune":
        return [phase("tune", recipe.train.steps, [(recipe.train.steps, job.adapt())])]
    search, recover, part = recipe.search.steps, recipe.recover.steps, job.part
    small = (recipe.search.batch or recipe.train.batch) / recipe.train.batch
    decide = 2 * job.forward() + 4 * job.lora() + job.recompute() + 6 * job.generator / (small * job.step_tokens)
    prior = [
        (small * recipe.generator.prior_steps * passes, cost)
        for passes, cost in zip(recipe.prior_passes, (decide, job.forward() + job.moments()), strict=True)
    ]
    decide += 2 * job.innovations()
    teacher = job.forward() if recipe.distill.weight > 0 else 0.0
    updates = search + recover
    reference = [phase("dense LoRA", updates, [(updates, job.adapt())])] if recipe.evaluate.dense_lora else []
    decides = -(-search // recipe.search.decide_every) if recipe.search.update == "alternating" else 0
    turns = [(search, job.adapt() + teacher), (small * decides, decide)]
    if recipe.method == "twostage":
        score = decide if recipe.twostage.scores in GRADIENTS else job.forward()
        steps = search if recipe.twostage.scores == "generator" else 0
        rows = [phase("decide", steps, [], first=_scoring(job, score), solves=job.solves())]
        rows.append(phase("recover", recipe.tuning_steps, [(recipe.tuning_steps, job.adapt(part))]))
        return rows + reference
    settle = recipe.settle_steps
    recovering = job.adapt(part) + (teacher if recipe.distill.recover or recipe.distill.teacher else 0.0)
    rows = [phase("search", search, turns, first=prior, solves=job.solves())]
    if settle:  # on the uncut model, out of the recovery's steps
        rows.append(phase("settle", settle, [(settle, job.adapt() + teacher)]))
    rows.append(phase("recover", recover - settle, [(recover - settle, recovering)]))
    return rows + reference


def _timed(job: Job, speed: float | None, solving: float | None) -> Callable[..., Phase]:
    """What makes a phase of its turns; see ``phases`` for the rates."""

    def phase(name: str, steps: int, turns: Sequence[Turn], first: Sequence[Turn] = (), solves: float = 0.0) -> Phase:
        """``turns`` (and those before the first step): (steps of ``train.batch`` windows, operations a token)."""
        whole = [*turns, *first]
        flops, of_steps = (sum(count * job.step_tokens * cost for count, cost in each) for each in (whole, turns))
        tokens = round(sum(count for count, _ in whole) * job.step_tokens)
        seconds = flops / speed + (solves / solving if solving else 0.0) if speed else None
        return Phase(name, steps, tokens, flops, seconds, of_steps, solves)

    return phase


def _scoring(job: Job, score: float) -> list[tuple[float, float]]:
    """What ``twostage`` reads before its cut, as ``phases`` takes it; ``score``: operations a token that a score takes."""
    recipe = job.recipe
    scoring, refit = recipe.scoring_windows - recipe.refit_windows, recipe.refit_windows
    return [(scoring / recipe.train.batch, score), (refit / recipe.train.batch, job.forward() + job.moments())]


def memory(job: Job, kind: str) -> dict[str, int]:
    """Bytes of one process at the fullest moment, before the cut."""
    recipe, layers = job.recipe, len(job.structure.layers)
    micro = recipe.train.micro_batch or -(-recipe.train.batch // runtime.world_size())
    tokens, size = micro * recipe.data.max_length, job.bytes_
    if job.whole:
        weights = {"weights, gradients, AdamW": 16 * job.structure.total_params}
    else:
        weight_bytes = runtime.pick_dtype(recipe.model.dtype, kind).itemsize
        weights = {
            "weights": weight_bytes * job.structure.total_params,
            "LoRA, gradients, AdamW": 16 * job.lora(),
            "generator, gradients, AdamW": 16 * job.generator,
        }
        weights |= _compensation(job, weight_bytes)
    blocks = activation_bytes(job) * tokens
    if recipe.model.checkpointing != "none":
        blocks = blocks // layers + size * job.config.hidden_size * layers * tokens
    teacher = 2 if recipe.distill.weight > 0 and recipe.method == "atp" else 1
    items: dict[str, float] = {**weights, "activations": blocks, "logits": _logits(job, tokens, teacher)}
    if recipe.distill.teacher and teacher == 2:
        items["teacher weights"] = items["weights"]
    elif recipe.distill.recover and teacher == 2:  # it shares the frozen weights until the cut gives the student others
        items["cut weights beside the teacher's (recover)"] = items["weights"] * recipe.budget.keep
    return {name: int(value) for name, value in items.items() if value}


def _compensation(job: Job, weight_bytes: int) -> dict[str, int]:
    """Bytes on the device of what ``compensate`` keeps: innovations, and second moments and weights that are not offloaded."""
    wanted = job.recipe.compensate
    if wanted.weights == "none" or not job.searches:
        return {}
    squares = sum(width**2 for width in job.consumers)
    narrow = sum(width**2 for width in job.consumers if width <= wanted.matrices)
    innovations = job.bytes_ * narrow if wanted.weights == "decide" else 0
    weights = weight_bytes * sum(job.config.hidden_size * width for width in job.consumers)
    return {"compensation": innovations + (0 if wanted.offload else 9 * squares // 4 + weights)}


def _logits(job: Job, tokens: int, models: int) -> int:
    """Bytes of the logits, what a loss makes of them and their gradient: of an adapt turn of ``tokens``, or a decide turn.

    Args:
        models: that read the tokens in an adapt turn; two with a teacher.
    """
    recipe, vocabulary = job.recipe, int(job.config.vocab_size)
    eager = vocabulary * (12 if job.bytes_ == 4 else 14)
    adapt = models * tokens * (2 * job.bytes_ * vocabulary if models == 1 and recipe.train.compile else eager)
    return int(max(adapt, _decide_windows(recipe) * recipe.data.max_length * eager))  # its loss is not compiled


def _decide_windows(recipe: Recipe) -> int:
    """Windows of one process in one pass of a decide turn."""
    if recipe.method == "finetune" or (recipe.method == "twostage" and recipe.twostage.scores not in GRADIENTS):
        return 0
    mine = -(-(recipe.search.batch or recipe.train.batch) // runtime.world_size())
    return min(recipe.train.micro_batch or mine, mine)


def activation_bytes(job: Job) -> int:
    """What autograd saves for one token in all blocks, without checkpointing (the formula of this module)."""
    rank = 0 if job.whole else job.recipe.lora.rank
    dims = (24 if job.whole else 16) * job.config.hidden_size + 28 * rank
    structure, total = job.structure, 0
    eager = job.recipe.model.attention == "eager" or getattr(job.config, "attn_logit_softcapping", None)
    for layer in structure.layers:
        keys = layer.units[KV_GROUP] * structure.head_dim
        wide = 2 * keys * structure.group + 2 * keys + 4 * layer.units[FFN]
        scores = 10 * job.recipe.data.max_length * layer.units[KV_GROUP] * structure.group if eager else 0
        total += dims + job.bytes_ * wide + scores
    return total
