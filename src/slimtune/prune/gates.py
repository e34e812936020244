"""The bank of masks that the gates of a model read.

Leaf masks (DESIGN 4): the generator's masks are detached to leaves, the model's backward fills their gradient, one
all-reduce, then the generator's own backward. So checkpointing, DDP and FSDP2 never see the generator's graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Site = tuple[int, str]
"""(layer, axis)."""
Masks = Mapping[Site, Tensor]
"""For every site a mask [units], fp32."""


class MaskBank:
    """Holds the masks the hooks read: one for ``consumer`` gates (hard), one for ``base`` gates (LoRA-aware)."""

    def __init__(self) -> None:
        self._masks: dict[Site, Tensor] = {}
        self._where: Literal["open", "consumer", "base"] = "open"

    def open(self) -> None:
        """All gates open: the untouched model, bit for bit."""
        self._masks, self._where = {}, "open"

    def close(self, masks: Masks, where: Literal["consumer", "base"] = "consumer") -> None:
        """Fixed masks, no gradient."""
        self._masks, self._where = {site: mask.detach() for site, mask in masks.items()}, where

    def leaves(self, masks: Masks) -> dict[Site, Tensor]:
        """Consumer masks as gradient-collecting leaves; the caller reads their ``.grad`` after backward."""
        self._masks = {site: mask.detach().clone().requires_grad_() for site, mask in masks.items()}
        self._where = "consumer"
        return self._masks

    def consumer(self, layer: int, axis: str) -> Tensor | None:
        return self._masks.get((layer, axis)) if self._where == "consumer" else None

    def base(self, layer: int, axis: str) -> Tensor | None:
        return self._masks.get((layer, axis)) if self._where == "base" else None


def mean_over_ranks(leaves: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """The gradients of the leaves, averaged over ranks in one all-reduce."""
    missing = [site for site, leaf in leaves.items() if leaf.grad is None]
    if missing:
        raise RuntimeError(f"gates {missing[:3]} got no gradient: they are not on the model's path")
    grads = {site: leaf.grad for site, leaf in leaves.items() if leaf.grad is not None}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        flat = torch.cat([grad.flatten() for grad in grads.values()])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        parts = flat.split([grad.numel() for grad in grads.values()])
        grads = dict(zip(grads, parts, strict=True))
    return grads
