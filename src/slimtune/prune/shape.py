"""How many experts of what width meet a budget on what a token uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import floor, log2

from slimtune.errors import UserError
from slimtune.prune.budget import allowance
from slimtune.prune.solve import MULTIPLES
from slimtune.sections import BudgetConfig, MoeConfig
from slimtune.structure.axes import FFN, KV_GROUP, Structure
from slimtune.structure.experts import host_of
from slimtune.structure.heads import attention_params

ABOUT = 4
"""Routed experts for each that a token uses, which ``number: auto`` looks for."""
_LEAST = 8
"""Widths are multiples of it: grouped products in bfloat16 want rows of 16 bytes."""
_APART = 0.05
"""What speaks against a KV group more or fewer than wished for: as much as against widths of half the multiple."""
_STORED = 10.0
"""What speaks against more bytes than the dense model has: more than all else can."""


@dataclass(frozen=True)
class Shape:
    """Of the experts of every layer, alike in all as stock classes have them.

    Attributes:
        number: routed experts; top_k: of which a token uses so many.
        width: channels of each.
        shares: the shared expert is as wide as so many of them.
        groups: KV groups that stay in each layer.
        channels: of a layer before.
        overlap: a channel may be in several.
        pairs, values: rotary pairs of q and k that stay, and value dimensions that a token has; 0: all, without a mask.
    """

    number: int
    top_k: int
    width: int
    shares: int
    groups: int
    channels: int
    overlap: bool = False
    pairs: int = 0
    values: int = 0

    @property
    def active(self) -> int:
        """Channels that a token uses."""
        return (self.shares + self.top_k) * self.width

    @property
    def dropped(self) -> int:
        """Channels in no expert, where each can be in one."""
        return 0 if self.overlap else self.channels - (self.shares + self.number) * self.width

    def sizes(self, part: float) -> list[int]:
        """Of shared, each routed expert, dropped, when ``part`` of the way from all shared to this shape is made."""
        width, dropped = round(part * self.width), round(part * self.dropped)
        return [self.channels - self.number * width - dropped, *[width] * self.number, dropped]


def shape_of(structure: Structure, budget: BudgetConfig, moe: MoeConfig) -> Shape:
    """The shape nearest to the budget, of those within its tolerance the one that leaves fewest channels out.

    Raises:
        UserError: no shape meets the budget, or the base's layers differ.
    """
    _check(moe, budget.keep)
    channels = structure.layers[0].units[FFN]
    if any(layer.units != structure.layers[0].units for layer in structure.layers):
        raise UserError("method=tomoe needs a base whose layers are all alike: experts of all layers are of one width")
    wished, heads = groups_of(structure, budget, moe), heads_of(structure, budget, moe)
    multiple = _LEAST if budget.ffn_multiple == "auto" else budget.ffn_multiple
    divided = moe.shared and moe.experts == "partition"
    found, best = _found(structure, budget, moe, wished, heads, multiple)
    if found:
        cost, shape = min(found, key=lambda each: each[0])
        if cost >= _STORED and moe.number == "auto":
            raise UserError(
                f"budget.keep={budget.keep} of {budget.of}: all experts that meet it are, with their routers, more to store "
                "than the dense model; ask for less, or give a larger budget.tolerance or moe.number"
            )
        return replace(shape, pairs=heads[0], values=heads[1])
    if best[0] == float("inf"):
        active = round(expert_channels(structure, budget.keep, budget.of, wished, *heads))
        raise UserError(
            f"there are no experts for budget.keep={budget.keep}: a token may use {min(channels, max(0, active))} of a layer's "
            f"{channels} channels, and {moe.chosen} routed experts of {multiple} or more{' and a shared one' * divided} have "
            f"to fit in, with others to choose from (moe.number={moe.number}); change budget.keep, moe.number, moe.top_k or "
            "budget.ffn_multiple"
        )
    shared = "" if moe.experts == "overlap" else f"moe.shared={str(moe.shared).lower()}, "
    raise UserError(
        f"budget.keep={budget.keep} of {budget.of} cannot be met within budget.tolerance={budget.tolerance} by experts "
        f"(moe.number={moe.number}, moe.top_k={moe.top_k}, {shared}moe.groups={moe.groups}, "
        f"budget.ffn_multiple={budget.ffn_multiple}): the nearest part that a token can use is {best[1]:.4f}; ask for that, "
        "change those, or allow more by budget.tolerance (0.01 of a small base)"
    )


def _found(
    structure: Structure, budget: BudgetConfig, moe: MoeConfig, wished: int, heads: tuple[int, int], multiple: int
) -> tuple[list[tuple[float, Shape]], tuple[float, float]]:
    """Shapes that meet the budget, with what speaks against each; by how much the nearest of all misses it, and its part."""
    best: tuple[float, float] = (float("inf"), 0.0)
    found: list[tuple[float, Shape]] = []
    for groups in _about(wished, structure, moe):
        if found and budget.ffn_multiple == "auto":
            break
        active = expert_channels(structure, budget.keep, budget.of, groups, *heads)
        ratio_of = _ratio(structure, (groups, *heads), moe.shared and moe.experts == "partition", budget.of)
        for shape in _shapes(structure.layers[0].units[FFN], active, groups, multiple, moe):
            ratio = ratio_of(shape)
            error = abs(ratio - budget.keep)
            best = min(best, (error, ratio))
            if error <= budget.tolerance:
                more = not shape.overlap and stored_more(structure, shape)
                found.append((_cost(shape, moe) + _APART * abs(groups - wished) + _STORED * more, shape))
    return found, best


def _check(moe: MoeConfig, keep: float) -> None:
    if keep >= 1:
        raise UserError(f"budget.keep={keep} leaves a router nothing to choose; method=tomoe needs less than 1")
    if moe.attention != "groups" and moe.groups not in ("auto", "all"):
        raise UserError(f"moe.groups={moe.groups} is for moe.attention=groups, and it is {moe.attention}: leave it out")
    if moe.number != "auto" and moe.number < moe.chosen:
        raise UserError(
            f"moe.number={moe.number} is less than the {moe.chosen} experts that a token uses (moe.top_k); give more of "
            "them, or a smaller moe.top_k"
        )
    if moe.number == moe.chosen and moe.experts == "partition":
        raise UserError(
            f"moe.number={moe.number} experts are as many as a token uses (moe.top_k), which leaves a router nothing "
            "to choose; give more of them, or a smaller moe.top_k"
        )
    if not (moe.shared and moe.experts == "partition") and moe.chosen not in (1, 2, 4, 8, 16):
        raise UserError(
            f"moe.top_k={moe.chosen} without a shared expert: the stock class divides weights by it, which is exact for 1, 2, "
            "4, 8 and 16; give one of those"
        )


def stored_more(structure: Structure, shape: Shape) -> bool:
    """Whether a file with these experts has more parameters than the base's blocks: routers come on top."""
    attention = sum(shape.groups * layer.unit_params[KV_GROUP] for layer in structure.layers)
    channels = (shape.shares + shape.number) * shape.width
    experts = sum(channels * layer.unit_params[FFN] for layer in structure.layers)
    routers = len(structure.layers) * host_of(structure.family, shape.shares > 0).extra(structure.hidden, shape.number)
    return attention + experts + routers > structure.prunable_params


