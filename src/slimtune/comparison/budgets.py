"""Whether each method can meet its budgets, from the base's config.json alone: before the first run, not hours later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from slimtune.comparison.jobs import Job
from slimtune.comparison.needs import starts_from
from slimtune.errors import UserError

if TYPE_CHECKING:
    from slimtune.structure.axes import Structure


def check_budgets(work: Iterable[Job], absent: bool = False) -> None:
    """Say what ``tune`` would say of each run's method and budget.

    Args:
        work: runs. Those that start from another run's model are not looked at: it may not be there yet.
        absent: a base that is not at hand is passed over, too.

    Raises:
        UserError: a method cannot meet its budget or does not suit the base, or the base's config cannot be had; names the run.
    """
    cutting: dict[tuple[str, float, str | None], Job] = {}  # the seed changes the base at most
    for job in work:
        if job.recipe.prunes and not starts_from(job):
            cutting.setdefault((job.method, job.keep, job.recipe.model.path), job)
    if not cutting:
        return
    from slimtune.preflight import check_method  # seconds of imports, which a table does without

    described = dict[str, "tuple[Any, Structure] | None"]()
    for job in cutting.values():
        try:
            model = job.recipe.model.model_dump_json()
            if model not in described:
                described[model] = _described(job, absent)
            if (base := described[model]) is not None:
                check_method(job.recipe, *base)
        except UserError as error:
            raise UserError(f"{job.label}: {error}") from error


def _described(job: Job, absent: bool) -> tuple[Any, Structure] | None:
    """Config and structure of a job's base."""
    from slimtune.models.load import load_config, structure_of

    try:
        config = load_config(job.recipe.model)
    except UserError:
        if absent:
            return None
        raise
    return config, structure_of(config)
