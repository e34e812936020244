"""Consumers that compensate for closed gates: their kept columns take over what the closed inputs did, as far as it is linear.

While ``search`` closes gates, the weights of ``o_proj`` and ``down_proj`` follow the masks, by least squares on second moments
of their inputs (``prune.least_squares``). So an ``adapt`` turn tunes, and a ``decide`` turn judges, models whose cheap repair
is made already, and what the search finds costly is what no kept unit can replace.

Of several processes each owns the consumers of some layers, in turns: it alone has their second moments, and fits them from
their whole original weights. The others get the new weight as it is made, and keep their part of it: all, or what a model that
is spread gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from slimtune.models.sharded import local, owner_of, put_whole, whole
from slimtune.models.surgery import linears_of
from slimtune.models.weights import dense, form_of, held, is_quantized, put_back, put_original
from slimtune.prune.gates import Innovation, Masks, Site
from slimtune.prune.least_squares import WIDE, Takeover
from slimtune.prune.moments import Moments
from slimtune.runtime import rank, world_size
from slimtune.structure.axes import Side, Structure
from slimtune.train.offload import brought, kept_on
from slimtune.train.session import Session


def compensation_of(session: Session, model: nn.Module, moments: Mapping[Site, Moments], fit: Fit) -> Compensation:
    """What compensates in ``model``; ``moments`` are those of this process's own consumers."""
    place = torch.device("cpu") if session.recipe.compensate.offload else session.device
    return Compensation(model, session.structure, moments, fit, place)


def diagonals(session: Session, moments: Mapping[Site, Moments]) -> dict[Site, Tensor]:
    """The mean squares of all consumers' inputs, up to a factor, on the device in fp64: {site: [d]}."""
    found, structure, several = {}, session.structure, session.accelerator.num_processes > 1
    rows = {row.into.axis: structure.rows(row.into) for row in structure.family.linears if row.into}
    for site in structure.sites() if several else moments:
        if site in moments:
            found[site] = moments[site].diagonal().double().to(session.device)
        else:
            width = structure.layers[site[0]].units[site[1]] * rows[site[1]]
            found[site] = torch.empty(width, dtype=torch.float64, device=session.device)
        if several:
            dist.broadcast(found[site], owner_of(site[0]))
    return found


@dataclass
class _Consumer:
    """A weight [out, d] that follows the gates.

    Attributes:
        form: of the whole weight, on the meta device.
        opened: what this process's part of it holds with all gates open.
        entire: the whole weight with all gates open, where this process fits it and has it not at hand otherwise.
        mask: [units] for which it was solved last.
        changed: what its part held when its gates last opened.
        stale: whether it was solved anew since.
    """

    site: Site
    side: Side
    weight: Any
    form: Tensor
    opened: list[Tensor]
    entire: Tensor | None
    mask: Tensor | None = None
    changed: list[Tensor] | None = None
    stale: bool = True

    @property
    def own(self) -> bool:
        """Whether this process fits it."""
        return owner_of(self.site[0]) == rank()

    def put_back(self, tensors: list[Tensor]) -> None:
        put_back(local(self.weight), tensors)

    def original(self, device: torch.device) -> Tensor:
        """With all gates open, [out, d] on ``device``: what it is fitted from."""
        return (self.opened[0] if self.entire is None else self.entire).to(device, non_blocking=True)


