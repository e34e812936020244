"""Second moments of a consumer's d inputs, kept as the half that says all: a run has no larger tensors than a wide MLP's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

BLOCKS = 8
"""Blocks of rows, each kept up to its diagonal block: 9/16 of the whole matrix."""


@dataclass(frozen=True)
class Moments:
    """A symmetric matrix [d, d].

    Attributes:
        half: its blocks of rows up to the diagonal, one after another, fp32 [9/16 d^2].
        size: d.
    """

    half: Tensor
    size: int

    @classmethod
    def of(cls, matrix: Tensor) -> Moments:
        """Those of a whole matrix, on its device."""
        return cls(torch.cat([matrix[rows, : rows.stop].reshape(-1) for rows in _blocks(len(matrix))]), len(matrix))

    def whole(self, half: Tensor | None = None) -> Tensor:
        """[d, d], on the device of ``half``, which is another copy of this one's."""
        half, taken = self.half if half is None else half, 0
        matrix = torch.empty(self.size, self.size, dtype=half.dtype, device=half.device)
        for rows in _blocks(self.size):
            count = (rows.stop - rows.start) * rows.stop
            matrix[rows, : rows.stop] = half[taken : taken + count].view(-1, rows.stop)
            matrix[: rows.start, rows] = matrix[rows, : rows.start].T
            taken += count
        return matrix

    def diagonal(self) -> Tensor:
        """[d]."""
        found, taken = list[Tensor](), 0
        for rows in _blocks(self.size):
            count = (rows.stop - rows.start) * rows.stop
            found.append(self.half[taken : taken + count].view(-1, rows.stop).diagonal(rows.start))
            taken += count
        return torch.cat(found)


def _blocks(size: int) -> list[slice]:
    edges = [size * number // BLOCKS for number in range(BLOCKS + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges) if stop > start]
