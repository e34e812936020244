"""``torch.compile`` of the blocks of a model whose layers differ in their widths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from slimtune.models.surgery import blocks_of
from slimtune.recipe import Recipe
from slimtune.structure.axes import Structure

MOST_GRAPHS = 12
"""Different widths that get a graph each. Those of symbolic widths, of which three or so serve all layers (the first is plain,
a width of one is special), take as long to trace as 8 to 15 plain ones (``benchmarks/compiling.py``, two cores of a CPU)."""


def decided(recipe: Recipe, compiled: bool) -> Recipe:
    """``recipe`` with ``train.compile`` decided."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": compiled})})


@contextmanager
def compiling(wanted: bool) -> Iterator[None]:
    """Inside, ``compile_blocks`` may tell dynamo how to work; those are settings of the process, which gets its own back."""
    if not wanted:
        yield
        return
    import torch._dynamo.config as dynamo_config  # costs a second

    names = ("recompile_limit", "force_parameter_static_shapes", "force_nn_module_property_static_shapes", "optimize_ddp")
    with dynamo_config.patch({name: getattr(dynamo_config, name) for name in names}):
        yield


def different(model: nn.Module, structure: Structure) -> int:
    """How many of the blocks differ in the shapes of their parameters."""
    return len({tuple(parameter.shape for parameter in block.parameters()) for block in blocks_of(model, structure)})


def compile_blocks(model: nn.Module, structure: Structure, backend: str = "inductor") -> None:
    """``torch.compile`` every decoder block, in place: a graph for all blocks of the same widths, or one of symbolic widths.

    What inductor made for a graph it finds again on disk. To be called, and the model trained, within ``compiling``.

    Args:
        backend: of ``torch.compile``.
    """
    import torch._dynamo.config as dynamo_config

    symbolic = different(model, structure) > MOST_GRAPHS
    dynamo_config.force_parameter_static_shapes = dynamo_config.force_nn_module_property_static_shapes = not symbolic
    # all blocks are calls of one function, which dynamo would stop compiling at the eighth width
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 2 * len(structure.layers) + 8)
    dynamo_config.optimize_ddp = False  # parts graphs by DDP's buckets, which blocks lie between as they are
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.enable_input_require_grads()  # else the first block, whose input needs no gradient, is compiled by itself
    for block in blocks_of(model, structure):
        block.compile(backend=backend)
