"""Alternating decide and adapt turns on one tiny model, in one process or (as a script) in two under DDP and FSDP2.

``python worker.py OUT RECIPE`` has torchrun start two ranks for these and for whole runs of ``OUT/sharded-*.yaml``, and two for
``slimtune tune RECIPE``. They are forked after the imports of this file, which take longer than everything the ranks do.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.run
from accelerate import Accelerator, init_empty_weights
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parents[1]))  # as a script: tests/ holds gated.py

import slimtune
import slimtune.pipeline
from families import tiny_config
from gated import random_model, random_plan, sample_ids
from slimtune.methods import atp
from slimtune.models.compiled import compile_blocks
from slimtune.models.hooks import place_gates
from slimtune.models.load import attach_lora, enable_checkpointing
from slimtune.models.modes import quiet
from slimtune.models.sharded import cut_model, gathered, sharded, template_of
from slimtune.models.surgery import blocks_of, cut
from slimtune.prune.budget import masks_of
from slimtune.prune.gates import MaskBank, Site, mean_over_ranks
from slimtune.prune.generator import Generator
from slimtune.sections import LoraConfig
from slimtune.structure.plan import Plan
from slimtune.train import loop, tuner
from slimtune.train.objective import IGNORE, Batch, accumulate, compiled_cross_entropy, cross_entropy_sum, forward
from slimtune.train.optimizers import adamw, carry_over
from slimtune.train.session import Session

CHECKPOINTING = ("none", "non_reentrant", "reentrant")
WRAPPERS = ("ddp", "fsdp2")
ROWS, TOKENS = 4, 12
SPREAD = ("llama-tied", "phi", "gemma3_text")
"""Families with tied embeddings, with biases, with constants in buffers."""


def whole_batch() -> dict[str, Tensor]:
    """Rows with very different numbers of targets, so that a mean of means is not the mean."""
    ids = torch.randint(3, 97, (ROWS, TOKENS), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    for row in range(ROWS):
        labels[row, : 2 + 3 * row] = IGNORE
    return {"input_ids": ids, "labels": labels}


def rank_parts(rank: int, world: int) -> list[Batch]:
    """This rank's rows: the whole batch at once in one process, one row a micro-batch in several."""
    batch = whole_batch()
    if world == 1:
        return [batch]
    return [{key: value[row : row + 1] for key, value in batch.items()} for row in range(rank, ROWS, world)]


class Alternation:
    """What ``methods.atp`` does with a model: leaf-mask gradients, then a LoRA update under the same masks."""

    def __init__(self, accelerator: Accelerator, name: str, checkpointing: str, wrapper: str = "none"):
        self.accelerator = accelerator
        self.model, self.structure = random_model(name, rank=4)
        self.model.config.use_cache = False
        enable_checkpointing(self.model, checkpointing)
        self.bank = MaskBank()
        self.handles = place_gates(self.model, self.structure, self.bank.consumer, self.bank.base)
        self.plan = random_plan(self.structure, 4)
        self.masks = masks_of(self.plan)
        self.wrapper = wrapper
        self.wrapped: Any = self._wrap(wrapper)
        self.optimizer = adamw(self.model.parameters(), 1e-3, 0.0)
        self.parts = rank_parts(accelerator.process_index, accelerator.num_processes)

    def _wrap(self, wrapper: str) -> nn.Module:
        if wrapper == "ddp":
            return self.accelerator.prepare_model(self.model)
        if wrapper == "fsdp2":
            mesh = dist.init_device_mesh("cpu", (self.accelerator.num_processes,))
            for block in blocks_of(self.model, self.structure):
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        return self.model

    def loss(self, batch: Batch) -> Tensor:
        return cross_entropy_sum(forward(self.wrapped, batch), batch["labels"])

    def decide(self) -> tuple[dict[Site, Tensor], float]:
        """Gradients of the masks and the loss; no parameter may get one."""
        leaves = self.bank.leaves(self.masks)
        self.wrapped.train()
        with quiet(self.model):
            value = accumulate(self.wrapped, self.parts, self.accelerator, self.loss, sync=False)
        assert all(parameter.grad is None for parameter in self.model.parameters())
        return mean_over_ranks(leaves), float(value)

    def adapt(self) -> float:
        """One LoRA step under fixed masks; every LoRA factor must get a gradient."""
        self.bank.close(self.masks)
        self.wrapped.train()
        value = accumulate(self.wrapped, self.parts, self.accelerator, self.loss)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        assert trained
        assert all(parameter.grad is not None for parameter in trained)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(value)

    def turns(self) -> dict[str, Any]:
        """decide, adapt, decide, adapt: everything another process layout must reproduce."""
        record: dict[str, Any] = {"losses": []}
        for number in range(2):
            record[f"gradients_{number}"], loss = self.decide()
            record["losses"] += [loss, self.adapt()]
        record["lora"] = {name: _whole(p) for name, p in self.model.named_parameters() if "lora_" in name}
        return record

    def shrink(self) -> dict[str, Any]:
        """The physical cut in the middle of a run, then two updates of the small model under a new wrapper."""
        for handle in self.handles:
            handle.remove()
        self.masks = {}
        carry_over(self.optimizer, cut(self.model, self.structure, self.plan))
        self.wrapped = self._wrap(self.wrapper)
        losses = [self.adapt(), self.adapt()]
        return {"losses": losses, "lora": {n: _whole(p) for n, p in self.model.named_parameters() if "lora_" in n}}


