"""Look on in a forward pass, and change nothing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from slimtune.models.surgery import blocks_of, linears_of, producers_of
from slimtune.structure.axes import Linear, Structure


def watch(
    model: nn.Module,
    structure: Structure,
    consumers: Callable[[int, str, Tensor], None] | None = None,
    producers: Callable[[int, str, Tensor], None] | None = None,
    blocks: Callable[[int, Tensor, Tensor], None] | None = None,
    outputs: Callable[[int, Linear, Tensor], None] | None = None,
) -> list[Any]:
    """Look on in a forward pass: what an axis's producers and its consumer (before its gate) read, a block's in- and output.

    Args:
        outputs: of (layer, row of the table, what it gives), for every linear that produces an axis.

    Returns:
        Handles to remove.
    """
    handles = []
    if consumers:
        for layer, row, module in linears_of(model, structure):
            if row.into:
                see = partial(consumers, layer, row.into.axis)
                handles.append(module.register_forward_pre_hook(lambda _, args, see=see: see(args[0]), prepend=True))
    for layer, axis, module in producers_of(model, structure) if producers else ():
        see = partial(cast(Any, producers), layer, axis)
        handles.append(module.register_forward_pre_hook(lambda _, args, see=see: see(args[0])))
    for layer, row, module in linears_of(model, structure) if outputs else ():
        if row.out:
            look_at = partial(cast(Any, outputs), layer, row)
            handles.append(module.register_forward_hook(lambda _, __, output, see=look_at: see(output)))
    if blocks:
        for layer, block in enumerate(blocks_of(model, structure)):
            look = partial(blocks, layer)

            def hook(_: nn.Module, args: Any, output: Any, look: Callable[..., None] = look) -> None:
                look(args[0], output[0] if isinstance(output, tuple) else output)

            handles.append(block.register_forward_hook(hook))
    return handles