def active_ratio(structure: Structure, shape: Shape, of: str) -> float:
    """What a token uses, of the base's parameters: attention, experts and router."""
    return _ratio(structure, (shape.groups, shape.pairs, shape.values), shape.shares > 0, of)(shape)


def _ratio(structure: Structure, heads: tuple[int, int, int], shared: bool, of: str) -> Callable[[Shape], float]:
    """The same for many shapes of one kind, with KV groups, pairs and values of ``heads``: linear in what they differ in."""
    attention = sum(attention_params(structure, layer, *heads) for layer in structure.layers)
    channel = sum(layer.unit_params[FFN] for layer in structure.layers)
    host, layers = host_of(structure.family, shared), len(structure.layers)
    fixed = attention + (structure.constant_params if of == "total" else 0)
    whole = structure.total_params if of == "total" else structure.prunable_params

    def ratio(shape: Shape) -> float:
        return (fixed + shape.active * channel + layers * host.extra(structure.hidden, shape.number)) / whole

    return ratio


def expert_channels(structure: Structure, keep: float, of: str, groups: int, pairs: int = 0, values: int = 0) -> float:
    """Channels of a layer that a token may use beside such attention: what a budget leaves to experts and routers."""
    attention = sum(attention_params(structure, layer, groups, pairs, values) for layer in structure.layers)
    owned = sum(layer.unit_params[FFN] for layer in structure.layers)
    return (allowance(structure, keep, of) - attention) / owned


