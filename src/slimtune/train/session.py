"""What a run carries from room to room: recipe, devices, data, run folder, and the ways to report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from slimtune.data.batches import Order, Splits, Windows
from slimtune.errors import UserError
from slimtune.recipe import Recipe
from slimtune.runtime import Metrics, RunFolder, peak_memory, pick_device, pick_precision
from slimtune.structure.axes import Structure
from slimtune.train.judgement import Breach, Judgement, not_judged
from slimtune.train.objective import find_targets
from slimtune.train.progress import Progress
from slimtune.train.trackers import Trackers

Figures = dict[str, float]


def make_accelerator(recipe: Recipe) -> Accelerator:
    """accelerate for device, autocast and DDP. Raises UserError where the device is absent."""
    device = pick_device(recipe.device)
    precision = pick_precision(recipe.train.precision, device)
    mixed = "bf16" if precision is torch.bfloat16 else "no"
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    if AcceleratorState._shared_state.get("_mixed_precision", mixed) != mixed:
        # accelerate keeps the first run's precision for the whole process and refuses another one
        AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=mixed,
        cpu=device == "cpu",
        # what rank 0 does alone (loading, hashing, verifying on the CPU) takes longer than the ten minutes that NCCL waits
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=6))],
    )


def figures_in_bf16(accelerator: Accelerator) -> bool:
    """Whether figures are taken under autocast: on a GPU as training is; on CPU never, whatever it can multiply."""
    return accelerator.device.type == "cuda" and accelerator.mixed_precision == "bf16"


def check_launcher(recipe: Recipe) -> None:
    """What shards a model is the recipe's ``train.shard``, and not all that a recipe may ask for can be had of a sharded one.

    ``accelerate launch`` speaks through the environment, and would be taken at its word without one of ours.

    Raises:
        UserError: accelerate was told to shard, or a key does not go with ``train.shard=full``.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise UserError(
                f"accelerate was launched for {name} (ACCELERATE_USE_{name}), which knows nothing of a model that is cut; "
                "start it with torchrun: train.shard=full gives every process its part of the model, none the whole (DDP)"
            )
    check_sharded(recipe)


def check_sharded(recipe: Recipe) -> None:
    """Raise UserError where a key does not go with ``train.shard=full``."""
    if recipe.train.shard == "none":
        return
    biases = recipe.method == "twostage" and recipe.twostage.scores == "flap" and recipe.twostage.compensate
    unfit = {
        "lora.semantics=lora_aware": recipe.lora.semantics == "lora_aware" and recipe.method == "atp",
        "distill.weight": recipe.distill.weight > 0 and recipe.method == "atp",
        "train.optimizer=muon": recipe.train.optimizer == "muon",
        "method=tomoe": recipe.method == "tomoe",
        "train.compile=true": recipe.train.compile is True,
        "model.quantize": recipe.model.quantize != "none",
        "twostage.compensate=true with scores=flap": biases,
    }
    for key, asked in unfit.items():
        if asked:
            raise UserError(f"{key} needs whole weights and does not go with train.shard=full; leave one of them out")


def check_step(batch: int, purpose: str, ranks: int, sharded: bool) -> None:
    """Raise UserError where ``ranks`` processes cannot share a step of ``batch`` windows, evenly if ``sharded``."""
    if sharded and batch % ranks:
        raise UserError(
            f"a {purpose} step of {batch} windows cannot be shared evenly by {ranks} processes, which train.shard=full "
            f"needs; give it {-(-batch // ranks) * ranks}"
        )
    if batch < ranks:
        raise UserError(
            f"a {purpose} step of {batch} windows leaves some of {ranks} processes without one; raise it to {ranks}"
        )


