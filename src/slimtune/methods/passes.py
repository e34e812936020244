"""Forward passes over decision batches that look on: what scores and second moments are taken from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
        """
        totals: dict[Site, Tensor] = {}

        def see(real: Tensor, layer: int, axis: str, values: Tensor) -> None:
            with torch.autocast(values.device.type, enabled=False):
                found = values[real].float()
                product = (found.T @ found).to(device)
            site = (layer, axis)
            totals[site] = totals[site].add_(product) if site in totals else product

        self.run(lambda real: {"consumers": lambda *args: see(real, *args)})
        reduce = self.session.accelerator.reduce
        return {site: reduce(total.to(self.session.device)).to(device) for site, total in totals.items()}


def _real(batch: Batch, pad: int) -> Tensor:
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return (batch["input_ids"] != pad) | (batch["labels"] != IGNORE)
