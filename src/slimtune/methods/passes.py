"""Forward passes over decision batches that look on: what scores and second moments are taken from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.errors import UserError
from slimtune.models.sharded import owner_of
from slimtune.models.watch import watch
from slimtune.prune.gates import Site
from slimtune.prune.moments import Moments
from slimtune.train.objective import IGNORE, Batch, forward
from slimtune.train.offload import kept_on
from slimtune.train.session import Batches, Session

TOGETHER = 4
"""Micro-batches that a pass without gradients reads at once where it is spared passes over the moments by it."""


class Passes:
    """A gated model, as it is, on the first ``count`` decision batches.

    Attributes:
        tokens: read so far.
    """

    def __init__(self, session: Session, model: nn.Module, batches: Batches, count: int):
        self.session, self.model, self.batches, self.count = session, model, batches, count
        self.tokens = 0

    @torch.no_grad()
    def run(self, watchers: Callable[[Tensor], dict[str, Any]], together: int = 1, whole: bool = False) -> list[Tensor]:
        """Run, watched by ``watch(**watchers(real))``; which positions [B, T] of each batch were real, not padding.

        Args:
            together: micro-batches to read at once, for there is no backward pass to keep anything for.
            whole: every process reads all of a batch, not its part.
        """
        seen = []
        self.model.eval()
        for part in self.batches.of(range(self.count), together, whole):
            real = _real(part, self.batches.windows.pad)
            handles = watch(self.model, self.session.structure, **watchers(real))
            with self.session.accelerator.autocast():
                forward(self.model, part, logits_to_keep=1)
            for handle in handles:
                handle.remove()
            seen.append(real)
        self.tokens += sum(map(self.batches.tokens, range(self.count)))
        return seen

    def second_moments(self, device: torch.device) -> dict[Site, Moments]:
        """Sum of x x^T over the real positions of each consumer's inputs x [d], before its gate: {site: fp32 [d, d]}.

        Of several processes each gets those of the layers that are its own.

        Args:
            device: to keep them on.

        Raises:
            UserError: the base's activations are not finite.
        """
        totals: dict[Site, Moments] = {}
        adding, shared = self.session.device if self._has_room() else device, self.session.sharded

        def see(at: Tensor, layer: int, axis: str, values: Tensor) -> None:
            with torch.autocast(values.device.type, enabled=False):
                flat = values.flatten(0, 1)
                found = Moments.of_inputs(flat if len(at) == len(flat) else flat.index_select(0, at))
            site, half = (layer, axis), found.half
            if shared:
                torch.distributed.reduce(half, owner_of(layer))
                if owner_of(layer) != torch.distributed.get_rank():
                    return
            if site in totals:  # added where the product is: the host would take longer than both ways there
                total = totals[site].half
                total.copy_(half.add_(total.to(half.device, non_blocking=True)))
            else:
                totals[site] = found if adding.type == half.device.type else Moments(kept_on(adding, half), found.size)

        def watchers(real: Tensor) -> dict[str, Any]:
            at = real.flatten().nonzero().flatten()
            return {"consumers": lambda *args: see(at, *args)}

        # on the host every pass over the totals costs seconds, and what they are not beside leaves room for longer ones
        self.run(watchers, together=1 if adding == self.session.device else TOGETHER)
        return self._owned(totals, device)

    def _owned(self, totals: dict[Site, Moments], device: torch.device) -> dict[Site, Moments]:
        """``totals``, which are used up, on ``device``; of several processes with the whole model the sums of all totals."""
        # not in the passes, of which such processes need not make equally many
        several, moments = self.session.accelerator.num_processes > 1 and not self.session.sharded, dict[Site, Moments]()
        for site in list(totals):
            total = totals.pop(site)
            half = total.half
            if several:
                half = half.to(self.session.device)
                torch.distributed.reduce(half, owner_of(site[0]))
                if owner_of(site[0]) != torch.distributed.get_rank():
                    continue
            moments[site] = Moments(half if half.device.type == device.type else kept_on(device, half), total.size)
        rival = self.session.recipe.method == "twostage" and self.session.recipe.twostage.least_squares
        self.check(moments, "twostage.least_squares=false" if rival else "compensate.weights=none")
        return moments

    def check(self, moments: Mapping[Site, Moments | Tensor], without: str) -> None:
        """Raise UserError in every process where those of any are not finite: one alone would leave the others waiting.

        Args:
            without: the setting by which they are not needed.
        """
        bad = [layer for (layer, _), total in moments.items() if not total.diagonal().isfinite().all()]
        first = torch.tensor(float(min(bad, default=math.inf)), device=self.session.device)
        if self.session.accelerator.num_processes > 1:
            torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN)
        if first.isfinite():
            raise UserError(
                f"the base's activations in layer {int(first)} are not finite on the decision rows: nothing can compensate; "
                f"look at model.dtype and the data, or set {without}"
            )

    def _has_room(self) -> bool:
        """Whether all moments are little beside the device's memory: training will want the rest, and no more.

        One answer of all processes: how many passes they make together depends on it.
        """
        if self.session.device.type != "cuda":
            return True
        structure = self.session.structure
        rows = [row.into for row in structure.family.linears if row.into]
        widths = [layer.units[side.axis] * structure.rows(side) for layer in structure.layers for side in rows]
        smallest = torch.tensor(float(torch.cuda.mem_get_info(self.session.device)[1]), device=self.session.device)
        if self.session.accelerator.num_processes > 1:
            torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        return sum(9 / 4 * width**2 for width in widths) < float(smallest) / 16


def _real(batch: Batch, pad: int) -> Tensor:
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return (batch["input_ids"] != pad) | (batch["labels"] != IGNORE)
