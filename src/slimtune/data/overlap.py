"""Near-duplicates across splits: rows to learn from that share too much of their wording with a row to measure on.

A row is the set of its runs of ``n`` words (``ngrams``). A prompt is also looked at alone, so that the same question with
another answer is found, and of a long text to measure on every piece, for a piece is what is measured: its copy inside a
long row is a small part of either.
The rule and its reasons: ``docs/decisions/0014-ngram-guard.md``.

Shape legend: G n-grams (distinct within their unit), P pairs of units with a common n-gram.
A *unit* is a number: 2 x the index of a row (or piece) for the whole of it, one more for its prompt alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from slimtune.data.ngrams import Hashes, Indices, chunks, parts, words
from slimtune.data.passages import mark_templates, passage_of
from slimtune.data.pieces import PIECE, pieces
from slimtune.data.sources import Row
from slimtune.errors import UserError
from slimtune.sections import DataConfig

COMMON_ROWS = 5
"""An n-gram in more evaluation rows than this (of a few rows: in more than half of them) tells none of them: template or
boilerplate. Not counted over training rows: what leaked often would pass as boilerplate there (but to tell a template from a
passage: rows whose prompts hold one passage are one row here, see ``passages``)."""


def apart(
    rows: Mapping[str, list[Row]], config: DataConfig, notes: Counter[str]
) -> tuple[dict[str, list[Row]], dict[str, float]]:
    """Train and decision rows without those that are nearly a row of test, valid or protect; the other rows as they are.

    Returns:
        The rows, and for test and valid the percentage of their n-grams that the remaining train rows hold.

    Raises:
        UserError: with ``on_overlap="error"``, if there is such a row.
    """
    held = Held(
        (row for name in ("test", "valid", "protect") for row in rows[name]), config.ngram, [*rows["train"], *rows["decision"]]
    )
    kept = dict(rows)
    matches: list[tuple[str, Row, Match]] = []
    for name in ("decision", "train"):
        near = held.near(rows[name], config.ngram_share, remember=name == "train")
        matches += [(name, rows[name][match.row], match) for match in near]
        left_out = {match.row for match in near}
        kept[name] = [row for index, row in enumerate(rows[name]) if index not in left_out]
        notes.update({f"{name}.near": len(near)} if near else {})
    if matches and config.on_overlap == "error":
        raise UserError(_told(matches, rows, held, config))
    return kept, {name: held.percent_seen(rows[name]) for name in ("test", "valid") if rows[name]}


def _told(matches: Sequence[tuple[str, Row, Match]], rows: Mapping[str, list[Row]], held: Held, config: DataConfig) -> str:
    name, row, match = max(matches, key=lambda found: found[2].share)
    twin = held.rows[match.held]
    home = next(name for name in ("test", "valid", "protect") if any(twin.key == other.key for other in rows[name]))
    common = shared_words(row, twin, config.ngram)
    return (
        f"{len(matches)} rows to learn from are nearly the same as a held-out row, or have its prompt "
        f"(data.ngram_share={config.ngram_share} or more of the runs of {config.ngram} words), e.g. {row.origin} "
        f'(data.{name}) and {twin.origin} ({told(home)}) share "{common}"; set data.on_overlap=drop to leave such rows out '
        "of train and decision, or remove them"
    )


def told(name: str) -> str:
    """A split as messages call it."""
    return "data.protect or evaluate.tasks" if name == "protect" else f"data.{name}"


def shared_words(row: Row, other: Row, n: int) -> str:
    """The beginning of the longest run of words that two rows share: at most ``n`` words, for messages."""
    best: list[str] = []
    for pick in (slice(0, 2), slice(0, 1)):  # the whole row, then the prompt alone
        mine, theirs = ([word for part in parts(each)[pick] for word in words(part)] for each in (row, other))
        size = min(n, len(mine), len(theirs))
        known = {tuple(theirs[at : at + size]) for at in range(len(theirs) - size + 1)}
        run = 0
        for at in range(len(mine) - size + 1 if size else 0):
            run = run + 1 if tuple(mine[at : at + size]) in known else 0
            if run and run + size - 1 > len(best):
                best = mine[at - run + 1 : at + size]
    return " ".join(best[:n]) + (" ..." if len(best) > n else "")


class Match(NamedTuple):
    """A row to learn from and the evaluation row that it is nearest to.

    Attributes:
        row: index of the row to learn from.
        held: index of the evaluation row.
        share: n-grams of both over those of the smaller of the two, common ones (``COMMON_ROWS``) not counted.
    """

    row: int
    held: int
    share: float


class Held:
    """The n-grams of evaluation rows, against which rows to learn from are held.

    Args:
        rows: evaluation rows; of those with one ``key`` the first counts.
        n: words of an n-gram.
        learn: rows to learn from, by which templates are known from passages.
    """

    def __init__(self, rows: Iterable[Row], n: int, learn: Sequence[Row] = ()):
        unique: dict[str, Row] = {}
        for row in rows:
            unique.setdefault(row.key, row)
        self.rows = list(unique.values())
        self.n = n
        long = [(home, piece) for home, row in enumerate(self.rows) for piece in _pieces(row)]
        self._home = np.array([*range(len(self.rows)), *(home for home, _ in long)], np.int64)
        found = list(chunks([*self.rows, *(Row(text=piece) for _, piece in long)], n))
        unit = np.concatenate([np.zeros(0, np.int64), *(chunk.unit for chunk in found)])
        gram = np.concatenate([np.zeros(0, np.uint64), *(chunk.gram for chunk in found)])
        order = np.argsort(gram, kind="stable")
        self._owner = unit[order]
        self._grams, self._first, self._count = np.unique(gram[order], return_index=True, return_counts=True)
        self._common = self._is_common(max(2, min(COMMON_ROWS, len(self.rows) // 2)), learn)
        own = self._owner[~np.repeat(self._common, self._count)]
        self._size = np.bincount(own, minlength=2 * len(self._home))
        self.seen = np.zeros(len(self._grams), bool)

    def _is_common(self, most: int, learn: Sequence[Row]) -> NDArray[np.bool_]:
        """Which n-grams stand in more than ``most`` rows, those about one passage counted as one, and pieces with their row."""
        many = max(len(self.rows), 1)
        gram, home = np.repeat(np.arange(len(self._grams)), self._count), self._home[self._owner // 2]

        def rows_with(row: Indices) -> Indices:
            return np.bincount(np.unique(gram * many + row) // many, minlength=len(self._grams))

        common, prompt = rows_with(home) > most, self._owner % 2 == 1
        if not common[gram[prompt]].any():
            return common
        counts = np.zeros(len(self._grams), np.int64)
        once = list({row.key: row for row in learn}.values())
        for chunk in chunks(once, self.n):
            place, known = self._look_up(chunk.gram)
            np.add.at(counts, place[known], 1)
        passage = passage_of(gram[prompt], home[prompt], len(self.rows), mark_templates(counts, len(once)), most)
        return rows_with(passage[home]) > most

    def near(self, rows: Sequence[Row], share: float, remember: bool = False) -> list[Match]:
        """The best match of every row that has one, in the order of ``rows``.

        Args:
            rows: rows to learn from.
            share: two rows match from this share of the n-grams of either on.
            remember: note which n-grams the rows without a match hold, for ``percent_seen``.
        """
        found: list[Match] = []
        for chunk in chunks(rows, self.n):
            place, known = self._look_up(chunk.gram)
            telling = np.ones(len(place), bool)
            telling[known] = ~self._common[place[known]]
            size = np.bincount(chunk.unit[telling], minlength=1)
            pairs = self._pairs(chunk.unit[known & telling], place[known & telling], size)
            matches = _best(pairs, share)
            found += matches
            if remember:
                matched = np.isin(chunk.unit // 2, [match.row for match in matches])
                self.seen[place[known & ~matched]] = True
        return found

    def percent_seen(self, rows: Iterable[Row]) -> float:
        """How much of the (distinct) n-grams of evaluation ``rows`` the remembered rows hold, boilerplate included."""
        index = {row.key: number for number, row in enumerate(self.rows)}
        mine = np.zeros(2 * len(self._home), bool)
        mine[[2 * index[row.key] for row in rows]] = True
        held = np.add.reduceat(mine[self._owner], self._first, dtype=np.int64) > 0 if len(self._grams) else self.seen
        return 100 * float(self.seen[held].mean()) if held.any() else 0.0

    def _look_up(self, gram: Hashes) -> tuple[Indices, NDArray[np.bool_]]:
        """Where each n-gram stands among those of the evaluation rows, and whether it does."""
        if not len(self._grams):
            return np.zeros(len(gram), np.int64), np.zeros(len(gram), bool)
        place = np.minimum(np.searchsorted(self._grams, gram), len(self._grams) - 1)
        return place, self._grams[place] == gram

    def _pairs(self, unit: Indices, place: Indices, size: Indices) -> _Pairs:
        """All pairs of units with a common n-gram.

        Args:
            unit: [G] units to learn from.
            place: [G] their n-grams' places.
            size: n-grams of every such unit, those of no evaluation row included.
        """
        count = self._count[place]
        start = np.repeat(self._first[place] - (np.cumsum(count) - count), count)
        owner = self._owner[start + np.arange(len(start))]
        both, shared = np.unique(np.repeat(unit, count) * len(self._size) + owner, return_counts=True)
        left, right = np.divmod(both, max(len(self._size), 1))
        return _Pairs(left // 2, self._home[right // 2], shared / np.minimum(size[left], self._size[right]))


class _Pairs(NamedTuple):
    """Pairs of rows by index, [P] each, and the n-grams that they share over those of the smaller of the two."""

    row: Indices
    held: Indices
    share: NDArray[np.float64]


def _best(pairs: _Pairs, share: float) -> list[Match]:
    """The strongest pair of every row that has one; of equals the first evaluation row."""
    hit = np.flatnonzero(pairs.share >= share)
    hit = hit[np.lexsort((pairs.held[hit], -pairs.share[hit], pairs.row[hit]))]
    _, first = np.unique(pairs.row[hit], return_index=True)
    return [Match(int(pairs.row[at]), int(pairs.held[at]), float(pairs.share[at])) for at in hit[first]]


def _pieces(row: Row) -> list[str]:
    """Those of a text that is longer than one."""
    return pieces(row.text) if row.text is not None and len(row.text) > PIECE else []
