"""What a call asks for: the runs of one comparison file or of several, checked, and where things go."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slimtune.comparison.config import load
from slimtune.comparison.jobs import Job, Key, chosen, first_of, jobs_of
from slimtune.comparison.needs import check_apart, linked
from slimtune.errors import UserError

Files = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Order:
    """The runs of the files, all of them and those of this call, and where things go.

    Attributes:
        outs: the folders of the comparisons, each of which gets the table and the figure.
    """

    jobs: list[Job]
    work: list[Job]
    outs: list[Path]
    rows: Path


def order(
    file: Files,
    *,
    only: Iterable[str] = (),
    keep: Iterable[float] = (),
    seeds: Iterable[int] = (),
    rows: str | Path | None = None,
    out: str | Path | None = None,
) -> Order:
    """Read comparison files and check all their runs. Raises UserError; see :func:`slimtune.compare`.

    The runs of several files come seed by seed, so that an early end leaves whole comparisons.
    """
    files = [file] if isinstance(file, str | Path) else list(file)
    if not files:
        raise UserError("give a comparison file, e.g. recipes/compare/health.yaml")
    if len(files) > 1:
        if len({os.path.abspath(item) for item in files}) < len(files):
            raise UserError(f"a comparison is given twice among {', '.join(map(str, files))}; give each once")
        if out is not None:
            raise UserError(f"--out {str(out)!r} is for one comparison; several go where their files say: leave it out")
        if rows is None:
            raise UserError("several comparisons share a file of rows; name it: --rows FILE")
    read, models = [load(item) for item in files], dict[str, Job]()
    outs = [Path(out or comparison.out) for comparison in read]
    whose = [f"{comparison.domain}: " if len(read) > 1 else "" for comparison in read]
    parts = [
        linked([replace(job, whose=name) for job in jobs_of(comparison, folder)], _shared(first_of(comparison), models))
        for comparison, folder, name in zip(read, outs, whose, strict=True)
    ]
    jobs = _together(parts, files)
    check_apart([*models.values(), *jobs])
    return Order(jobs, chosen(jobs, only, keep, seeds), list(dict.fromkeys(outs)), Path(rows or outs[0] / "rows.json"))


def _shared(first: Sequence[Job], models: dict[str, Job]) -> list[Job]:
    """The models of ``first``, those of earlier comparisons in the place of their like: each is made once.

    Raises:
        UserError: other words make a model of that folder.
    """
    found = [models.setdefault(os.path.abspath(model.folder), model) for model in first]
    for model, other in zip(first, found, strict=True):
        if model.digest != other.digest:
            told = f"two of these comparisons make the model {str(model.folder)!r} by different words"
            raise UserError(f"{told}; give one of them another folder in first")
    return found


def _together(parts: Sequence[Sequence[Job]], files: Sequence[str | Path]) -> list[Job]:
    """The runs of all files, seed by seed. Raises UserError where two would take one another's place in the rows."""
    known = dict[Key, str]()
    for part, file in zip(parts, map(str, files), strict=True):
        for job in part:
            if (other := known.setdefault(job.key, file)) != file:
                both = f"{other!r} and {file!r} both have {job.method} of {job.base}, {job.domain}"
                raise UserError(f"{both}; give them in calls of their own, with another --rows each")
    turns = [list(dict.fromkeys(job.seed for job in part)) for part in parts]
    ranked = [(turn.index(job.seed), job) for part, turn in zip(parts, turns, strict=True) for job in part]
    return [job for _, job in sorted(ranked, key=lambda it: it[0])]
