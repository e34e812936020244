"""Raw rows as tables."""

from __future__ import annotations

import statistics
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Literal

from slimtune.comparison import experts
from slimtune.comparison.jobs import ALL, Job, Part
from slimtune.comparison.rows import DENSE, GAIN, Row
from slimtune.comparison.sheet import Sheet
from slimtune.comparison.stats import OURS, PPL, Board, beyond_chance, boards, number, spread


def sheets(rows: Iterable[Row], asked: Iterable[Job] = (), part: Part = ALL) -> list[Sheet]:
    """For each base and domain: all figures, those of its tasks, perplexity and retention by method and budget, and leads."""
    found = []
    for board in boards(rows, asked, part):
        found += [_figures(board), *_tasks(board)]
        if board.methods:
            found += _overviews(board)
        if (leads := _leads(board)).rows:
            found.append(leads)
    return found


def listing(work: Sequence[Job], there: Container[Job], before: Sequence[Job] = ()) -> Sheet:
    """What a call would run: steps, tokens, which seeds are there already, and what is made first because others read it."""
    sheet = Sheet("runs", "runs", ["method", "keep", "steps", "windows", "tokens, at most", "to run: seeds", "there: seeds"])
    todo = [job for job in work if job not in there]
    for whose, method, keep in dict.fromkeys((job.whose, job.method, job.keep) for job in work):
        mine = [job for job in work if (job.whose, job.method, job.keep) == (whose, method, keep)]
        run, done = [job.seed for job in mine if job not in there], [job.seed for job in mine if job in there]
        numbers = [f"{number:,}" for number in (mine[0].steps, mine[0].windows, mine[0].tokens)]
        sheet.rows.append([whose + method, _budget(keep), *numbers, _list(run), _list(done)])
    sheet.notes.append(f"{len(todo)} of {len(work)} runs to make, {sum(job.tokens for job in todo):,} tokens at most")
    for job in before:
        sheet.notes.append(f"and first, for others read it: {job.folder} ({job.steps:,} steps, {job.tokens:,} tokens at most)")
    return sheet


GAINS = (
    f"{GAIN}: mean over tasks of accuracy minus that of the most frequent answer, or of ROUGE-L minus that of another row's "
    "answer; task retention: that over dense LoRA's"
)
LEARNED = (
    "learned: tasks_above_chance over those tasks alone whose interval for dense LoRA lies above what answers get that know "
    "nothing, on each seed"
)
BASELINES = "in brackets in a head: what answers get that know nothing"
INTERVALS = "in brackets behind a figure: its 95% interval over the test rows, the mean of the seeds' ends"
WINDOWS = (
    "in brackets behind a perplexity: its 95% interval over the test windows, the mean of the seeds' ends; other text would "
    "move all methods together"
)
FEW = "n: how many seeds a mean is over, where the row has more"


def _figures(board: Board) -> Sheet:
    seconds = "GPU s" if _on_gpus(board) else "s"
    groups = ["KV groups"] if any(row.get("kv_groups") for row in board.rows) else []
    measured = [metric for metric in board.metrics if "." not in metric and metric != GAIN]  # the others: _tasks
    beside = experts.columns(board)
    before = ["method", "keep", "M params", *beside, *groups, "perplexity", "retention"]
    columns = [*before, *(_headed(board, metric) for metric in measured), "M tokens", seconds, "seeds"]
    sheet = Sheet("figures", f"{board.name}: all figures", columns)
    for method, keep in board.seeds:
        sheet.rows.append(
            [
                method,
                _budget(keep),
                _millions(board.of(method, keep, "parameters").values()),
                *(experts.cells(_rows(board, method, keep)) if beside else ()),
                *(_count(_column(board, method, keep, "kv_groups")) for _ in groups),
                _of_seeds(board, method, keep, PPL, 2),
                _mean_of(board, method, keep, board.retention(method, keep)),
                *(_of_seeds(board, method, keep, metric) for metric in measured),
                _millions(_column(board, method, keep, "tokens")),
                _count(_column(board, method, keep, "gpu_seconds")),
                _seeds(board, method, keep),
            ]
        )
    sheet.legend += ["± standard deviation over seeds; retention: perplexity of dense LoRA over the method's, seed by seed"]
    sheet.legend += [*_signs(sheet), *([experts.LEGEND] if beside else [])]
    sheet.notes += _warnings(board)
    return sheet


def _signs(sheet: Sheet) -> list[str]:
    """What brackets and n mean, where there are any."""
    cells = [(column, cell) for row in sheet.rows for column, cell in zip(sheet.columns[1:], row[1:], strict=True)]
    bracketed = {column for column, cell in cells if "[" in cell}
    notes = [BASELINES] if any("[" in column for column in sheet.columns) else []
    notes += [WINDOWS] if "perplexity" in bracketed else []
    notes += [INTERVALS] if bracketed - {"perplexity"} else []
    return notes + ([FEW] if any("(n=" in cell for _, cell in cells) else [])


