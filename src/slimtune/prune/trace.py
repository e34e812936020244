"""How a decision moves: the width of every layer at each step of a search, and how many units changed sides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slimtune.prune.gates import Masks
from slimtune.structure.axes import AXES


class Trace:
    """Told of the masks step by step, says what a row of metrics.jsonl is to hold of them."""

    def __init__(self) -> None:
        self._kept: Tensor | None = None

    def follow(self, masks: Masks) -> None:
        """Take ``masks`` {site: [units]} for those of the step before: a search that goes on from a checkpoint."""
        self._kept = _flat(masks) if masks else None

    @torch.no_grad()
    def row(self, masks: Masks) -> dict[str, Any]:
        """What is known of the masks of a step {site: [units], 0 or 1}; nothing where there are none yet.

        Returns:
            ``widths_AXIS``: kept units of every layer in their order; ``closed`` and ``reopened``: the parts of all units
            that were removed, and came back, since the step before (before the first all units were kept).
        """
        if not masks:
            return {}
        kept = _flat(masks)
        before = torch.ones_like(kept) if self._kept is None else self._kept
        self._kept = kept
        sites = sorted(masks, key=lambda site: site[0])
        # one read for all: each waits for the device
        numbers = torch.stack(
            [(before & ~kept).sum(), (kept & ~before).sum(), *(masks[site].sum().long() for site in sites)]
        ).tolist()
        widths = dict(zip(sites, numbers[2:], strict=True))
        return {
            "closed": numbers[0] / len(kept),
            "reopened": numbers[1] / len(kept),
            **{f"widths_{axis}": [width for (_, other), width in widths.items() if other == axis] for axis in AXES},
        }


def _flat(masks: Masks) -> Tensor:
    return torch.cat([masks[site] > 0.5 for site in sorted(masks)])