def groups_of(structure: Structure, budget: BudgetConfig, moe: MoeConfig) -> int:
    """KV groups that stay in each layer, or of ``auto`` are wished for.

    Raises:
        UserError: more are asked for than there are.
    """
    every = structure.layers[0].units[KV_GROUP]
    if moe.groups == "all" or moe.attention != "groups":
        return every
    if moe.groups != "auto":
        if moe.groups > every:
            raise UserError(f"moe.groups={moe.groups} is more than the {every} KV groups of a layer; give {every} at most")
        return moe.groups
    return _half_way(every, structure, budget)


def _about(wished: int, structure: Structure, moe: MoeConfig) -> tuple[int, ...]:
    """KV groups to look for shapes with, those wished for first.

    Widths in large multiples meet a budget only now and then; one group more or fewer gives them as many chances again.
    """
    if moe.groups != "auto" or moe.attention != "groups":
        return (wished,)
    every = structure.layers[0].units[KV_GROUP]
    return tuple(groups for groups in (wished, wished + 1, wished - 1) if 1 <= groups <= every)


def heads_of(structure: Structure, budget: BudgetConfig, moe: MoeConfig) -> tuple[int, int]:
    """Rotary pairs that stay in each layer, and value dimensions of a token; 0: all, without a mask."""
    pairs = _half_way(structure.head_dim // 2, structure, budget) if moe.attention != "groups" else 0
    return pairs, _half_way(structure.head_dim, structure, budget) if moe.attention == "tokens" else 0


def _half_way(every: int, structure: Structure, budget: BudgetConfig) -> int:
    """Of ``every``, as many that about half the part goes that a token does without of all."""
    share = allowance(structure, budget.keep, budget.of) / structure.prunable_params
    return min(every, max(1, round(every * (1 + share) / 2)))


def _shapes(channels: int, active: float, groups: int, multiple: int, moe: MoeConfig) -> Iterator[Shape]:
    """Shapes by which a token uses about ``active`` channels."""
    overlap = moe.experts == "overlap"
    top_k = moe.chosen
    for width in range(multiple, channels + 1, multiple):
        if overlap:
            number = 8 if moe.number == "auto" else moe.number
            if top_k <= number:
                yield Shape(number, top_k, width, 0, groups, channels, overlap=True)
            continue
        exact = floor(active / width) - top_k
        for shares in {max(1, exact), max(1, exact + 1)} if moe.shared else {0}:
            most = channels // width - shares
            numbers = range(top_k + 1, min(most, 4 * ABOUT * top_k) + 1) if moe.number == "auto" else (moe.number,)
            for number in numbers:
                if top_k < number <= most:
                    yield Shape(number, top_k, width, shares, groups, channels)


def _cost(shape: Shape, moe: MoeConfig) -> float:
    """What speaks against a shape: channels left out, many experts or few, widths that hardware is slow at."""
    far = abs(log2(shape.number / (ABOUT * shape.top_k))) if moe.number == "auto" and not shape.overlap else 0.0
    fine = sum(shape.width % multiple != 0 for multiple in MULTIPLES)
    return max(0, shape.dropped) / shape.channels + 0.1 * far + 0.05 * fine