KINDS = {
    "text": ("perplexity", "bits_per_byte"),
    "choices": ("accuracy", "macro_f1"),
    "answers": ("rouge1", "rouge2", "rougeL"),
}
"""Tables of tasks, and the metrics in each; any other has its own."""


def _tasks(board: Board) -> list[Sheet]:
    """``task.metric``, a table for each kind of metric: no screen is wide enough for all of them in one."""
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for metric in board.metrics:
        name = metric.rpartition(".")[2]
        if "." in metric:
            kinds.setdefault(next((kind for kind, names in KINDS.items() if name in names), name), []).append(metric)
    found = [_task_scores(board)] if GAIN in board.metrics else []
    for kind, metrics in kinds.items():
        columns = ["method", "keep", *(_headed(board, metric) for metric in metrics)]
        sheet = Sheet("tasks", f"{board.name}: tasks, {kind}", columns)
        for method, keep in board.seeds:
            cells = [_of_seeds(board, method, keep, metric) for metric in metrics]
            if any(cells):
                sheet.rows.append([method, _budget(keep), *cells])
        sheet.legend += _signs(sheet)
        found += [sheet] if metrics else []
    return found


def _of_seeds(board: Board, method: str, keep: float, metric: str, digits: int = 3) -> str:
    """Mean, spread and interval."""
    ends = board.interval(method, keep, metric)
    told = f" [{number(ends[0], digits)}, {number(ends[1], digits)}]" if ends else ""
    return _mean_of(board, method, keep, board.of(method, keep, metric), digits, told)


def _mean_of(board: Board, method: str, keep: float, values: Mapping[int, float], digits: int = 3, told: str = "") -> str:
    """Mean and spread, what else is told of them, and of how many seeds where there are more.

    The others have no such figure, or no dense LoRA to be held against, or one that is not above chance.
    """
    few = f" (n={len(values)})" if 0 < len(values) < len(board.there(method, keep)) else ""
    return spread(values.values(), digits) + told + few


def _task_scores(board: Board) -> Sheet:
    learned = ["learned", "learned retention"] if board.learned else []
    sheet = Sheet("tasks", f"{board.name}: tasks, mean", ["method", "keep", GAIN, "task retention", *learned])
    for method, keep in board.seeds:
        if scores := board.of(method, keep, GAIN):
            found = [scores, board.task_retention(method, keep)]
            found += [board.learned_gain(method, keep), board.learned_retention(method, keep)] if learned else []
            sheet.rows.append([method, _budget(keep), *(_mean_of(board, method, keep, values) for values in found)])
    sheet.notes += [f"learned: {', '.join(board.learned)}"] if learned else []
    sheet.legend += [GAINS, *([LEARNED] if learned else []), *_signs(sheet)]
    return sheet


def _headed(board: Board, metric: str) -> str:
    """A metric and, in brackets, what answers get that know nothing."""
    baseline = board.baseline(metric)
    return metric if baseline is None else f"{metric} [{baseline:.3f}]"


def _rows(board: Board, method: str, keep: float) -> list[Row]:
    return [row for row in board.rows if (row["method"], row.get("keep") or 1.0, row["metric"]) == (method, keep, PPL)]


def _column(board: Board, method: str, keep: float, key: str) -> list[float]:
    return [row[key] for row in _rows(board, method, keep) if row.get(key) is not None]


def _count(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found):,.0f}" if found else ""


def _millions(values: Iterable[float]) -> str:
    found = list(values)
    return f"{statistics.mean(found) / 1e6:,.2f}" if found else ""


def _budget(keep: float) -> str:
    return "all" if keep == 1 else f"{keep:g}"


def _seeds(board: Board, method: str, keep: float) -> str:
    there, failed = sorted(board.of(method, keep)), sorted(board.failed.get((method, keep), ()))
    missing = [seed for seed in board.missing(method, keep) if seed not in failed]
    parts = [_list(there)] if there else []
    parts += [f"FAILED: {_list(failed)}"] if failed else []
    parts += [f"MISSING: {_list(missing)}"] if missing else []
    return "; ".join(parts)


