"""The bank of masks that the gates of a model read.

Leaf masks (docs/method.md): the generator's masks are detached to leaves, the model's backward fills their gradient, one
all-reduce, then the generator's own backward. So checkpointing, DDP and FSDP2 never see the generator's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from slimtune.structure.axes import KV_GROUP
from slimtune.structure.heads import PAIR, VALUE

Site = tuple[int, str]
"""(layer, axis)."""
Masks = Mapping[Site, Tensor]
"""For every site a mask [units], fp32."""


@dataclass(frozen=True)
class Innovation:
    """What a consumer's inputs say beyond those of the kept units; see ``least_squares.Takeover``.

    Attributes:
        residual: ``innovation``'s matrix [d, d], or ``share``'s multiples of the inputs themselves [d].
        kept: which of the d inputs are of kept units, boolean [d].
    """

    residual: Tensor
    kept: Tensor


class Follower(Protocol):
    """Whatever changes with the gates besides the masks: the consumers' weights, where they compensate."""

    def opened(self) -> None:
        """All gates are open."""

    def closed(self, masks: Masks) -> None:
        """Fixed masks are in force."""

    def settled(self) -> None:
        """What is in force stays: a cut comes next."""

    def sampled(self) -> None:
        """Sampled masks are in force, which collect gradients."""

    def innovation(self, site: Site) -> Innovation | None:
        """By which gradients of sampled masks are taken, if not by the whole input."""


class Routed(Protocol):
    """What makes one mask a token of the masks of experts: see ``router.Router``."""

    axis: str

    def follow(self, layer: int, x: Tensor) -> None:
        """Take what the producers of the axis read in ``layer``, [B, T, D]."""

    def mask(self, layer: int, experts: Tensor) -> Tensor:
        """[B, T, units] for that input; ``experts`` [1 + E, units]."""


class Followed(Protocol):
    """What makes one mask a token of value dimensions: see ``token_masks.TokenMasks``."""

    masks: dict[int, Tensor]

    def follow(self, layer: int, x: Tensor, state: Tensor) -> None:
        """Take what q, k and v of ``layer`` read, [B, T, D], and what the generator says of it [STATE], or nothing."""


