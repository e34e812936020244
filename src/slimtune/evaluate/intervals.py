"""95% intervals of figures: a seeded bootstrap over the rows that the harness logged; and what answers get that know nothing.

Rows are drawn with replacement ``DRAWS`` times, the figure is computed anew on each draw (for a perplexity the ratio of
sums, for macro-F1 the F1 of every class), and the interval runs from the 2.5th to the 97.5th percentile.
Where all rows are right, or all are wrong, every draw is the same; an accuracy, or the share of what is true, then has exact
ends (Clopper and Pearson 1934).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slimtune.evaluate.metrics import ROUGE, macro_f1, rouge

DRAWS = 1000
LEVEL = 0.95
Values = NDArray[np.float64]


def interval(metric: str, values: Sequence[Any], seed: int, name: str) -> tuple[float, float] | None:
    """The interval of one metric of one task; None where its spread cannot be told: of a single row, or of rows all alike.

    Args:
        metric: as in metrics.py.
        values: what the harness logged, a row each: a number, true or false, or a pair for ``macro_f1``, ``perplexity``,
            ``bits_per_byte``.
        name: of the task: its draws are its own, whatever other tasks are run.
    """
    if len(values) < 2:
        return None
    table = np.asarray(values, dtype=np.float64)
    share = metric == "accuracy" or all(isinstance(value, bool) for value in values)
    if share and table.min() == table.max():
        return _exact(bool(table[0]), len(table))
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    draws = np.array([_STATISTICS.get(metric, _mean)(table[rows]) for rows in _drawn(rng, len(table))])
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return (float(low), float(high)) if low < high else None


def _exact(right: bool, rows: int) -> tuple[float, float]:
    """Clopper and Pearson's interval of a share that is 1 or 0: up to where such rows would be as rare as one tail."""
    end = float(((1 - LEVEL) / 2) ** (1 / rows))
    return (end, 1.0) if right else (0.0, 1 - end)


def _drawn(rng: np.random.Generator, rows: int) -> Sequence[NDArray[np.int64]]:
    return [rng.integers(0, rows, rows) for _ in range(DRAWS)]


def majority(labels: Sequence[int]) -> dict[str, float]:
    """Accuracy and macro-F1 of the answer that is most often right."""
    first = max(sorted(set(labels)), key=labels.count)
    return {"accuracy": labels.count(first) / len(labels), "macro_f1": macro_f1([(label, first) for label in labels])}


def chance(docs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """ROUGE of the reference answer of the next row: what an answer of the right kind to another question gets."""
    pairs = list(zip(docs, [*docs[1:], *docs[:1]], strict=True)) if len(docs) > 1 else []
    scores = [rouge(dict(doc), [other["completion"]]) for doc, other in pairs]
    return {name: sum(score[name] for score in scores) / len(scores) for name in ROUGE} if scores else {}


def _mean(values: Values) -> float:
    return float(values.mean())


def _macro_f1(pairs: Values) -> float:
    """As ``metrics.macro_f1``, over arrays [N, 2] of (label, answer)."""
    labels, answers = pairs.astype(np.int64).T
    size = int(pairs.max()) + 1
    seen = np.bincount(labels, minlength=size) + np.bincount(answers, minlength=size)
    hits = np.bincount(labels[labels == answers], minlength=size)
    return float((2 * hits[seen > 0] / seen[seen > 0]).mean())


def _ratio(pairs: Values) -> float:
    score, size = pairs.sum(0)
    return float(score / size)


_STATISTICS: Mapping[str, Callable[[Values], float]] = {
    "macro_f1": _macro_f1,
    "perplexity": lambda pairs: math.exp(min(-_ratio(pairs), 700.0)),
    "bits_per_byte": lambda pairs: -_ratio(pairs) / math.log(2),
}
