"""What a run left in its folder and beside it: its summary, and the stamp that says by which words and program."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slimtune.comparison.jobs import Job
from slimtune.comparison.rows import judged, of_run, put, wrong
from slimtune.errors import UserError

Summary = dict[str, Any]
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, IndexError)
"""What comes of reading a file that is cut off or holds something else."""


def beside(job: Job, ending: str) -> Path:
    """A file next to the run's folder. Not ``with_suffix``: a budget in the name looks like one."""
    return job.folder.with_name(job.folder.name + ending)


def stamp(job: Job) -> Summary | None:
    """What the run's stamp says; None where there is none, or a damaged one."""
    try:
        found = _read(beside(job, ".json"))
        return {**found, "words": found["words"], "program": found["program"]}
    except DAMAGED:
        return None


def put_stamp(job: Job, says: Summary) -> None:
    """Before the run starts, with whose it is. Whole or not at all: other calls read it. Raises UserError."""
    put(beside(job, ".json"), json.dumps({**says, "comparison": [job.base, job.domain]}, indent=2) + "\n")


def check_ours(work: Iterable[Job]) -> None:
    """Raises UserError where a run would take the place of one of another base or domain. Models of ``first`` are shared."""
    for job in work:
        made = None if job.first else stamp(job)
        whose = made.get("comparison") if made else None  # older stamps do not say
        if whose and whose != [job.base, job.domain]:
            raise UserError(
                f"out={str(job.folder.parent)!r}: {str(job.folder)!r} holds a run of the comparison of {_told(whose)}, not of "
                f"{_told([job.base, job.domain])}; give another --out"
            )


def _told(whose: Any) -> str:
    return ", ".join(map(repr, whose)) if isinstance(whose, list) else repr(whose)


def finished(job: Job, now: str) -> Summary | None:
    """The summary of a run that the same words and the same program (``now``) have made, with what its stamp says.

    With ``failed`` where its figures are no numbers: the same words would make the same again. None as well where one of its
    files is damaged: it is made again.
    """
    made = stamp(job)
    if made is None or (made["words"], made["program"]) != (job.digest, now):
        return None
    try:
        beyond = {"kv_groups": _kv_groups(job.folder / "plan.json"), "windows": _read(job.folder / "windows.json")}
        summary = judged({**_read(job.folder / "summary.json"), **made, **beyond})
        rows = of_run(job, summary)
    except DAMAGED:
        return None
    return None if any(map(wrong, rows)) else summary


def made_for_others(job: Job) -> bool:
    """Whether a model of ``first`` is there, whatever program made it: by a comparison, or by hand.

    Raises:
        UserError: a comparison made it by other words.
    """
    try:
        if not isinstance(_read(job.folder / "summary.json"), dict):
            return False
    except DAMAGED:
        return False
    made = stamp(job)
    if made is None:
        return not beside(job, ".json").is_file()  # a damaged stamp does not tell by which words
    if made["words"] != job.digest:
        raise UserError(f"first: {str(job.folder)!r} was made by other words; remove it, or give another out")
    return True


def _read(file: Path) -> Any:
    """A JSON file; None where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _kv_groups(plan: Path) -> int | None:
    """KV groups that stay, over all layers: what the KV cache holds."""
    found = _read(plan)
    return None if found is None else sum(len(layer["kv_group"]) for layer in found["plan"]["kept"])
