"""What a table and a figure say of raw rows: figures by method, budget and seed, and what is missing."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from slimtune.comparison.jobs import ALL, Job, Part
from slimtune.comparison.rows import DENSE, GAIN, NORMAL, PPL, SCORES, Row, key_of, unpacked, usable

OURS = "atp"
"""The method that the others are held against."""
Cell = tuple[str, float]
"""Method and budget (1: nothing is cut)."""


@dataclass
class Board:
    """The rows of one base and domain."""

    base: str
    domain: str
    seeds: dict[Cell, set[int]] = field(default_factory=dict)
    """The seeds that each method and budget should have, in the order in which they are shown."""
    values: dict[tuple[str, float, str], dict[int, float]] = field(default_factory=dict)
    """Value by seed of a method, a budget and a metric."""
    failed: dict[Cell, set[int]] = field(default_factory=dict)
    unusable: dict[tuple[str, float, str], set[int]] = field(default_factory=dict)
    """Seeds whose value of a metric is no number: left out, and of a perplexity failed."""
    stale: dict[Cell, set[int]] = field(default_factory=dict)
    """Seeds whose rows other words made than those that are asked for: left out, they are missing."""
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For headings."""
        return f"{self.domain}, {self.base}"

    @property
    def keeps(self) -> list[float]:
        """The budgets of methods that cut, largest first."""
        return sorted({keep for _, keep in self.seeds if keep < 1}, reverse=True)

    @property
    def methods(self) -> list[str]:
        """Methods that cut (or stand for a budget)."""
        return list(dict.fromkeys(method for method, keep in self.seeds if keep < 1))

    def of(self, method: str, keep: float, metric: str = PPL) -> dict[int, float]:
        """Value by seed."""
        return self.values.get((method, keep, metric), {})

    def retention(self, method: str, keep: float) -> dict[int, float]:
        """Dense LoRA's perplexity over the method's, by seed: 1 is as good as a model that keeps all parameters."""
        dense, mine = self.of(DENSE, 1.0), self.of(method, keep)
        return {seed: dense[seed] / value for seed, value in mine.items() if dense.get(seed)}

    def task_retention(self, method: str, keep: float) -> dict[int, float]:
        """The method's mean task score above chance over dense LoRA's, by seed, where that is above chance at all."""
        dense, mine = self.of(DENSE, 1.0, GAIN), self.of(method, keep, GAIN)
        return {seed: value / dense[seed] for seed, value in mine.items() if dense.get(seed, 0.0) > 0}

    @property
    def learned(self) -> list[str]:
        """Scores of tasks in which dense LoRA's interval lies above what answers get that know nothing, on each of its seeds.

        The choice is by dense LoRA's luck as well, so what others retain of these is rather told too low.
        """
        above: dict[str, bool] = {}
        for row in self.rows:
            if row["method"] == DENSE and row["metric"].endswith(tuple(SCORES)) and row.get("low") is not None:
                baseline = _baseline(row)
                above[row["metric"]] = above.get(row["metric"], True) and baseline is not None and row["low"] > baseline
        return sorted(metric for metric, it in above.items() if it)

    def learned_gain(self, method: str, keep: float) -> dict[int, float]:
        """Mean score above answers that know nothing over ``learned``, by seed, where a seed has all of them."""
        scores = [(self.of(method, keep, metric), self.baseline(metric) or 0.0) for metric in self.learned]
        seeds = set.intersection(*(set(values) for values, _ in scores)) if scores else set()
        return {seed: statistics.mean(values[seed] - baseline for values, baseline in scores) for seed in sorted(seeds)}

    def learned_retention(self, method: str, keep: float) -> dict[int, float]:
        """The method's over dense LoRA's, by seed."""
        dense = self.learned_gain(DENSE, 1.0)
        return {seed: value / dense[seed] for seed, value in self.learned_gain(method, keep).items() if seed in dense}

    def lead(self, rival: str, keep: float) -> dict[int, float]:
        """Perplexity of a rival minus that of atp, by seed: above 0, atp is ahead."""
        ours = self.of(OURS, keep)
        return {seed: value - ours[seed] for seed, value in self.of(rival, keep).items() if seed in ours}

    def text_error(self, rival: str, keep: float) -> float | None:
        """Standard error of the mean lead over test windows: how far it would move with other text of the kind.

        From what each window adds to the two losses, paired by seed and window, in perplexity. None where a seed's rows do not
        tell, or tell of other windows.
        """
        seeds = sorted(self.lead(rival, keep))
        terms: list[tuple[float, tuple[str, list[float]] | None]] = []
        for method, sign in ((rival, 1), (OURS, -1)):
            values, windows = self.of(method, keep), self.windows(method, keep)
            terms += [(sign * values[seed] / len(seeds), windows.get(seed)) for seed in seeds]  # d ppl = ppl d loss
        told = [(weight, *found) for weight, found in terms if found]
        if len(told) < len(terms) or len({(digest, len(numbers)) for _, digest, numbers in told}) != 1:
            return None
        weights, _, numbers = zip(*told, strict=True)
        mean = [sum(map(operator.mul, weights, each)) for each in zip(*numbers, strict=True)]
        return statistics.stdev(mean) / len(mean) ** 0.5 if len(mean) > 1 and all(map(math.isfinite, mean)) else None

    def windows(self, method: str, keep: float) -> dict[int, tuple[str, list[float]]]:
        """Digest of the test windows and what each adds to the loss, by seed, where the rows tell it."""
        mine = [row for row in self.rows if (*key_of(row)[2:4], row["metric"]) == (method, keep, PPL) and row.get("windows")]
        return {row["seed"]: unpacked(row["windows"]) for row in mine}

    def baseline(self, metric: str) -> float | None:
        """What answers get on a task that know nothing, where the rows tell it."""
        for row in self.rows:
            if row["metric"] == metric and (found := _baseline(row)) is not None:
                return float(found)
        return None

    def interval(self, method: str, keep: float, metric: str) -> tuple[float, float] | None:
        """The ends of a figure's 95% interval, each the mean over seeds. None where a seed's rows do not tell."""
        mine = [_ends(row) for row in self.rows if (*key_of(row)[2:4], row["metric"]) == (method, keep, metric)]
        ends = [each for each in mine if each]
        if not ends or len(ends) < len(mine):
            return None
        low, high = (statistics.mean(each) for each in zip(*ends, strict=True))
        return low, high

    def there(self, method: str, keep: float) -> set[int]:
        """Seeds that have any figure."""
        return {seed for (name, budget, _), found in self.values.items() if (name, budget) == (method, keep) for seed in found}

    def missing(self, method: str, keep: float) -> list[int]:
        """Seeds that should be there and are not."""
        return sorted(self.seeds[method, keep] - set(self.of(method, keep)))

    @property
    def metrics(self) -> list[str]:
        """What is measured besides the perplexity: accuracy and the figures of tasks."""
        shown = {metric for method, keep, metric in self.values if (method, keep) in self.seeds}
        return sorted(shown - {PPL, "parameters"})


