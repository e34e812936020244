"""A base model with our scores of its units, and the figures that hold other scores against them (for ``crosscheck.py``)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from slimtune.data.batches import load_splits
from slimtune.methods.decide import Decider
from slimtune.methods.scores import Scorer, Scores
from slimtune.methods.start import gated_model
from slimtune.models.load import load_config, load_tokenizer, structure_of
from slimtune.models.surgery import blocks_of
from slimtune.recipe import parse
from slimtune.runtime import Metrics, RunFolder
from slimtune.structure.axes import AXES, FFN, KV_GROUP, Structure
from slimtune.train.objective import IGNORE
from slimtune.train.progress import Progress
from slimtune.train.session import Session, make_accelerator

TINY: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 6144, "initializer_range": 0.1}
EXACT = 1e-5
"""Largest relative difference where the definitions are the same: fp32 sums in another order differ by 1e-6 or less."""
GRADIENT = 1e-4
"""The same for squared gradients, which come through another kind of attention."""
RANK, KEPT = 0.5, 0.6
"""Least rank correlation and least overlap of the kept half where definitions differ; chance gives 0 and 0.5."""
HALF = 0.5
Sample = dict[str, Tensor]
"""``input_ids`` and ``labels`` of a window, [1, T], without padding."""


@dataclass(frozen=True)
class Case:
    """A base model and what our criteria say of it.

    Attributes:
        model: without LoRA and gates, fp32, eager attention.
        ours: {criterion: scores}.
        batches: the samples of each decision batch that the scores were read from.
    """

    model: Any
    structure: Structure
    ours: dict[str, Scores]
    batches: list[list[Sample]]

    def consumer(self, layer: int, axis: str) -> Any:
        """The linear before which the gates of ``axis`` stand."""
        return blocks_of(self.model, self.structure)[layer].get_submodule(self.structure.family.consumer(axis).path)

    def units(self, axis: str) -> int:
        """Units of an axis in a layer, by the config."""
        config = self.model.config
        return int(config.num_key_value_heads if axis == KV_GROUP else config.intermediate_size)

    def of(self, criterion: str, axis: str) -> Scores:
        """Our scores of one axis."""
        return {site: value for site, value in self.ours[criterion].items() if site[1] == axis}


@dataclass(frozen=True)
class Check:
    """One figure and what it must be: at most ``limit``, or at least, where ``least`` is set."""

    library: str
    criterion: str
    axis: str
    measure: str
    value: float
    limit: float
    least: bool = False

    @property
    def agrees(self) -> bool:
        return self.value >= self.limit if self.least else self.value <= self.limit

    @property
    def row(self) -> dict[str, Any]:
        """The flat row of ``--rows``."""
        named = {"library": self.library, "version": version(self.library), "criterion": self.criterion}
        return {**named, "axis": self.axis, "measure": self.measure, "value": self.value}


def difference(ours: Scores, theirs: Scores) -> float:
    """Largest |ours - theirs| of any unit, relative to theirs or to their mean in the layer, whichever is larger."""
    pairs = [(ours[site].double(), theirs[site].double()) for site in theirs]
    found = [((mine - other).abs() / other.abs().clamp(min=other.abs().mean())).max() for mine, other in pairs]
    return float(torch.stack(found).max())


def spearman(ours: Scores, theirs: Scores) -> float:
    """Rank correlation over the units of all layers; equal values share their mean rank."""
    ranks = []
    for scores in (ours, theirs):
        flat: Any = torch.cat([scores[site].double() for site in theirs])
        _, place, count = flat.unique(return_inverse=True, return_counts=True)
        ranks.append((count.cumsum(0) - (count - 1) / 2)[place])
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def overlap(ours: Tensor, theirs: Tensor) -> float:
    """Share of the units in the upper half by one score that are in the upper half by the other."""
    count = round(len(ours) * HALF)
    kept = [set(scores.topk(count).indices.tolist()) for scores in (ours, theirs)]
    return len(kept[0] & kept[1]) / count


def same(library: str, criterion: str, case: Case, theirs: Scores, limit: float = EXACT) -> list[Check]:
    """A check of each axis where the definitions are the same."""
    sites = {axis: {site: value for site, value in theirs.items() if site[1] == axis} for axis in AXES}
    values = {axis: difference(case.of(criterion, axis), sites[axis]) for axis in AXES}
    return [Check(library, criterion, axis, "largest relative difference", value, limit) for axis, value in values.items()]


def prepare(model: str | None, text: str, batches: int, batch: int, length: int, folder: str) -> Case:
    """Load or draw a base, score it as a ``twostage`` run would, and take LoRA and gates out again."""
    base = {"path": model} if model else {"path": "", "init": "config", "config": TINY, "tokenizer": "builtin:base-10m"}
    data = {"decision": text, "max_length": length}
    train = {"batch": batch, "micro_batch": max(1, batch // 2), "precision": "float32"}
    raw = {"out": folder, "device": "cpu", "method": "twostage", "model": base, "data": data, "train": train}
    raw["twostage"] = {"batches": batches}
    recipe = parse(raw)
    structure, run = structure_of(load_config(recipe.model)), RunFolder(folder)
    splits = load_splits(recipe.data, load_tokenizer(recipe.model), frozenset({"decision"}))
    accelerator = make_accelerator(recipe)
    session = Session(recipe, accelerator, structure, splits, run, Metrics(run), Progress(), valid_figures=lambda _: {})
    gated: Any
    gated, bank, handles = gated_model(session)
    decider = Decider(session, gated, bank, lambda: gated)
    scorer = Scorer(session, gated, decider)
    # sums of squares over a step, times its windows: one number for all units, which the others do not know of
    taylor = {site: value / batch for site, value in scorer.taylor().items()}
    ours = {"magnitude": scorer.magnitude(), "taylor": taylor, "wanda": scorer.wanda()}
    read = [[sample for part in decider.batches.at(step) for sample in _samples(part)] for step in range(batches)]
    for handle in handles:
        handle.remove()
    plain = gated.unload().eval().requires_grad_(True)
    plain.set_attn_implementation("eager")
    return Case(plain, structure, ours, read)


def _samples(part: dict[str, Tensor]) -> Iterator[Sample]:
    for ids, labels in zip(part["input_ids"], part["labels"], strict=True):
        end = int((labels != IGNORE).nonzero().max()) + 1
        yield {"input_ids": ids[None, :end], "labels": labels[None, :end]}


def owned(case: Case, layer: int, axis: str) -> Tensor:
    """[units, weights] of all weights that each unit of a Llama block owns, by the head counts of its config."""
    block: Any = blocks_of(case.model, case.structure)[layer]
    units, attention, mlp = case.units(axis), block.self_attn, block.mlp
    if axis == FFN:
        matrices = [mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T]
    else:
        matrices = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight, attention.o_proj.weight.T]
    return torch.cat([matrix.detach().reshape(units, -1) for matrix in matrices], dim=1)
