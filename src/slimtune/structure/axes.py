"""Which axis every linear of a decoder block lies on, how many units the axis has, and what a unit costs.

Two axes are prunable without changing the function of what stays (masked = cut, to float error):

* ``kv_group``: one key/value head together with the ``group`` query heads that read it (whole groups only: removing
  single query heads breaks grouped-query attention, removing query/key dimensions leaks through RoPE);
* ``ffn``: one channel of the MLP.

Nothing here knows a module class: shapes come in as ``{parameter name: shape}``, so a meta-device model is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from slimtune.errors import UserError

KV_GROUP = "kv_group"
FFN = "ffn"
AXES = (KV_GROUP, FFN)


@dataclass(frozen=True)
class Side:
    """The output or input side of a linear: its axis, and how many rows (columns) one unit owns."""

    axis: str
    rows: Literal["group", "head", "channel"]


QUERY = Side(KV_GROUP, "group")
"""``group * head_dim`` rows a unit: q outputs, o inputs."""
KEY = Side(KV_GROUP, "head")
"""``head_dim`` rows a unit: k and v outputs."""
CHANNEL = Side(FFN, "channel")
"""One row a unit: gate/up outputs, down inputs."""


@dataclass(frozen=True)
class Linear:
    """One row of the table: a linear of a block, by path, with the prunable side(s) it has."""

    path: str
    out: Side | None = None
    into: Side | None = None
    rotary: bool = False
    """Its output is turned by positions before anything else reads it: q and k."""


@dataclass(frozen=True)
class Family:
    """A model family as data."""

    model_type: str
    linears: tuple[Linear, ...]
    blocks: str = "model.layers"
    note: str = ""
    bias_keys: Mapping[str, str] = field(default_factory=dict)
    """Part of a block -> the config key that gives all of its linears a bias."""
    whole_heads: bool = False
    """The stock config refuses a number of query heads that does not divide the hidden size, ``head_dim`` or not. Llama's does
    too, but another stock class stands in for it unless there are biases (see ``export.huggingface``)."""
    llama_block: bool = False
    """A block computes what Llama's does, apart from biases and windows: two RMS norms, SiLU, nothing scaled."""
    experts: tuple[str, str] | None = None
    """``model_type`` of the stock classes whose blocks are this family's with experts for an MLP (``structure.experts``): with
    routed ones alone, and with a shared one beside them."""
    pairs: bool = False
    """Rotary pairs of q and k can be left out: entries i and i + head_dim / 2 of a head are turned together, all of a head is
    turned, and no norm reads q or k."""

    def consumer(self, axis: str) -> Linear:
        """The linear whose *input* lies on ``axis``: the gate is placed before it."""
        return next(row for row in self.linears if row.into and row.into.axis == axis)

    def producers(self, axis: str) -> tuple[Linear, ...]:
        """The linears whose *output* lies on ``axis``."""
        return tuple(row for row in self.linears if row.out and row.out.axis == axis)


@dataclass(frozen=True)
class LayerWidths:
    """Units of each axis in one layer, and the parameters one unit owns (weights and biases of all its linears).

    Attributes:
        fixed_params: what no unit owns (norms, consumer biases): it goes only with the whole layer.
        pair_params: what one rotary pair owns in all heads: rows of q and k.
        value_params: what one value dimension owns in all heads: rows of v, columns of o.
    """

    units: Mapping[str, int]
    unit_params: Mapping[str, int]
    fixed_params: int = 0
    pair_params: int = 0
    value_params: int = 0

    @property
    def params(self) -> int:
        """All parameters of the layer."""
        return self.fixed_params + sum(self.units[axis] * self.unit_params[axis] for axis in AXES)


@dataclass(frozen=True)
class Structure:
    """The prunable structure of one model.

    Attributes:
        head_dim: dimensions of a head.
        group: query heads of a KV group.
        layers: widths and unit costs, by layer.
        total_params: all parameters, tied ones once.
        hidden: width of the residual stream.
    """

    family: Family
    head_dim: int
    group: int
    layers: tuple[LayerWidths, ...]
    total_params: int
    hidden: int

    def units(self) -> dict[str, list[int]]:
        """Units of every layer in their order, by axis."""
        return {axis: [layer.units[axis] for layer in self.layers] for axis in AXES}

    def stock(self, groups: int) -> bool:
        """Whether the stock config takes ``groups`` KV groups in every layer."""
        return not self.family.whole_heads or self.hidden % (groups * self.group) == 0

    @property
    def prunable_params(self) -> int:
        """Parameters that belong to some unit: the denominator of the block ratio."""
        return sum(layer.units[axis] * layer.unit_params[axis] for layer in self.layers for axis in AXES)

    @property
    def constant_params(self) -> int:
        """Embeddings, head, norms, consumer biases: whatever no unit owns."""
        return self.total_params - self.prunable_params

    def rows(self, side: Side) -> int:
        """Rows (columns) one unit owns on ``side``."""
        return {"group": self.group * self.head_dim, "head": self.head_dim, "channel": 1}[side.rows]

    def indices(self, side: Side, keep: Iterable[int]) -> list[int]:
        """Row (column) indices of the kept units, in the order of ``keep``."""
        n = self.rows(side)
        return [unit * n + offset for unit in keep for offset in range(n)]

    def sites(self) -> Iterator[tuple[int, str]]:
        """All (layer, axis) pairs, in a fixed order."""
        for layer in range(len(self.layers)):
            for axis in AXES:
                yield layer, axis