def _list(seeds: Iterable[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _on_gpus(board: Board) -> bool:
    machines = {row.get("machine") for row in board.rows if row.get("machine")}
    return bool(machines) and not any("CPU threads" in str(machine) for machine in machines)


def _named(method: str, keep: float, seeds: Iterable[int], metric: str = "") -> str:
    return f"{method}{'' if keep == 1 else f' {keep:g}'}{metric} (seeds {_list(sorted(seeds))})"


def _warnings(board: Board) -> list[str]:
    """What a reader must know before comparing two lines."""
    found = []
    gaps = sum(len(board.missing(*cell)) for cell in board.seeds)
    if gaps:
        found.append(f"INCOMPLETE: {gaps} of {sum(len(seeds) for seeds in board.seeds.values())} runs are missing or failed")
    if not board.of(DENSE, 1.0):
        found.append("no dense LoRA among the rows: no retention")
    if stale := [_named(*cell, seeds) for cell, seeds in board.stale.items() if seeds]:
        found.append(f"made by other words of the recipe, not comparable: {', '.join(stale)}")
    bad = [_named(name, keep, seeds, f" {metric}") for (name, keep, metric), seeds in board.unusable.items() if seeds]
    found += [f"left out, being infinite, nan, or a perplexity not above 0: {', '.join(bad)}"] if bad else []
    machines = sorted({str(row["machine"]) for row in board.rows if row.get("machine")})
    if len(machines) > 1:
        found.append(f"seconds were taken on different machines: {', '.join(machines)}")
    programs = {row.get("program") for row in board.rows if row["metric"] == PPL}
    if len(programs) > 1:
        found.append(f"the runs were made by {len(programs)} versions of the program (program and commit in the rows)")
    return found


def _overviews(board: Board) -> list[Sheet]:
    """Perplexity by method and budget, and the same relative to dense LoRA."""
    sheet = _by_budget(board, "means", "mean perplexity", {cell: board.of(*cell) for cell in board.seeds}, 2)
    uncut = [
        f"{name} {spread(board.of(name, 1.0).values(), 2)}" for name, keep in board.seeds if keep == 1 and board.of(name, 1.0)
    ]
    if uncut:
        sheet.notes.insert(0, f"nothing cut: {', '.join(uncut)}")
    retention = {cell: board.retention(*cell) for cell in board.seeds}
    if not any(retention.values()):
        return [sheet]
    return [sheet, _by_budget(board, "retention", "mean retention, perplexity of dense LoRA over the method's", retention, 3)]


def _by_budget(
    board: Board,
    kind: Literal["means", "retention"],
    title: str,
    values: Mapping[tuple[str, float], Mapping[int, float]],
    digits: int,
) -> Sheet:
    sheet = Sheet(kind, f"{board.name}: {title}", ["method", *(f"keep {keep:g}" for keep in board.keeps)])
    there = {(method, keep): values.get((method, keep), {}) for method in board.methods for keep in board.keeps}
    few = {cell for cell, found in there.items() if found and len(found) < len(board.seeds[cell])}
    for method in board.methods:
        cells = {keep: spread(there[method, keep].values(), digits) for keep in board.keeps}
        sheet.rows.append([method, *(f"{cell}{'*' if (method, keep) in few else ''}" for keep, cell in cells.items())])
    best = min if kind == "means" else max
    for column, keep in enumerate(board.keeps, 1):
        means = {row: statistics.mean(found.values()) for row, name in enumerate(board.methods) if (found := there[name, keep])}
        if len(means) > 1:
            sheet.best |= {(row, column) for row, value in means.items() if value == best(means.values())}
    sheet.notes += ["* not all seeds are there"] if few else []
    return sheet


LEGEND = (
    "rival minus atp, the same seed each: mean ± standard deviation; ▲ atp ahead on every seed, beyond chance (one-sided "
    "paired t-test, 5%: of twenty equal rivals one gets ▲ and another ▼); △ on every seed; ≈ not on every seed; ▽ behind on "
    "every seed, ▼ beyond chance; no sign: one seed"
)


def _leads(board: Board) -> Sheet:
    keeps = [keep for keep in board.keeps if board.of(OURS, keep)]
    columns = ["rival", *(f"keep {keep:g}" for keep in keeps)]
    sheet = Sheet("leads", f"{board.name}: what atp is ahead by, in perplexity", columns)
    for rival in board.methods:
        cells = [_lead(board, rival, keep) for keep in keeps]
        if rival != OURS and any(cells):
            sheet.rows.append([rival, *cells])
    sheet.legend.append(LEGEND)
    if any("text" in cell for row in sheet.rows for cell in row[1:]):
        sheet.legend.append("text: standard error of that mean over the test windows, which are the same for all")
    return sheet


def _lead(board: Board, rival: str, keep: float) -> str:
    values = list(board.lead(rival, keep).values())
    if not values:
        return ""
    mean, sign = statistics.mean(values), "≈"
    if len(values) == 1:
        sign = ""
    elif all(value > 0 for value in values):
        sign = "▲" if beyond_chance(values) else "△"
    elif all(value < 0 for value in values):
        sign = "▼" if beyond_chance(values) else "▽"
    few = f" (n={len(values)})" if len(values) < len(board.seeds[rival, keep]) else ""
    error = board.text_error(rival, keep)
    text = "" if error is None else f", text ± {error:.2f}"
    return f"{sign} {'+' if mean >= 0 else ''}{spread(values, 2)}{few}{text}".strip()
