"""Consumers that compensate where there are several processes: who fits what, and how all get it.

The consumers of a layer belong to one process, layer by layer in turns: it alone has their second moments, and fits them from
their whole original weights. The others get the new weight as it is made, and keep their part of it: all, or what a model that
is spread gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from slimtune.methods.compensation import Compensation, Fit, fitted
from slimtune.models.sharded import local, owner_of, put_whole, whole
from slimtune.models.surgery import linears_of
from slimtune.models.weights import dense, held, is_quantized, put_back, put_original
from slimtune.prune.gates import Innovation, Masks, Site
from slimtune.prune.moments import Moments
from slimtune.structure.axes import Side, Structure
from slimtune.train.offload import brought, kept_on
from slimtune.train.session import Session


def compensation_of(session: Session, model: nn.Module, moments: Mapping[Site, Moments], fit: Fit) -> Compensating:
    """What compensates in ``model``; ``moments`` are those of all consumers, of several processes each one's own."""
    place = torch.device("cpu") if session.recipe.compensate.offload else session.device
    if session.accelerator.num_processes > 1:
        return SharedCompensation(model, session.structure, moments, fit, place)
    return Compensation(model, session.structure, moments, fit)


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
class _Part:
    """This process's part of a consumer's weight [out, d].

    Attributes:
        form: of the whole weight, on the meta device.
        entire: the whole original weight, where this process fits it; the same tensor where it has no part but the whole.
        opened, mask, changed: as in ``compensation``.
    """

    site: Site
    side: Side
    weight: Any
    form: Tensor
    opened: list[Tensor]
    entire: Tensor | None
    mask: Tensor | None = None
    changed: list[Tensor] | None = None

    def put_back(self, tensors: list[Tensor]) -> None:
        put_back(local(self.weight), tensors)


class SharedCompensation:
    """``Compensation`` where there are several processes; see there.

    Args:
        moments: of the consumers that are this process's own.
        place: where originals wait.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, structure: Structure, moments: Mapping[Site, Moments], fit: Fit, place: torch.device):
        self.structure, self.moments, self.fit, self.place = structure, moments, fit, place
        self.judge, self.device = fit.judge, next(model.parameters()).device
        self.parts: list[_Part] = []
        self.innovations: dict[Site, Innovation] = {}
        self.open = True
        for layer, row, module in linears_of(model, structure):
            if row.into:
                weight: Any = (module.base_layer if isinstance(module, LoraLayer) else module).weight
                full, opened, entire = whole(dense(weight)), self._kept(weight), None
                if owner_of(layer) == dist.get_rank():
                    entire = opened[0] if opened[0].shape == full.shape else kept_on(place, full)
                self.parts.append(_Part((layer, row.into.axis), row.into, weight, full.to("meta"), opened, entire))

    @torch.no_grad()
    def opened(self) -> None:
        """The original weights."""
        if self.open:
            return
        for part in self.parts:
            if part.changed is None:
                part.changed = self._kept(part.weight)
            part.put_back(part.opened)
        self.open = True

    @torch.no_grad()
    def closed(self, masks: Masks) -> None:
        """The weights that compensate for ``masks``. Every process fits those of one layer, then they are handed round."""
        stale = []
        for part in self.parts:
            mask = masks[part.site]
            if part.mask is None or not torch.equal(mask, part.mask):
                part.mask, part.changed = mask.clone(), None
                self.innovations.pop(part.site, None)
                if mask.all() and not self.judge:
                    part.put_back(part.opened)
                else:
                    stale.append(part)
            elif self.open:
                assert part.changed is not None
                part.put_back(part.changed)
        self.open = False
        for part, made, innovation in self._fitted(stale, self.fit):
            put_whole(self._from_owner(part, made), part.weight)
            self._judge_by(part, innovation)

    @torch.no_grad()
    def settled(self) -> None:
        """The originals of quantised weights compensate as well, see ``Compensation``."""
        quantized = [part for part in self.parts if is_quantized(part.weight)]
        for part, made, _ in self._fitted(quantized, replace(self.fit, judge=False)):
            put_original(part.weight, self._from_owner(part, made))

    def _kept(self, weight: Tensor) -> list[Tensor]:
        """What this process's part of a consumer holds now, copied to where it waits."""
        return [kept_on(self.place, tensor) for tensor in held(local(weight))]

    def _fitted(self, parts: Sequence[_Part], fit: Fit) -> Iterator[tuple[_Part, Tensor | None, Innovation | None]]:
        """Each part with what its present mask makes of it, in the process that fits it; in the others with nothing."""
        own = [part for part in parts if part.entire is not None]
        moments = (self.moments[part.site].whole(half) for part, half in zip(own, self._halves(own), strict=True))
        for _, some in groupby(parts, lambda part: part.site[0] // dist.get_world_size()):
            together = list(some)
            solved = {part.site: self._solve(part, next(moments), fit) for part in together if part.entire is not None}
            for part in together:
                yield part, *solved.get(part.site, (None, None))

    def _halves(self, own: Sequence[_Part]) -> Iterator[Tensor]:
        """The moments that this process will want, where it computes."""
        return brought((self.moments[part.site].half for part in own), self.device)

    def sampled(self) -> None:
        """Sampled masks are judged under the weights of the last fixed ones, or under the original ones."""
        if not self.judge:
            self.opened()

    def innovation(self, site: Site) -> Innovation | None:
        """By what the gradient of a sampled mask is taken."""
        return None if self.open else self.innovations.get(site)

    def _solve(self, part: _Part, moments: Tensor, fit: Fit) -> tuple[Tensor, Innovation | None]:
        assert part.mask is not None
        assert part.entire is not None
        with torch.autocast(moments.device.type, enabled=False):
            original = part.entire.to(moments.device, non_blocking=True)
            return fitted(self.structure, part.side, part.mask, moments, original, fit)

    def _from_owner(self, part: _Part, made: Tensor | None) -> Tensor:
        """The whole weight, from the process that has ``made`` it."""
        full = torch.empty_like(part.form, device=self.device) if made is None else made.contiguous()
        dist.broadcast(full, owner_of(part.site[0]))
        return full

    def _judge_by(self, part: _Part, innovation: Innovation | None) -> None:
        """The innovation from the process that has it, where sampled masks are judged by them."""
        mask, owner = part.mask, owner_of(part.site[0])
        assert mask is not None
        if not self.judge or not mask.any():
            return
        kept = mask.bool().repeat_interleave(self.structure.rows(part.side))
        shape = [len(kept)] * (2 if len(kept) <= self.fit.matrices else 1)
        residual = torch.empty(shape, dtype=self.fit.dtype, device=mask.device)
        if innovation is not None:
            residual.copy_(innovation.residual)
        dist.broadcast(residual, owner)
        self.innovations[part.site] = Innovation(residual, kept)


Compensating = Compensation | SharedCompensation
