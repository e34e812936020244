"""The arithmetic of a run: operations. What memory it takes stands in ``memory``, what time in ``phases``.

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
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from slimtune import runtime
from slimtune.prune.shape import Shape
from slimtune.recipe import Recipe
from slimtune.structure.axes import KV_GROUP, Side, Structure

GRADIENTS = ("taylor", "generator")
"""Scores of ``twostage`` that need a gradient; the others only look on."""


@dataclass(frozen=True)
class Rounds:
    """Fits of all consumers of a process: operations, and bytes that come from host memory for them."""

    flops: float = 0.0
    carried: float = 0.0


@dataclass(frozen=True)
class Solves:
    """Rounds in the steps of a phase, before and after them, and bytes of host memory that is new."""

    steps: Rounds = Rounds()
    outside: Rounds = Rounds()
    written: float = 0.0

    @property
    def flops(self) -> float:
        """Of all rounds."""
        return self.steps.flops + self.outside.flops

    @property
    def carried(self) -> float:
        """Of all rounds."""
        return self.steps.carried + self.outside.carried


NONE = Solves()


@dataclass(frozen=True)
class Turn:
    """``steps`` of ``train.batch`` windows, and what one of their tokens costs: operations, bytes of memory, launches."""

    steps: float
    flops: float
    traffic: float
    launched: float

    def beside(self, other: Turn) -> Turn:
        """The same, in which each token goes through ``other`` as well."""
        return Turn(self.steps, self.flops + other.flops, self.traffic + other.traffic, self.launched + other.launched)


def windows(recipe: Recipe, batch: int) -> tuple[int, int]:
    """Windows of one process in a step of ``batch``, and in one of its passes."""
    mine = -(-batch // runtime.world_size())
    return mine, min(recipe.train.micro_batch or mine, mine)


@dataclass(frozen=True)
class Job:
    """What the formulas need, collected once.

    Attributes:
        shape: of the experts that MLPs become, where they do.
    """

    recipe: Recipe
    config: PreTrainedConfig
    structure: Structure
    part: float
    whole: bool
    generator: int
    bytes_: int
    shape: Shape | None = None

    @property
    def experts(self) -> Shape:
        """``shape``, of a run that has one."""
        assert self.shape
        return self.shape

    @property
    def step_tokens(self) -> int:
        """Tokens of an adapt turn over all processes."""
        return self.recipe.train.batch * self.recipe.data.max_length

    @property
    def pass_tokens(self) -> int:
        """Tokens of one pass of one process in an adapt turn."""
        return windows(self.recipe, self.recipe.train.batch)[1] * self.recipe.data.max_length

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

    @property
    def parts(self) -> int:
        """Processes that share the weights of one model."""
        return runtime.world_size() if self.recipe.train.shard == "full" else 1

    @property
    def quantized(self) -> bool:
        """Whether the blocks' linears rest in 4 bits."""
        return self.recipe.model.quantize != "none" and not self.whole

    @property
    def may_compile(self) -> bool:
        """Whether ``train.compile=auto`` is open: of LoRA, nothing in 4 bits, no experts, the model whole in each process."""
        recipe = self.recipe
        return not (self.whole or self.parts > 1 or recipe.model.quantize != "none" or recipe.method == "tomoe")

    @property
    def compiled(self) -> bool:
        """Whether blocks and loss are, where that is decided (``phases.with_compiling``)."""
        return self.recipe.train.compile is True

    @property
    def recovering(self) -> Job:
        """The same as its weights rest after the cut: whole ones, where nothing has decided it (``memory.with_room``)."""
        if self.recipe.recover.quantize is True or not self.quantized:
            return self
        model = self.recipe.model.model_copy(update={"quantize": "none"})
        return replace(self, recipe=self.recipe.model_copy(update={"model": model}))

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

    def adapt(self, part: float = 1.0, checkpointed: float = 1.0) -> float:
        """Operations of one token in a turn that trains the model, ``checkpointed`` of whose blocks are."""
        turn = 3 * self.forward(part) if self.whole else 2 * self.forward(part) + 6 * self.lora(part)
        return turn + checkpointed * self.recompute(part)

    def moments(self) -> float:
        """Operations of one token that takes the second moments of all consumers' inputs once: halves, of 16-bit ones."""
        return sum(2 * width**2 for width in self.consumers) * (9 / 16 if self.bytes_ == 2 else 1)

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

    def solves(self) -> Solves:
        """Those of the decide turns of a search, whose target falls geometrically over ``search.ramp``, and at a cut."""
        search, wanted, rival = self.recipe.search, self.recipe.compensate, self.recipe.method == "twostage"
        follows, judging = self.searches and wanted.weights != "none", wanted.weights == "decide"
        steps, outside = list[float](), list[float]()
        if follows:
            fall, moved = max(1.0, search.ramp * search.steps), range(0, search.steps, search.decide_every)
            steps = [self.solve(self.part ** min(1.0, (step + 1) / fall), judging) for step in moved]
            # the open model's innovations, for the first turn, and the weights of the Plan, which no step's masks are
            outside = [self.solve(1.0, judging)] * judging + [self.solve(self.part, judging)]
        if (rival and self.recipe.twostage.least_squares) or (follows and self.quantized):  # the originals' own
            outside.append(self.solve(self.part))
        consumers = self.config.hidden_size * sum(self.consumers)
        each = sum(9 / 4 * width**2 for width in self.consumers) + self.bytes_ * consumers
        resting = each if wanted.offload and (steps or outside) else 0.0
        written = resting / self.parts  # with the whole model each, all have all consumers, and sum up all moments first
        if self.quantized and self.recipe.prunes:  # originals of what a cut leaves, and before it of what compensates
            written += self.bytes_ * (consumers * follows + self.part * self.structure.prunable_params)
        ranks = runtime.world_size()  # each fits its own layers' consumers
        inside, around = (Rounds(sum(some) / ranks, len(some) * resting / ranks) for some in (steps, outside))
        return Solves(inside, around, written)

    def recompute(self, part: float = 1.0) -> float:
        """The blocks' forward, once more, with activation checkpointing."""
        again = self.recipe.model.checkpointing != "none"
        return self.forward(part) - 2 * self.head_params if again else 0.0