def _ends(row: Row) -> tuple[float, float] | None:
    """The 95% interval of a row: as it tells it, over test rows; of a perplexity from its standard error over test windows."""
    if row["metric"] != PPL:
        return (row["low"], row["high"]) if row.get("low") is not None and row.get("high") is not None else None
    value, error = row["value"], row.get("se")
    if error is None or not (0 < value < math.inf and error >= 0):  # nan is none of it
        return None
    factor = math.exp(min(NORMAL * error / value, 700.0))  # exp(log(ppl) ± 1.96 se of the loss)
    return value / factor, value * factor


def _baseline(row: Row) -> float | None:
    found: float | None = row.get("majority", row.get("chance"))
    return found


def boards(rows: Iterable[Row], asked: Iterable[Job] = (), part: Part = ALL) -> list[Board]:
    """A board for each base and domain.

    Args:
        rows: raw rows.
        asked: the runs that there should be, by their words. Where they say nothing of a base and domain, each of its methods
            and budgets should have the seeds that any has.
        part: what is shown.
    """
    found: dict[tuple[str, str], Board] = {}
    asked = list(asked)
    digests = {job.key: job.digest for job in asked}
    for job in asked:
        board = found.setdefault((job.base, job.domain), Board(job.base, job.domain))
        board.seeds.setdefault((job.method, job.keep), set()).add(job.seed)
    told = {where: _all_seeds(board.seeds) for where, board in found.items()}
    for row in rows:
        board = found.setdefault((row["base"], row["domain"]), Board(row["base"], row["domain"]))
        words, key = row.get("words"), key_of(row)
        if words and words != digests.get(key, words):
            board.stale.setdefault(key[2:4], set()).add(key[4])
        else:
            _add(board, row)
    for where, board in found.items():
        everything = told.get(where) or {seed for it in (board.values, board.unusable) for each in it.values() for seed in each}
        for seeds in board.seeds.values():
            if not seeds:
                seeds |= everything
        if where not in told:
            board.seeds = dict(sorted(board.seeds.items(), key=_place))
    return [shown for board in found.values() if (shown := _part(board, part)).seeds]


