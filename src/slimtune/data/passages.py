"""Evaluation rows that ask about one passage: where it is counted how many rows tell of a run of words, they are one.

Twenty questions on one page would else make the page boilerplate, and its copy in the training rows would not be found.
What a passage is not: a template, which stands in a good part of the rows to learn from too.

Shape legend: E pairs of an n-gram and a row whose prompt holds it, each once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

MOST_ROWS = 50
"""An n-gram in more prompts than this, or in more than half of them, is a template: nobody asks as much about one page."""
HALF = 0.5
"""Two prompts are about one passage from this share of the n-grams of the shorter one on, templates not counted."""
TEMPLATE_ROWS, TEMPLATE_SHARE = 10, 0.05
"""An n-gram in more rows to learn from than either is a template: what leaks of a passage is fewer rows. Among a few hundred
a passage that leaked often is one too; else a small set of several templates would leave nothing to learn."""


def mark_templates(counts: Indices, rows: int) -> Flags:
    """Which n-grams are templates, by how many of ``rows`` rows to learn from have them in their prompts."""
    return counts > max(TEMPLATE_ROWS, TEMPLATE_SHARE * rows)


def passage_of(gram: Indices, row: Indices, rows: int, template: Flags, least: int) -> Indices:
    """The passage of every row, as the row with the shortest prompt about it; a row alone with its passage is its own.

    Args:
        gram: [E] n-grams, row: [E] rows.
        rows: number of rows.
        template: by n-gram.
        least: n-grams of as many rows, or fewer, need no passage: they tell as it is.
    """
    count = np.bincount(gram, minlength=len(template))
    telling = ~template[gram] & (count[gram] <= min(MOST_ROWS, rows // 2))
    gram, row = gram[telling], row[telling]
    size = np.bincount(row, minlength=rows)
    by_size = np.lexsort((np.arange(rows), size))
    rank = np.argsort(by_size)
    # not all pairs of its rows, whose number grows with the square, but each with the shortest: what is left of that one
    # beside the passage is least, so a row that has the passage in common with any has it with this one
    hub = np.full(len(template), rows, np.int64)
    np.minimum.at(hub, gram, rank[row])
    often = (count[gram] > least) & (hub[gram] < rank[row])
    both, shared = np.unique(rank[row[often]] * max(rows, 1) + hub[gram[often]], return_counts=True)
    longer, shorter = np.divmod(both, max(rows, 1))
    alike = shared >= HALF * size[by_size[shorter]]
    found = np.arange(rows)
    for here, there in zip(longer[alike].tolist(), shorter[alike].tolist(), strict=True):  # by rank: that of ``there`` is known
        found[here] = min(found[here], found[there])
    return by_size[found[rank]]
