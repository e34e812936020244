"""Forward passes over decision batches that look on: what scores and second moments are taken from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slimtune.errors import UserError
from slimtune.models.watch import watch
from slimtune.prune.gates import Site
from slimtune.train.objective import IGNORE, Batch, forward
from slimtune.train.session import Batches, Session


class Passes:
    """A gated model, as it is, on the first ``count`` decision batches.

    Attributes:
        tokens: read so far.
    """

    def __init__(self, session: Session, model: nn.Module, batches: Batches, count: int):
        self.session, self.model, self.batches, self.count = session, model, batches, count
        self.tokens = 0

    @torch.no_grad()
    def run(self, watchers: Callable[[Tensor], dict[str, Any]]) -> list[Tensor]:
        """Run, watched by ``watch(**watchers(real))``; which positions [B, T] of each batch were real, not padding."""
        seen = []
        self.model.eval()
        for step in range(self.count):
            for part in self.batches.at(step):
                real = _real(part, self.batches.windows.pad)
                handles = watch(self.model, self.session.structure, **watchers(real))
                with self.session.accelerator.autocast():
                    forward(self.model, part)
                for handle in handles:
                    handle.remove()
                seen.append(real)
            self.tokens += self.batches.tokens(step)
        return seen

    def second_moments(self, device: torch.device) -> dict[Site, Tensor]:
        """Sum of x x^T over the real positions of each consumer's inputs x [d], before its gate: {site: fp32 [d, d]}.

        Args:
            device: to keep them on.

        Raises:
            UserError: the base's activations are not finite.
        """
        totals: dict[Site, Tensor] = {}
        adding = self.session.device if self._has_room() else device

        def see(real: Tensor, layer: int, axis: str, values: Tensor) -> None:
            with torch.autocast(values.device.type, enabled=False):
                found = values[real].float()
                product = (found.T @ found).to(adding)
            site = (layer, axis)
            totals[site] = totals[site].add_(product) if site in totals else product

        self.run(lambda real: {"consumers": lambda *args: see(real, *args)})
        several, moments = self.session.accelerator.num_processes > 1, {}
        for site in list(totals):
            total = totals.pop(site)
            if several:
                total = self.session.accelerator.reduce(total.to(self.session.device))
            if not total.diagonal().isfinite().all():
                raise UserError(
                    f"the base's activations in layer {site[0]} are not finite on the decision rows: nothing can compensate; "
                    "look at model.dtype and the data, or set compensate.weights=none"
                )
            moments[site] = total.to(device)
        return moments

    def _has_room(self) -> bool:
        """Whether all moments fit the device while they are added up, with half of what is free left to the passes."""
        if self.session.device.type != "cuda":
            return True
        structure = self.session.structure
        rows = [row.into for row in structure.family.linears if row.into]
        widths = [layer.units[side.axis] * structure.rows(side) for layer in structure.layers for side in rows]
        return sum(4 * width**2 for width in widths) < torch.cuda.mem_get_info(self.session.device)[0] / 2


def _real(batch: Batch, pad: int) -> Tensor:
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return (batch["input_ids"] != pad) | (batch["labels"] != IGNORE)