def measure(family: Family, shapes: Mapping[str, Sequence[int]], head_dim: int) -> Structure:
    """Build the Structure of a model from its parameter shapes (tied parameters listed once).

    Raises:
        UserError: a block holds a linear that the family's table does not list, or a shape that does not divide.
    """
    layers: list[LayerWidths] = []
    group = hidden = 0
    by_block = _by_block(family, shapes)
    for index, block in enumerate(by_block):
        _check_listed(family, index, block)
        units = {axis: _units(family, axis, block, head_dim) for axis in AXES}
        query = family.producers(KV_GROUP)[0]
        rows, hidden = block[f"{query.path}.weight"]
        group = rows // (units[KV_GROUP] * head_dim)
        owned = {axis: _unit_params(family, axis, block, units[axis]) for axis in AXES}
        fixed = sum(map(prod, block.values())) - sum(units[axis] * owned[axis] for axis in AXES)
        turned = _rotary_params(family, block)
        values = units[KV_GROUP] * owned[KV_GROUP] - turned
        layers.append(LayerWidths(units, owned, fixed, turned // max(1, head_dim // 2), values // head_dim))
    structure = Structure(family, head_dim, group, tuple(layers), sum(prod(shape) for shape in shapes.values()), hidden)
    _check_shapes(structure, by_block)
    return structure


def _by_block(family: Family, shapes: Mapping[str, Sequence[int]]) -> list[dict[str, Sequence[int]]]:
    blocks: dict[int, dict[str, Sequence[int]]] = {}
    prefix = family.blocks + "."
    for name, shape in shapes.items():
        if name.startswith(prefix):
            number, _, rest = name[len(prefix) :].partition(".")
            blocks.setdefault(int(number), {})[rest] = shape
    if not blocks:
        raise UserError(f"no decoder blocks found under {family.blocks!r} in a {family.model_type!r} model")
    return [blocks[index] for index in sorted(blocks)]


def _check_listed(family: Family, index: int, block: Mapping[str, Sequence[int]]) -> None:
    listed = {f"{row.path}.weight" for row in family.linears}
    matrices = {name for name, shape in block.items() if len(shape) > 1}
    if matrices != listed:
        extra, missing = sorted(matrices - listed), sorted(listed - matrices)
        raise UserError(
            f"layer {index} of this {family.model_type!r} model does not match the table: "
            f"not in the table {extra}, missing from the model {missing}; see docs/add-a-family.md"
        )


def _units(family: Family, axis: str, block: Mapping[str, Sequence[int]], head_dim: int) -> int:
    if axis == FFN:
        return block[f"{family.consumer(FFN).path}.weight"][1]
    key = next(row for row in family.producers(KV_GROUP) if row.out == KEY)
    return block[f"{key.path}.weight"][0] // head_dim


def _unit_params(family: Family, axis: str, block: Mapping[str, Sequence[int]], units: int) -> int:
    owned = 0
    for row in family.linears:
        if (row.out and row.out.axis == axis) or (row.into and row.into.axis == axis):
            owned += prod(block[f"{row.path}.weight"])
        if row.out and row.out.axis == axis:
            owned += prod(block.get(f"{row.path}.bias", (0,)))
    return owned // units


def _rotary_params(family: Family, block: Mapping[str, Sequence[int]]) -> int:
    turned = [row.path for row in family.linears if row.rotary]
    return sum(prod(block[f"{path}.weight"]) + prod(block.get(f"{path}.bias", (0,))) for path in turned)


def _check_shapes(structure: Structure, blocks: Sequence[Mapping[str, Sequence[int]]]) -> None:
    for index, (block, layer) in enumerate(zip(blocks, structure.layers, strict=True)):
        for row in structure.family.linears:
            for dim, side in ((0, row.out), (1, row.into)):
                have = block[f"{row.path}.weight"][dim]
                if side and have != layer.units[side.axis] * structure.rows(side):
                    raise UserError(
                        f"layer {index}: {row.path} has {have} {'rows' if dim == 0 else 'columns'}, expected "
                        f"{layer.units[side.axis]} x {structure.rows(side)} for axis {side.axis!r}"
                    )
