"""Consumers that compensate for closed gates: their kept columns take over what the closed inputs did, as far as it is linear.

While ``search`` closes gates, the weights of ``o_proj`` and ``down_proj`` follow the masks, by least squares on second moments
of their inputs (``prune.least_squares``). So an ``adapt`` turn tunes, and a ``decide`` turn judges, models whose cheap repair
is made already, and what the search finds costly is what no kept unit can replace.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from slimtune.models.surgery import linears_of
from slimtune.models.weights import dense, held, is_quantized, put, put_back, put_original
from slimtune.prune.gates import Innovation, Masks, Site
from slimtune.prune.least_squares import WIDE, Takeover
from slimtune.prune.moments import Moments
from slimtune.structure.axes import Side, Structure
from slimtune.train.offload import brought, kept_on


@dataclass
class _Consumer:
    """A weight [out, d] that follows the gates.

    Attributes:
        opened: what it holds with all gates open.
        mask: [units] for which it was solved last.
        changed: what that gave, once the gates have opened since.
    """

    site: Site
    side: Side
    weight: Tensor
    opened: list[Tensor]
    mask: Tensor | None = None
    changed: list[Tensor] | None = None

    def original(self) -> Tensor:
        """With all gates open, [out, d] where it computes: what it is fitted from."""
        if is_quantized(self.weight):
            return dense(self.weight)
        return self.opened[0].to(self.weight.device, non_blocking=True)


@dataclass(frozen=True)
class Fit:
    """How consumers are fitted.

    Attributes:
        damping: in units of the mean diagonal of the kept inputs' moments.
        judge: whether gradients of sampled masks are taken by what kept units cannot take over, under the compensating weights;
            else they are taken as without compensation.
        dtype: that the model computes in; innovations are kept in it, on the model's device.
        matrices: the widest consumer whose innovations are told from all its inputs; those of wider ones are ``share``s.
    """

    damping: float
    judge: bool
    dtype: torch.dtype = torch.float32
    matrices: int = WIDE


def fitted(
    structure: Structure, side: Side, mask: Tensor, moments: Tensor, original: Tensor, fit: Fit
) -> tuple[Tensor, Innovation | None]:
    """The weight [out, d] that compensates for ``mask`` [units], and by what sampled masks are judged under it."""
    kept = torch.tensor(structure.indices(side, mask.nonzero().flatten().tolist()), device=moments.device)
    takeover = Takeover.of(moments, kept, fit.damping)
    if takeover is None:
        return original, None
    weight = takeover.weight(original)
    if not fit.judge:
        return weight, None
    left = torch.zeros(len(takeover.kept) + len(takeover.gone), dtype=torch.bool, device=moments.device)
    left[takeover.kept] = True
    rows = structure.rows(side)
    residual = takeover.innovation(rows) if len(left) <= fit.matrices else takeover.share(moments, rows)
    return weight, Innovation(residual.to(fit.dtype), left)


class Compensation:
    """The weights that compensate; the ``follower`` of a bank.

    Args:
        model: gated, LoRA attached, its base weights as they were loaded.
        structure: of the model.
        moments: {(layer, axis): E x x^T of the consumer's inputs, up to a factor}, on any device; what consumers hold with
            gates open is kept on the same one.
        fit: how.
    """

    def __init__(self, model: nn.Module, structure: Structure, moments: Mapping[Site, Moments], fit: Fit):
        self.structure, self.moments, self.fit, self.judge = structure, moments, fit, fit.judge
        self.consumers: list[_Consumer] = []
        self.innovations: dict[Site, Innovation] = {}
        self.open = True
        for layer, row, module in linears_of(model, structure):
            if row.into:
                inner: Any = module.base_layer if isinstance(module, LoraLayer) else module
                site = (layer, row.into.axis)
                self.consumers.append(_Consumer(site, row.into, inner.weight, self._kept(site, inner.weight)))

    def opened(self) -> None:
        """The original weights."""
        if self.open:
            return
        for consumer in self.consumers:
            if consumer.changed is None:
                consumer.changed = self._kept(consumer.site, consumer.weight)
            put_back(consumer.weight, consumer.opened)
        self.open = True

    def closed(self, masks: Masks) -> None:
        """The weights that compensate for ``masks``, solved anew where they are others than before."""
        moved = list[_Consumer]()
        for consumer in self.consumers:
            mask = masks[consumer.site]
            if consumer.mask is None or not torch.equal(mask, consumer.mask):
                moved.append(consumer)
            elif self.open:
                assert consumer.changed is not None
                put_back(consumer.weight, consumer.changed)
        for consumer, moments in zip(moved, self._moments(moved), strict=True):
            with torch.autocast(moments.device.type, enabled=False):
                self._solve(consumer, masks[consumer.site], moments)
        self.open = False

    def settled(self) -> None:
        """The originals of quantised weights, of which a cut is made, compensate for the present masks as well.

        Not earlier, because each would go to host memory whenever masks move.
        """
        quantized = [consumer for consumer in self.consumers if is_quantized(consumer.weight)]
        fit = replace(self.fit, judge=False)
        for consumer, moments in zip(quantized, self._moments(quantized), strict=True):
            assert consumer.mask is not None
            with torch.autocast(moments.device.type, enabled=False):
                weight, _ = fitted(self.structure, consumer.side, consumer.mask, moments, consumer.original(), fit)
            put_original(consumer.weight, weight)

    def sampled(self) -> None:
        """Sampled masks are judged under the weights of the last fixed ones, or under the original ones."""
        if not self.judge:
            self.opened()

    def innovation(self, site: Site) -> Innovation | None:
        """By what the gradient of a sampled mask is taken."""
        return None if self.open else self.innovations.get(site)

    def _kept(self, site: Site, weight: Tensor) -> list[Tensor]:
        """What a consumer holds now, copied to where its moments are."""
        return [kept_on(self.moments[site].half.device, tensor) for tensor in held(weight)]

    def _moments(self, consumers: Sequence[_Consumer]) -> Iterator[Tensor]:
        """Of each of them, where it computes."""
        devices = {consumer.weight.device for consumer in consumers}
        halves = brought((self.moments[each.site].half for each in consumers), devices.pop()) if devices else iter(())
        return (self.moments[each.site].whole(half) for each, half in zip(consumers, halves, strict=True))

    @torch.no_grad()
    def _solve(self, consumer: _Consumer, mask: Tensor, moments: Tensor) -> None:
        consumer.mask, consumer.changed = mask.clone(), None
        self.innovations.pop(consumer.site, None)
        if mask.all() and not self.judge:
            put_back(consumer.weight, consumer.opened)
            return
        weight, innovation = fitted(self.structure, consumer.side, mask, moments, consumer.original(), self.fit)
        put(consumer.weight, weight)
        if innovation is not None:
            self.innovations[consumer.site] = innovation