def _locked(tensor: Tensor) -> Tensor:
    """In host memory: a copy of what is on a GPU, page-locked."""
    return kept_on(torch.device("cpu"), tensor) if tensor.is_cuda else tensor


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
    """The weights that compensate; the ``follower`` of a bank. Every process must make every call.

    Args:
        model: gated, LoRA attached, its base weights as they were loaded.
        structure: of the model.
        moments: {(layer, axis): E x x^T of the consumer's inputs, up to a factor}, on any device; those of the layers that this
            process owns.
        fit: how.
        place: where what consumers hold with gates open waits.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, structure: Structure, moments: Mapping[Site, Moments], fit: Fit, place: torch.device):
        self.structure, self.moments, self.fit, self.place = structure, moments, fit, place
        self.judge, self.device = fit.judge, next(model.parameters()).device
        self.consumers: list[_Consumer] = []
        self.innovations: dict[Site, Innovation] = {}
        self.open = True
        for layer, row, module in linears_of(model, structure):
            if row.into:
                weight: Any = (module.base_layer if isinstance(module, LoraLayer) else module).weight
                opened, entire = self._kept(weight), self._entire(weight, owner_of(layer) == rank())
                self.consumers.append(_Consumer((layer, row.into.axis), row.into, weight, form_of(weight), opened, entire))

    @torch.no_grad()
    def opened(self) -> None:
        """The original weights."""
        if self.open:
            return
        for consumer in self.consumers:
            if consumer.stale:
                consumer.changed, consumer.stale = self._kept(consumer.weight, consumer.changed), False
            consumer.put_back(consumer.opened)
        self.open = True

    @torch.no_grad()
    def closed(self, masks: Masks) -> None:
        """The weights that compensate for ``masks``, solved anew where they are others than before."""
        moved = list[_Consumer]()
        for consumer in self.consumers:
            mask = masks[consumer.site]
            if consumer.mask is None or not torch.equal(mask, consumer.mask):
                consumer.mask, consumer.stale = mask.clone(), True
                self.innovations.pop(consumer.site, None)
                if mask.all() and not self.judge:
                    consumer.put_back(consumer.opened)
                else:
                    moved.append(consumer)
            elif self.open:
                assert consumer.changed is not None
                consumer.put_back(consumer.changed)
        self.open = False
        for consumer, made, innovation in self._fitted(moved, self.fit):
            put_whole(self._from_owner(consumer, made), consumer.weight)
            self._judge_by(consumer, innovation)

    @torch.no_grad()
    def settled(self) -> None:
        """The originals of quantised weights, of which a cut is made, compensate for the present masks as well.

        Not earlier, because each would go to host memory whenever masks move.
        """
        quantized = [consumer for consumer in self.consumers if is_quantized(consumer.weight)]
        for consumer, made, _ in self._fitted(quantized, replace(self.fit, judge=False)):
            put_original(consumer.weight, self._from_owner(consumer, made))

    def sampled(self) -> None:
        """Sampled masks are judged under the weights of the last fixed ones, or under the original ones."""
        if not self.judge:
            self.opened()

    def innovation(self, site: Site) -> Innovation | None:
        """By what the gradient of a sampled mask is taken."""
        return None if self.open else self.innovations.get(site)

    def _entire(self, weight: Any, own: bool) -> Tensor | None:
        """The whole weight, where this process fits it and has it not at hand otherwise."""
        if is_quantized(weight):  # its original may be a mapped file, from where the way to a GPU is long
            return _locked(dense(weight)) if own else None
        if local(weight).shape == weight.shape:
            return None
        full = whole(weight.detach())
        return kept_on(self.place, full) if own else None

    def _kept(self, weight: Tensor, rooms: Sequence[Tensor] | None = None) -> list[Tensor]:
        """What this process's part of a consumer holds now, copied to where it waits: into ``rooms``, if it has any there."""
        tensors = held(local(weight))
        return [kept_on(self.place, tensor, room) for tensor, room in zip(tensors, rooms or repeat(None), strict=False)]

    def _fitted(self, consumers: Sequence[_Consumer], fit: Fit) -> Iterator[tuple[_Consumer, Tensor | None, Innovation | None]]:
        """Each consumer with what its present mask makes of it, in the process that fits it; in the others with nothing.

        Every process fits those of one layer, then all are given.
        """
        halves = brought((self.moments[each.site].half for each in consumers if each.own), self.device)
        for _, some in groupby(consumers, lambda each: each.site[0] // world_size()):
            together = list(some)
            solved = {each.site: self._solve(each, next(halves), fit) for each in together if each.own}
            for consumer in together:
                yield consumer, *solved.get(consumer.site, (None, None))

    def _solve(self, consumer: _Consumer, half: Tensor, fit: Fit) -> tuple[Tensor, Innovation | None]:
        assert consumer.mask is not None
        with torch.autocast(half.device.type, enabled=False):
            moments = self.moments[consumer.site].whole(half)
            return fitted(self.structure, consumer.side, consumer.mask, moments, consumer.original(self.device), fit)

    def _from_owner(self, consumer: _Consumer, made: Tensor | None) -> Tensor:
        """The whole weight, from the process that has ``made`` it."""
        full = torch.empty_like(consumer.form, device=self.device) if made is None else made.contiguous()
        if world_size() > 1:
            dist.broadcast(full, owner_of(consumer.site[0]))
        return full

    def _judge_by(self, consumer: _Consumer, innovation: Innovation | None) -> None:
        """The innovation from the process that has it, where sampled masks are judged by them."""
        mask, owner = consumer.mask, owner_of(consumer.site[0])
        assert mask is not None
        if not self.judge or not mask.any():
            return
        if world_size() > 1:
            kept = mask.bool().repeat_interleave(self.structure.rows(consumer.side))
            shape = [len(kept)] * (2 if len(kept) <= self.fit.matrices else 1)
            residual = torch.empty(shape, dtype=self.fit.dtype, device=mask.device)
            if innovation is not None:
                residual.copy_(innovation.residual)
            dist.broadcast(residual, owner)
            innovation = Innovation(residual, kept)
        assert innovation is not None
        self.innovations[consumer.site] = innovation
