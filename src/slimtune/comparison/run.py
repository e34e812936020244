"""A comparison from its file to rows: what is there is taken, what is missing is run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from pathlib import Path

from slimtune.comparison import rows as raw
from slimtune.comparison.budgets import check_budgets
from slimtune.comparison.gpus import check_there
from slimtune.comparison.jobs import Job
from slimtune.comparison.launch import Ended, Launcher, told
from slimtune.comparison.made import check_ours, finished, made_for_others
from slimtune.comparison.needs import missing
from slimtune.comparison.order import Files, order
from slimtune.comparison.program import program
from slimtune.errors import UserError

NOTHING = {"failed": "not there"}
Say = Callable[[str], None]


def compare(
    file: Files,
    *,
    jobs: int | None = None,
    gpus: Sequence[str] = (),
    threads: int | None = None,
    only: Iterable[str] = (),
    keep: Iterable[float] = (),
    seeds: Iterable[int] = (),
    rows: str | Path | None = None,
    out: str | Path | None = None,
    say: Say = print,
) -> list[raw.Row]:
    """Make the runs of a comparison file that are not there yet, and collect their rows.

    Args:
        file: the comparison, e.g. ``recipes/compare/health.yaml``, or several, whose runs are dealt out together.
        jobs: runs side by side; default: one a GPU in ``gpus``, else one.
        gpus: numbers of the GPUs to deal the runs out to; none: each run sees all.
        threads: CPU threads of a run; default: the cores over ``jobs``.
        only: methods; keep: budgets; seeds: seeds. Empty: all.
        rows: the file of the rows; default ``rows.json`` in the output folder. Rows that it has are kept and joined.
        out: folder of the runs; default: the comparison's. Several comparisons need ``rows`` and take no ``out``.
        say: takes a line for each run that ends.

    Returns:
        All rows of the file, those of failed runs (metric ``failed``) among them.

    Raises:
        UserError: a run is not a valid recipe or cannot meet its budget, the file asks for something unknown, a GPU is not
            there, or a folder cannot be written.
    """
    asked = order(file, only=only, keep=keep, seeds=seeds, rows=rows, out=out)
    return run(asked.work, asked.rows, Launcher(side_by_side(jobs, gpus, threads), gpus, threads), say)


def side_by_side(jobs: int | None, gpus: Sequence[str], threads: int | None = None) -> int:
    """``jobs``, else one a GPU, else one. Raises UserError where nothing would run, or not on a GPU, or without a thread."""
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: give the number of runs side by side, 1 or more")
    if threads is not None and threads < 1:
        raise UserError(f"--threads {threads}: give the CPU threads of a run, 1 or more, or leave it out")
    for gpu in gpus:  # CUDA takes what it cannot read for an empty list, and the runs would go on without a GPU
        if not gpu.isdecimal() and not gpu.startswith(("GPU-", "MIG-")):
            raise UserError(f"--gpus {gpu}: give the numbers of GPUs, e.g. --gpus 0,1, or their UUIDs (nvidia-smi -L)")
    return jobs or len(gpus) or 1


def run(work: Sequence[Job], file: Path, launcher: Launcher, say: Say = print) -> list[raw.Row]:
    """Rows of finished runs, then those of the others as they end; the file is whole after each of them.

    Runs that these read and that are absent are made as well.
    """
    now, rows = program(), raw.read(file)
    left = [job for job in work if not raw.has_run(rows, job, now)]
    there = {job: summary for job in left if (summary := finished(job, now))}
    todo = [job for job in left if job not in there]
    before = needed(todo)
    check_ours([*before, *todo])
    check_budgets([*before, *todo])
    _check_folders([*left, *before])
    if before or todo:
        check_there(launcher.gpus)
    rows = raw.added(file, [row for job, summary in there.items() for row in raw.of_run(job, summary)])
    if len(todo) < len(work):
        say(f"{len(work) - len(todo)} of {len(work)} runs are there already, made by the same words and the same program")
    if before:
        say(f"made first, for others read it: {', '.join(str(job.folder) for job in before)}")
    clock = _Clock(len(before) + len(todo), launcher.jobs)
    with closing(launcher.run_all([*before, *todo])) as ends:  # closed at once: an interrupt in here must stop the runs too
        for ended in ends:
            if ended.summary is not None and not ended.job.first:
                rows = raw.added(file, raw.of_run(ended.job, ended.summary))
            say(clock.line(ended))
    return rows


def needed(todo: Sequence[Job]) -> list[Job]:
    """What ``todo`` reads and is not there. Raises UserError where a model of ``first`` was made by other words."""
    now = program()
    return missing(todo, lambda job: made_for_others(job) if job.first else "failed" not in (finished(job, now) or NOTHING))


def present(work: Sequence[Job], file: Path) -> set[Job]:
    """The runs that need not be made: their rows or their folders are there, by the same words and program."""
    now, rows = program(), raw.read(file)
    return {job for job in work if raw.has_run(rows, job, now) or finished(job, now)}


def _check_folders(work: Sequence[Job]) -> None:
    for folder in dict.fromkeys(job.folder.parent for job in work):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"out={str(folder)!r} cannot be created: {error.strerror}; choose another folder") from error
        if not os.access(folder, os.W_OK):
            raise UserError(f"out={str(folder)!r} cannot be written; choose another folder")


class _Clock:
    """Lines of progress with the time left, by the mean of the runs made so far."""

    def __init__(self, total: int, jobs: int):
        self.total, self.jobs, self.started = total, min(jobs, total), time.perf_counter()
        self.done = self.made = 0
        self.spent = 0.0

    def line(self, ended: Ended) -> str:
        """What came of a run."""
        if ended.again:
            return f"{ended.job.label}: {ended.why}"
        self.done += 1
        told = f"[{self.done}/{self.total}] {ended.job.label}: {_outcome(ended)}"
        if ended.seconds:  # else it was not made here, which says nothing of the others
            self.made, self.spent = self.made + 1, self.spent + ended.seconds
            told += f", {duration(ended.seconds)}"
        if not self.made or self.done == self.total:
            return told
        return f"{told}; about {duration(self._pace() * (self.total - self.done))} left"

    def _pace(self) -> float:
        """Seconds from one end to the next: in the first rounds as the runs' own say, for the others are under way yet."""
        if self.made < 2 * self.jobs:
            return self.spent / self.made / self.jobs
        return (time.perf_counter() - self.started) / self.made


def _outcome(ended: Ended) -> str:
    summary = ended.summary
    if summary is None or "failed" in summary:
        return told(ended)
    base = f" (base {summary['base']['ppl']:.2f})" if "ppl" in summary["base"] else ""
    return f"perplexity {summary['result']['ppl']:.2f}{base}"


def duration(seconds: float) -> str:
    """In words: ``40 s``, ``12 min``, ``3 h 20 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