def _add(board: Board, row: Row) -> None:
    method, keep, seed = key_of(row)[2:]
    board.seeds.setdefault((method, keep), set())
    if row["metric"] != "failed" and not usable(row):
        board.unusable.setdefault((method, keep, row["metric"]), set()).add(seed)
        if row["metric"] == PPL:
            board.failed.setdefault((method, keep), set()).add(seed)
        return
    board.rows.append({key: None if isinstance(it, float) and not math.isfinite(it) else it for key, it in row.items()})
    if row["metric"] == "failed":
        board.failed.setdefault((method, keep), set()).add(seed)
    else:
        board.values.setdefault((method, keep, row["metric"]), {})[seed] = row["value"]


def _part(board: Board, part: Part) -> Board:
    """Of a board what is shown, and the figures of dense LoRA, shown or not: the others are held against them."""
    held, cells = replace(part, only=(*part.only, DENSE) if part.only else ()), replace(part, seeds=())

    def of(part: Part, method: str, keep: float, seeds: Iterable[int]) -> set[int]:
        return {seed for seed in seeds if part.holds((board.base, board.domain, method, keep, seed))}

    values = {
        (method, keep, metric): {seed: each[seed] for seed in each if seed in found}
        for (method, keep, metric), each in board.values.items()
        if (found := of(held, method, keep, each))
    }
    failed = {cell: of(part, *cell, seeds) for cell, seeds in board.failed.items()}
    stale = {cell: of(held, *cell, seeds) for cell, seeds in board.stale.items()}
    unusable = {key: of(part, *key[:2], seeds) for key, seeds in board.unusable.items()}
    seeds = {cell: of(part, *cell, each) for cell, each in board.seeds.items() if of(cells, *cell, [0])}
    rows = [row for row in board.rows if held.holds(key_of(row))]
    return Board(board.base, board.domain, seeds, values, failed, unusable, stale, rows)


def _all_seeds(seeds: Mapping[Cell, set[int]]) -> set[int]:
    return {seed for each in seeds.values() for seed in each}


def _place(item: tuple[Cell, set[int]]) -> tuple[bool, str, float]:
    (method, keep), _ = item
    return method != OURS, method, -keep


LARGE = 1e12
STUDENT = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)
"""95th percentiles of Student's t with 1 to 9 degrees of freedom; with more the last, which is a little too strict."""


def beyond_chance(differences: Sequence[float]) -> bool:
    """Whether the mean of paired differences is so far from 0, on whichever side. False for fewer than two.

    A one-sided paired t-test at 5% towards the side on which the mean lies, so of twenty equal rivals two pass: one is behind
    and one is ahead.
    """
    count = len(differences)
    if count < 2:
        return False
    error = statistics.stdev(differences) / count**0.5
    return abs(statistics.mean(differences)) > STUDENT[min(count - 1, len(STUDENT)) - 1] * error


def spread(values: Iterable[float], digits: int) -> str:
    """Mean ± standard deviation; the mean alone of a single value; nothing of none."""
    found = list(values)
    if not found:
        return ""
    mean = number(statistics.mean(found), digits)
    return mean if len(found) == 1 else f"{mean} ± {number(deviation(found), digits)}"


def number(value: float, digits: int) -> str:
    """A figure with so many digits behind the point; a very large one by its power of ten."""
    return f"{value:.{digits}f}" if abs(value) < LARGE else f"{value:.3g}"


def deviation(values: Iterable[float]) -> float:
    """Standard deviation; 0 of a single value, nan where one is no number."""
    found = list(values)
    if not all(map(math.isfinite, found)):
        return math.nan
    return statistics.stdev(found) if len(found) > 1 else 0.0
