"""Zeros beside what a layer has, so that it fits where wider layers are asked for: they add nothing to what it computes.

A KV head of zeros gives values of zeros; a query head of zeros is read by zero columns of the output; a channel of zeros is
zero after every activation that is zero at zero. Shape legend: d head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from slimtune.export.gguf_layout import Widths
from slimtune.structure.axes import Family, Linear, Side


def padded(
    weights: Mapping[str, Tensor], family: Family, head: int, given: Sequence[Widths], wanted: Sequence[Widths]
) -> dict[str, Tensor]:
    """``weights`` with every layer as wide as ``wanted`` says; tensors that are wide enough are the same objects.

    The KV heads of a layer come first, and each keeps its query heads first, so a wider layer may have more KV heads, more
    query heads for each of them, or both.

    Args:
        weights: of a causal LM, by name.
        head: d.
        given: widths of each layer; ``wanted``: the same or larger ones.
    """
    found = dict(weights)
    for name, row, own, new in _linears(weights, family, given, wanted):
        tensor = found[name]
        for dim, side in ((0, row.out), (1, row.into)):
            if side and dim < tensor.ndim:
                tensor = _wider(tensor, dim, _units(side, own, head), _units(side, new, head))
        found[name] = tensor
    return found


def _linears(
    weights: Mapping[str, Tensor], family: Family, given: Sequence[Widths], wanted: Sequence[Widths]
) -> Iterator[tuple[str, Linear, Widths, Widths]]:
    for layer, (own, new) in enumerate(zip(given, wanted, strict=True)):
        for row in family.linears:
            for kind in ("weight", "bias"):
                name = f"{family.blocks}.{layer}.{row.path}.{kind}"
                if own != new and name in weights:
                    yield name, row, own, new


def _units(side: Side, widths: Widths, head: int) -> tuple[int, int]:
    """How many units lie on ``side``, and the rows of each."""
    if side.rows == "channel":
        return widths.mlp, 1
    return widths.kv_heads, head if side.rows == "head" else head * (widths.heads // max(widths.kv_heads, 1))


def _wider(tensor: Tensor, dim: int, given: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """``tensor`` with ``given`` (units, rows) along ``dim`` put into zeros for ``wanted``."""
    if given == wanted:
        return tensor
    before, after = tensor.shape[:dim], tensor.shape[dim + 1 :]
    room = tensor.new_zeros((*before, *wanted, *after))
    room.narrow(dim, 0, given[0]).narrow(dim + 1, 0, given[1]).copy_(tensor.detach().reshape(*before, *given, *after))
    return room.flatten(dim, dim + 1)
