"""Which runs read another run's folder, as the model they start from, its tokenizer, or their teacher."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from slimtune.comparison.jobs import OUT, Job
from slimtune.errors import UserError


def linked(jobs: Sequence[Job], first: Sequence[Job]) -> list[Job]:
    """The runs, each with those of ``jobs`` and ``first`` whose folders it reads.

    Raises:
        UserError: two runs have one folder, runs read one another in a circle, a text names a folder in ``{out}`` that no
            run makes, or a model of ``first`` is read by nobody.
    """
    everything, done = [*first, *jobs], dict[Path, Job]()
    check_apart(everything)

    def link(job: Job, path: tuple[Job, ...]) -> Job:
        if job in path:
            told = " reads ".join(item.label for item in (*path[path.index(job) :], job))
            raise UserError(f"comparison: no run can be the first of these: {told}")
        if job.folder not in done:
            sources = [other for other in everything if _reads(job, other)]
            done[job.folder] = replace(job, reads=tuple(link(other, (*path, job)) for other in sources))
        return done[job.folder]

    found = [link(job, ()) for job in jobs]
    used = {source.folder for job in done.values() for source in job.reads}
    for item in first:
        if item.folder not in used:
            raise UserError(
                f"comparison: first: {str(item.folder)!r} is read by no method; name it, e.g. as model.path, or drop it"
            )
    for job in found:
        _check_out(job)
    return found


def check_apart(jobs: Sequence[Job]) -> None:
    """Raises UserError where one run would take another's folder: ``a`` at 0.6 and ``a-0.6``, or runs of two comparisons."""
    found = dict[str, Job]()
    for job in jobs:
        other = found.setdefault(os.path.abspath(job.folder), job)
        if other is not job:
            one, two = (f"{it.label} ({f'first: {it.folder}' if it.first else f'methods.{it.method}'})" for it in (other, job))
            raise UserError(
                f"comparison: {one} and {two} would both be made in {str(job.folder)!r}; rename one of them or change its keep"
            )


def missing(work: Iterable[Job], made: Callable[[Job], bool]) -> list[Job]:
    """The runs that ``work`` reads, directly or through others, and that are not ``made``; sources before their readers."""
    work, found = list(work), list[Job]()

    def look(job: Job) -> None:
        for source in job.reads:
            if source not in work and source not in found and not made(source):
                look(source)
                found.append(source)

    for job in work:
        look(job)
    return found


def starts_from(job: Job) -> bool:
    """Whether the run's model is another run's."""
    path = job.recipe.model.path
    return bool(path) and any(_lies_in(path, job, source) for source in job.reads)


def _read_texts(job: Job) -> list[str]:
    recipe = job.recipe
    return [text for text in (recipe.model.path, recipe.model.tokenizer, recipe.distill.teacher) if text]


def _lies_in(text: str, job: Job, other: Job) -> bool:
    """Whether the folder that ``job`` calls so lies in that of ``other``."""
    return Path(os.path.abspath(job.fill(text))).is_relative_to(os.path.abspath(other.folder))


def _reads(job: Job, other: Job) -> bool:
    return any(_lies_in(text, job, other) for text in _read_texts(job))


def _check_out(job: Job) -> None:
    for text in _read_texts(job):
        if OUT in text and not any(_lies_in(text, job, source) for source in job.reads):
            raise UserError(f"comparison: {job.label}: {text!r} names a folder that no run of this comparison makes")
