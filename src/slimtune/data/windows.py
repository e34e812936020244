"""Tokenised windows: plain text cut to length, examples packed, and their batches.

Shape legend: B batch, T tokens of the longest window of a batch, N tokens in all.

Packed examples do not attend to one another: positions restart at 0 for each, and transformers reads the restarts as
borders (``masking_utils.find_packed_sequence_indices``) when there is **no attention mask and no cache**. So call the
model with ``use_cache=False``. Padding goes on with the positions of what it follows: nothing before it attends to it,
and a batch of single texts keeps the plain causal attention, which is the fast one.
Flash attention reads restarts only at B = 1: give it ``collate(..., flatten=True)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from slimtune.data.prompts import Encoded

IGNORE = -100
"""Label that the loss leaves out."""
MIN_TAIL = 32
"""A last text window of fewer tokens is left out."""


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of at most ``max_length`` tokens, end to end in flat arrays.

    Attributes:
        ids: [N] int32 token ids.
        target: [N] bool, True where a token is predicted; False at every start, so the shift never crosses a border.
        start: [N] bool, True at the first token of a window and of each packed example.
        offsets: [windows + 1] int64, where each window begins.
        pad: id that fills short windows.
        packed: there is no attention mask; else padding has one.
    """

    ids: NDArray[np.int32]
    target: NDArray[np.bool_]
    start: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    pad: int = 0
    packed: bool = True

    @classmethod
    def build(
        cls,
        texts: Iterable[NDArray[np.int32]],
        examples: Sequence[Encoded],
        max_length: int,
        pad: int = 0,
        packing: bool = True,
    ) -> Windows:
        """Windows of the joined ``texts``, then of ``examples`` (each at most ``max_length`` tokens)."""
        stream = np.concatenate([np.zeros(0, np.int32), *texts])
        lengths = _text_lengths(len(stream), max_length)
        ids, targets = [stream[: sum(lengths)]], [np.ones(sum(lengths), np.bool_)]
        starts = _begins(lengths)
        bins = pack([len(item) for item in examples], max_length) if packing else [[i] for i in range(len(examples))]
        for window in bins:
            members = [examples[index] for index in window]
            ids += [item.ids for item in members]
            targets += [item.target for item in members]
            starts += _begins([len(item) for item in members], starts_at=sum(lengths))
            lengths.append(sum(len(item) for item in members))
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        start = np.zeros(int(offsets[-1]), np.bool_)
        start[starts] = True
        return cls(np.concatenate(ids), np.concatenate(targets) & ~start, start, offsets, pad, packing)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens, padding not counted."""
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens the loss is taken over."""
        return int(self.target.sum())

    def spread(self, count: int) -> list[int]:
        """At most ``count`` indices, evenly spaced: a fair sample, whatever order the windows stand in."""
        return spread(len(self), count)

    def collate(self, indices: Sequence[int], flatten: bool = False) -> dict[str, torch.Tensor]:
        """``input_ids``, ``labels`` (-100: no loss), ``position_ids``, each [B, T] int64, and a mask where needed.

        ``attention_mask`` [B, T] is there only when rows are padded and ``packed`` is off. ``flatten`` puts the windows
        behind one another in one row [1, sum of lengths]: nothing is padded, restarts of the positions divide them.
        """
        spans = [slice(self.offsets[index], self.offsets[index + 1]) for index in indices]
        rows = [(self.ids[span].astype(np.int64), self.target[span], self.start[span]) for span in spans]
        if flatten:
            ids, target, start = zip(*rows, strict=True)
            rows = [(np.concatenate(ids), np.concatenate(target), np.concatenate(start))]
        width = max(len(ids) for ids, _, _ in rows)
        batch = {
            "input_ids": np.stack([_filled(ids, width, self.pad) for ids, _, _ in rows]),
            "labels": np.stack([_filled(np.where(target, ids, IGNORE), width, IGNORE) for ids, target, _ in rows]),
            "position_ids": np.stack([_positions(start, width) for _, _, start in rows]),
        }
        if not self.packed and any(len(ids) < width for ids, _, _ in rows):
            batch["attention_mask"] = np.stack([_filled(np.ones(len(ids), np.int64), width, 0) for ids, _, _ in rows])
        return {name: torch.from_numpy(array) for name, array in batch.items()}


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` of the indices below ``total``, evenly spaced and off the ends."""
    count = min(count, total)
    return [(2 * index + 1) * total // (2 * count) for index in range(count)]


def _text_lengths(total: int, max_length: int) -> list[int]:
    full, rest = divmod(total, max_length)
    return [max_length] * full + ([rest] if rest >= MIN_TAIL or (rest and not full) else [])


def _begins(lengths: Sequence[int], starts_at: int = 0) -> list[int]:
    return [starts_at + int(end) - length for end, length in zip(np.cumsum(lengths), lengths, strict=True)]


def _filled(values: NDArray[np.int64], width: int, fill: int) -> NDArray[np.int64]:
    row = np.full(width, fill, np.int64)
    row[: len(values)] = values
    return row


def _positions(start: NDArray[np.bool_], width: int) -> NDArray[np.int64]:
    """[width] positions that restart at 0 at every start."""
    begins = np.zeros(width, np.bool_)
    begins[: len(start)] = start
    index = np.arange(width)
    return index - np.maximum.accumulate(np.where(begins, index, 0))


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: indices of ``lengths`` grouped so that no group exceeds ``capacity``. Deterministic.

    O(n log n): a tree over the groups holds the free space below each node, so the first fit is one descent.
    """
    size = 1 << max(1, (len(lengths) - 1).bit_length())
    free = [capacity] * (2 * size)
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        node = 1
        while node < size:
            node = 2 * node + (free[2 * node] < lengths[index])
        if node - size == len(groups):
            groups.append([])
        groups[node - size].append(index)
        free[node] -= lengths[index]
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return groups
