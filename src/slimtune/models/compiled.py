"""``torch.compile`` of the blocks of a model whose layers differ in their widths."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from torch import nn

from slimtune.models.surgery import blocks_of
from slimtune.structure.axes import Structure

MOST_GRAPHS = 8
"""Different widths that get a graph each. Tracing one with symbolic widths takes dynamo as long as five of those with plain
numbers, and one or two serve all layers (a width of one is special): 18 s where twenty graphs took 37, by two cores of a CPU
(``benchmarks/compiling.py``, docs/RESULTS.md)."""


def compile_blocks(model: nn.Module, structure: Structure, backend: str = "inductor") -> None:
    """``torch.compile`` every decoder block, in place: a graph for all blocks of the same widths, or one of symbolic widths.

    What inductor made for a graph it finds again on disk.

    Args:
        backend: of ``torch.compile``.
    """
    import torch._dynamo.config as dynamo_config  # costs a second

    blocks = list(blocks_of(model, structure))
    widths = {tuple(parameter.shape for parameter in block.parameters()) for block in blocks}
    symbolic = len(widths) > MOST_GRAPHS
    dynamo_config.force_parameter_static_shapes = dynamo_config.force_nn_module_property_static_shapes = not symbolic
    # all blocks are calls of one function, which dynamo would stop compiling at the eighth width
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, 2 * len(structure.layers) + 8)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    base.enable_input_require_grads()  # else the first block, whose input needs no gradient, is compiled by itself
    for block in blocks:
        block.compile(backend=backend)
