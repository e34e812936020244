"""Which runs must end before which: those whose folder another one reads, as a teacher or as the model it starts from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slimtune.comparison.jobs import Job
from slimtune.errors import UserError


def read_by(job: Job, others: Sequence[Job]) -> list[Job]:
    """Those of ``others`` whose folder stands in the words of ``job``."""
    return [other for other in others if other is not job and any(f"{other.folder}/" in word for word in job.filled)]


def missing(work: Sequence[Job], sources: Sequence[Job]) -> list[Job]:
    """The runs among ``sources`` that ``work`` reads, directly or through others, and that have not been made."""
    found: list[Job] = []
    look = list(work)
    while look:
        new = [job for job in read_by(look.pop(), sources) if job not in found and not (job.folder / "summary.json").is_file()]
        found += new
        look += new
    return [job for job in sources if job in found]


def waves(work: Sequence[Job]) -> Iterator[list[Job]]:
    """The runs in parts, each of which reads only earlier ones.

    Raises:
        UserError: runs read one another in a circle.
    """
    left = list(work)
    while left:
        ready = [job for job in left if not read_by(job, left)]
        if not ready:
            raise UserError(f"comparison: these runs wait for one another: {', '.join(job.label for job in left)}")
        yield ready
        left = [job for job in left if job not in ready]
