"""Second moments of a consumer's d inputs, kept as the half that says all: a run has no larger tensors than a wide MLP's."""

from __future__ import annotations

from collections.abc import Iterator
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

    @classmethod
    def of_inputs(cls, inputs: Tensor) -> Moments:
        """Sums of x x^T over inputs x, [N, d], in fp32, on their device."""
        if not inputs.is_cuda or inputs.dtype not in (torch.bfloat16, torch.float16):
            exact = inputs.float()
            return cls.of(exact.T @ exact)
        size = inputs.shape[1]
        half = torch.empty(sum((rows.stop - rows.start) * rows.stop for rows in _blocks(size)), device=inputs.device)
        for rows, part in _parts(half, size):
            # products of 16-bit numbers are exact in fp32, where they are summed: no copy of the inputs in fp32, no second half
            torch.mm(inputs[:, rows].T, inputs[:, : rows.stop], out_dtype=torch.float32, out=part)
        return cls(half, size)

    def whole(self, half: Tensor | None = None) -> Tensor:
        """[d, d], on the device of ``half``, which is another copy of this one's."""
        half = self.half if half is None else half
        matrix = torch.empty(self.size, self.size, dtype=half.dtype, device=half.device)
        for rows, part in _parts(half, self.size):
            matrix[rows, : rows.stop] = part
            matrix[: rows.start, rows] = matrix[rows, : rows.start].T
        return matrix

    def diagonal(self) -> Tensor:
        """[d]."""
        return torch.cat([part.diagonal(rows.start) for rows, part in _parts(self.half, self.size)])


def _parts(half: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Each block of rows, and where ``half`` has it up to its diagonal: a view."""
    taken = 0
    for rows in _blocks(size):
        count = (rows.stop - rows.start) * rows.stop
        yield rows, half[taken : taken + count].view(-1, rows.stop)
        taken += count


def _blocks(size: int) -> list[slice]:
    edges = [size * number // BLOCKS for number in range(BLOCKS + 1)]
    return [slice(start, stop) for start, stop in pairwise(edges) if stop > start]