def shards(recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether each process has but its part of a model (FSDP2)."""
    return recipe.train.shard == "full" and accelerator.num_processes > 1


@dataclass
class Session:
    """One run of one method.

    Attributes:
        valid_figures: measures a model (gates as they are) on validation windows; supplied by the pipeline, because
            evaluation lives beside the methods, not below them.
        judge: holds those figures, of a phase and step, to the recipe's guards.
        stop: what ends the run after a checkpoint, once figures have left a bound.
        stage: name of the checkpoint and prefix of the metric rows (``main``, or ``dense_lora`` for the reference).
        earlier: seconds of work that a resumed stage had behind it.
        earlier_peak: most bytes that it had taken on a GPU, 0 on a CPU.
        trackers: told every step; None: nobody is.
        recover_in_4_bits: whether a base in 4 bits is quantised anew after the cut; the pipeline knows what fits.
    """

    recipe: Recipe
    accelerator: Accelerator
    structure: Structure
    splits: Splits
    folder: RunFolder
    metrics: Metrics
    progress: Progress
    valid_figures: Callable[[torch.nn.Module], Figures]
    judge: Callable[[Figures, str, int], Judgement] = not_judged
    stop: Breach | None = None
    stage: str = "main"
    resume: bool = False
    earlier: float = 0.0
    earlier_peak: int = 0
    trackers: Trackers | None = None
    recover_in_4_bits: bool = False
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds of work on this stage, those before an interruption (up to its last checkpoint) included."""
        return self.earlier + time.perf_counter() - self.started

    @property
    def peak(self) -> int:
        """Most bytes on this process's GPU on this stage, before an interruption as well; 0 on a CPU."""
        return max(self.earlier_peak, peak_memory(self.device) or 0)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def sharded(self) -> bool:
        """Whether each process has but its part of the model."""
        return shards(self.recipe, self.accelerator)

    @property
    def autocast_only(self) -> bool:
        """Whether the model never runs outside autocast: on a GPU, where figures are taken under it too."""
        return figures_in_bf16(self.accelerator)

    def batches(self, windows: Windows, purpose: str, batch: int) -> Batches:
        """An endless, seeded stream of step batches of ``batch`` windows over all ranks.

        Raises:
            UserError: there are more processes than windows in a step, or not as many for each where all must take part in
                every pass.
        """
        check_step(batch, purpose, self.accelerator.num_processes, self.sharded)
        seed = self.recipe.seed * 7919 + sum(map(ord, purpose))
        return Batches(windows, Order(len(windows), seed), self, batch)


class Batches:
    """Step ``n`` of a stream is a pure function of (seed, n): a resumed run reads what an uninterrupted one would."""

    def __init__(self, windows: Windows, order: Order, session: Session, batch: int):
        self.windows, self.order, self.session, self.batch = windows, order, session, batch

    def tokens(self, step: int) -> int:
        """Tokens of step ``step`` over all ranks, padding not counted."""
        offsets, whole = self.windows.offsets, self._indices(step)
        return sum(int(offsets[index + 1] - offsets[index]) for index in whole)

    def _indices(self, step: int) -> list[int]:
        return self.order.indices(step * self.batch, self.batch)

    @property
    def parts(self) -> int:
        """Micro-batches of a step that a rank reads at most."""
        mine = -(-self.batch // self.session.accelerator.num_processes)
        return -(-mine // (self.session.recipe.train.micro_batch or mine))

    def at(self, step: int) -> list[dict[str, Any]]:
        """This rank's micro-batches of step ``step``, on the device."""
        return list(self.of([step]))

    def of(self, steps: Iterable[int], together: int = 1, whole: bool = False) -> Iterator[dict[str, Any]]:
        """This rank's micro-batches of ``steps``, on the device, ``together`` of them in one; ``whole``: those of all ranks."""
        train, accelerator = self.session.recipe.train, self.session.accelerator
        first, ranks = (0, 1) if whole else (accelerator.process_index, accelerator.num_processes)
        chosen = [self._indices(step)[first::ranks] for step in steps]
        micro = train.micro_batch or max(1, *map(len, chosen))
        # flash attention recognises packed examples only in a batch of one long row
        flatten = self.session.recipe.model.attention == "flash_attention_2"
        groups = [mine[start : start + micro] for mine in chosen for start in range(0, len(mine), micro)]
        for start in range(0, len(groups), together):
            part = self.windows.collate(list(chain(*groups[start : start + together])), flatten=flatten)
            part["targets"] = find_targets(part["labels"])
            yield {key: value.to(self.session.device, non_blocking=True) for key, value in part.items()}