class MaskBank:
    """Holds the masks the hooks read: one for ``consumer`` gates (hard), one for ``base`` gates (LoRA-aware).

    Attributes:
        follower: is told of every change, where there is one.
        router: masks of its axis are of experts [1 + E, units], and it says which a token uses.
        values: what stands for a mask on ``VALUE`` goes into it, and it makes the masks.
    """

    def __init__(self) -> None:
        self._masks: dict[Site, Tensor] = {}
        self._where: Literal["open", "consumer", "base"] = "open"
        self._sampled = self._lifted = False
        self.follower: Follower | None = None
        self.router: Routed | None = None
        self.values: Followed | None = None

    def open(self) -> None:
        """All gates open: the untouched model, bit for bit."""
        self._masks, self._where, self._sampled = {}, "open", False
        if self.follower:
            self.follower.opened()

    def close(self, masks: Masks, where: Literal["consumer", "base"] = "consumer") -> None:
        """Fixed masks, no gradient."""
        self._masks, self._where, self._sampled = {site: mask.detach() for site, mask in masks.items()}, where, False
        if self.follower:
            self.follower.closed(self._masks)

    def leaves(self, masks: Masks) -> dict[Site, Tensor]:
        """Consumer masks as gradient-collecting leaves; the caller reads their ``.grad`` after backward."""
        self._masks = {site: mask.detach().clone().requires_grad_() for site, mask in masks.items()}
        self._where, self._sampled = "consumer", True
        if self.follower:
            self.follower.sampled()
        return self._masks

    def innovation(self, layer: int, axis: str) -> Innovation | None:
        """For sampled masks: what their gradients are taken by; None: by the whole input."""
        return self.follower.innovation((layer, axis)) if self.follower and self._sampled else None

    def follow(self, layer: int, axis: str, x: Tensor) -> None:
        """What the producers of ``axis`` are about to read [B, T, D]."""
        if self.router and axis == self.router.axis and (layer, axis) in self._masks:
            self.router.follow(layer, x)
        if self.values and axis == KV_GROUP and (state := self._masks.get((layer, VALUE))) is not None:
            self.values.follow(layer, x, state)

    def head(self, layer: int, axis: str) -> Tensor | None:
        """The mask inside heads: of ``PAIR`` [head_dim / 2], of ``VALUE`` [B, T, head_dim]; None: there is none."""
        mask = self._masks.get((layer, axis)) if self._where == "consumer" else None
        if mask is None or axis == PAIR or self.values is None:
            return mask
        return None if self._lifted else self.values.masks[layer]

    @contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside, tokens have all dimensions of values, whatever masks are in force."""
        self._lifted = True
        try:
            yield
        finally:
            self._lifted = False

    @property
    def is_lifted(self) -> bool:
        """Inside ``lifted``."""
        return self._lifted

    def consumer(self, layer: int, axis: str) -> Tensor | None:
        mask = self._masks.get((layer, axis)) if self._where == "consumer" else None
        if mask is None or self.router is None or axis != self.router.axis:
            return mask
        return self.router.mask(layer, mask)

    def base(self, layer: int, axis: str) -> Tensor | None:
        return self._masks.get((layer, axis)) if self._where == "base" else None


def mean_over_ranks(*parts: Mapping[Site, Tensor], samples: bool = True) -> dict[Site, Tensor]:
    """The gradients of the leaves, summed over micro-batches, averaged over ranks in one all-reduce.

    Args:
        samples: a leaf of two dimensions is [B, units], and summed over its samples; else it is one mask of whatever shape.
    """
    return _over_ranks(
        [{site: _summed(leaf) if samples else leaf for site, leaf in _with_gradient(part)} for part in parts], mean=True
    )


def squares_over_ranks(*parts: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """Squared per-sample gradients of leaves [B, units], summed over samples, micro-batches and ranks."""
    return _over_ranks([{site: _summed(leaf, 2) for site, leaf in _with_gradient(part)} for part in parts], mean=False)


def of_rank_0(values: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """Rank 0's ``values``, in one broadcast: collectives that follow from a decision hang if any process decides otherwise."""
    return _at_once(values, lambda flat: torch.distributed.broadcast(flat, 0))


def _with_gradient(leaves: Mapping[Site, Tensor]) -> list[tuple[Site, Tensor]]:
    missing = [site for site, leaf in leaves.items() if leaf.grad is None]
    if missing:
        raise RuntimeError(f"gates {missing[:3]} got no gradient: they are not on the model's path")
    return [(site, leaf.grad) for site, leaf in leaves.items() if leaf.grad is not None]


def _summed(gradient: Tensor, power: int = 1) -> Tensor:
    value = gradient if power == 1 else gradient**power
    return value if value.ndim == 1 else value.sum(0)


def _over_ranks(parts: list[dict[Site, Tensor]], mean: bool) -> dict[Site, Tensor]:
    total = {site: torch.stack([part[site] for part in parts]).sum(0) for site in parts[0]}

    def reduce(flat: Tensor) -> None:
        torch.distributed.all_reduce(flat)
        if mean:
            flat /= torch.distributed.get_world_size()

    return _at_once(total, reduce)


def _at_once(values: Mapping[Site, Tensor], collective: Callable[[Tensor], Any]) -> dict[Site, Tensor]:
    """``values`` as one collective leaves them; as they are, in one process alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return dict(values)
    flat = torch.cat([value.flatten() for value in values.values()])
    collective(flat)
    parts = flat.split([value.numel() for value in values.values()])
    return {site: part.view_as(values[site]) for site, part in zip(values, parts, strict=True)}