def _whole(parameter: Tensor) -> Tensor:
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return full.detach().clone()


def differences(record: dict[str, Any], reference: dict[str, Any], key: str) -> float:
    """The largest difference over the largest entry."""
    largest = max(float(value.abs().max()) for value in reference[key].values())
    return max(float((record[key][site] - value).abs().max()) for site, value in reference[key].items()) / largest


@torch.no_grad()
def spread_and_cut(name: str) -> dict[str, float]:
    """How far a sharded model, before and after a cut that takes a whole layer, and gathered, is from one that is not."""
    model, structure = random_model(name, rank=4)
    expected = copy.deepcopy(model)
    base = template_of(tiny_config(name), torch.float32)
    with init_empty_weights(include_buffers=False):
        template = attach_lora(base, structure, LoraConfig(rank=4))
    spread = sharded(template, structure, torch.device("cpu"), model if dist.get_rank() == 0 else None)
    ids = sample_ids()
    found = {"whole": float((spread(ids).logits - expected(ids).logits).abs().max())}
    kept = [dict(layer) for layer in random_plan(structure, 4).kept]
    plan = Plan.of(structure, [kept[0], {axis: [] for axis in kept[1]}, kept[2]])
    small, replaced = cut_model(spread, structure, plan)
    cut(expected, structure, plan)
    trained = sum(parameter.requires_grad for parameter in small.parameters())
    found |= {"cut": float((small(ids).logits - expected(ids).logits).abs().max()), "lost": trained - len(replaced)}
    whole = gathered(small)
    if whole is not None:
        theirs, ours = (
            dict(expected.named_parameters(remove_duplicate=False)),
            dict(whole.named_parameters(remove_duplicate=False)),
        )
        assert theirs.keys() == ours.keys()
        found["gathered"] = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
        found["tied"] = len(list(whole.parameters())) - len(list(expected.parameters()))
        found["logits"] = float((whole(ids).logits - expected(ids).logits).abs().max())
    return found


def run_rank(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for wrapper in WRAPPERS:
        for checkpointing in CHECKPOINTING:
            alternation = Alternation(accelerator, "llama-bias", checkpointing, wrapper)
            record = alternation.turns()
            if wrapper == "ddp":
                record["small"] = alternation.shrink()
            torch.save(record, folder / f"{wrapper}-{checkpointing}-{rank}.pt")
    torch.save({name: spread_and_cut(name) for name in SPREAD}, folder / f"spread-{rank}.pt")
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:  # inductor takes minutes on a CPU
        graphs.append(graph)
        return graph

    atp.compile_blocks = partial(compile_blocks, backend=backend)
    tuner.compiled_cross_entropy = partial(compiled_cross_entropy, backend="eager")
    slimtune.pipeline.self_check = lambda config, seed: 0.0  # a quarter of such a short run, and done in the other one
    decide = Generator.forward
    Generator.forward = lambda self: decide(self) if rank == 0 or torch.is_grad_enabled() else contrary(decide(self))
    for file in sorted(folder.glob("sharded-*.yaml")):
        recipe = slimtune.load_recipe(file)
        with kept_checkpoints():
            slimtune.pipeline.tune(recipe, resume=(Path(recipe.out) / "recipe.yaml").is_file())
    torch.save(len(graphs), folder / f"graphs-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def contrary(logits: dict[Site, Tensor]) -> dict[Site, Tensor]:
    """What would prune what the others keep: rank 0 decides alone."""
    return {site: -value for site, value in logits.items()}


@contextmanager
def kept_checkpoints() -> Iterator[None]:
    """Keep what a kill after each checkpoint would leave of ``out``, as ``out-PHASE-STEP``."""
    write = loop._checkpoint

    def checkpoint(session: Session, phase: loop.Phase, step: int) -> None:
        write(session, phase, step)
        if session.accelerator.process_index == 0:
            shutil.copytree(session.recipe.out, f"{session.recipe.out}-{phase.name}-{step}")

    loop._checkpoint = checkpoint
    try:
        yield
    finally:
        loop._checkpoint = write


def torchrun(script: str, *arguments: str) -> None:
    torch.distributed.run.main(["--standalone", "--nproc_per_node=2", "--start-method=fork", "--run-path", script, *arguments])


if __name__ == "__main__":
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        run_rank(Path(sys.argv[1]))
    else:
        torchrun(str(Path(__file__).resolve()), sys.argv[1])
        torchrun(str(Path(slimtune.pipeline.__file__).with_name("__main__.py")), "tune", sys.argv[2])
