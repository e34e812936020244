"""A run's folder, read: finished, going on or broken off. Only files; nothing of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import UserError
from slimtune.report.files import (
    MODELS,
    TARGETS,
    Row,
    is_bench,
    is_evaluation,
    kept,
    read_object,
    read_plan,
    read_rows,
    read_summary,
)
from slimtune.structure.plan import Plan
from slimtune.train.task_figures import OF_EXPERTS, better

Figures = Mapping[str, Any]
_COSTS = ("parameters", "bytes", "memory", "seconds", "block_ratio", *OF_EXPERTS)
_NUMBERS = frozenset({float, int})
Points = list[tuple[int, float]]
"""Steps, counted from one over all phases, and values."""


@dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        name: short, and different from those of the runs beside it.
        path: of the folder.
        recipe: as ``recipe.yaml`` has it, every default written out.
        summary: of a finished run; else empty.
        stages: what stands in ``stages.json``.
        rows: of ``metrics.jsonl``, in their order, those of checkpoints left out.
        plan: what was decided; None before.
        bench: what ``slimtune bench`` found of the run's model, last; None: not measured.
        evaluations: what ``slimtune evaluate --json`` wrote into the folder, by file name.
    """

    name: str
    path: Path
    recipe: dict[str, Any]
    summary: dict[str, Any]
    stages: dict[str, Any]
    rows: list[Row]
    plan: Plan | None
    bench: dict[str, Any] | None
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return bool(self.summary)

    @cached_property
    def main(self) -> list[Row]:
        """Rows of the run itself, step by step over all phases; those of the reference left out."""
        return [row for row in self.rows if row.get("stage") == "main"]

    @cached_property
    def reference(self) -> list[Row]:
        """Rows of dense LoRA, where the run tuned it as a reference."""
        return [row for row in self.rows if row.get("stage") == "dense_lora"]

    @cached_property
    def keys(self) -> list[str]:
        """Of all rows of the run itself, in their order."""
        kinds = dict.fromkeys(map(tuple, self.main))  # few: most rows have the same keys
        return list(dict.fromkeys(key for kind in kinds for key in kind))

    def line(self, figure: str, stage: str = "main") -> Points:
        """Finite values of one figure of the rows of a stage, ``main`` or ``dense_lora``; empty where there is none."""
        rows = self.main if stage == "main" else self.reference
        if figure == "kept" and any(name in self.keys for name in TARGETS):
            rows = [{"kept": kept(row)} for row in rows]
        values: list[Any] = [row.get(figure) for row in rows]  # two passes take half the time of one that does both
        return [(step, value) for step, value in enumerate(values, 1) if type(value) in _NUMBERS and math.isfinite(value)]

    def of(self, model: str) -> Figures:
        """Figures of ``base``, ``dense_lora`` or ``result`` on test rows, as far as they were taken."""
        found: Figures = self.summary.get(model) or (self.stages.get(model) if model != "result" else None) or {}
        return {**found, **self.summary.get("speed", {}).get(model, {})}

    def better(self, figure: str) -> str:
        """``lower`` or ``higher``."""
        if figure.startswith("speed.") or figure in _COSTS:
            return "lower"
        return better(figure, self.summary.get("lower_is_better", ()))

    @property
    def experts(self) -> bool:
        """Whether it makes experts: a token then uses a part of what is stored."""
        return self.recipe.get("method") == "tomoe" or "active_parameters" in (self.summary.get("result") or {})

    @property
    def shares(self) -> list[list[float]]:
        """Of the choices of each layer the part that every expert gets on validation rows; empty where that is not known."""
        found: list[list[float]] = self.summary.get("shares") or []
        return found

    @property
    def plan_digest(self) -> str:
        """SHA-256 of the Plan, which a summary tells without its file too; empty where there is none."""
        return self.plan.digest if self.plan else str(self.summary.get("plan") or "")

    @property
    def cut(self) -> int | None:
        """The step, counted over all phases, before which the model was cut; None: not yet, or not in this method."""
        found = next((index for index, row in enumerate(self.main) if row["phase"] == "recover"), None)
        return found if self.recipe.get("method") != "finetune" else None


def read_run(path: str | Path, name: str | None = None) -> Run:
    """Read a run's folder, or one that holds its ``summary.json`` alone (or that file).

    Raises:
        UserError: there is no run.
    """
    folder = Path(path).expanduser()
    folder = folder.parent if folder.name in ("summary.json", "recipe.yaml") and folder.is_file() else folder
    if not folder.is_dir():
        why = "is a file" if folder.is_file() else "does not exist"
        raise UserError(f"RUN {str(path)!r} {why}; give the folder of a run (its recipe's out)")
    summary = read_summary(folder / "summary.json")
    recipe = read_object(folder / "recipe.yaml", _yaml)
    if not (summary.get("result") or {"method", "model"} <= recipe.keys()):
        remedy = "give the folder of a run (its recipe's out), or one that holds a run's summary.json"
        if folder.name == "model" and (folder.parent / "recipe.yaml").is_file():
            remedy = f"that is a run's model: give {str(folder.parent)!r}"
        raise UserError(f"RUN {str(path)!r} holds neither summary.json nor recipe.yaml of a run; {remedy}")
    bench, evaluations = _measured(folder, summary)
    return Run(
        name=name or folder.resolve().name,
        path=folder,
        recipe=recipe,
        summary=summary,
        stages=read_object(folder / "stages.json"),
        rows=read_rows(folder / "metrics.jsonl"),
        plan=read_plan(folder / "plan.json"),
        bench=bench,
        evaluations=evaluations,
    )


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Several, under different names. Raises UserError as ``read_run`` does, and for a folder that is given twice."""
    runs = [read_run(path) for path in paths]
    places = [run.path.resolve() for run in runs]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"RUN {str(place)!r} is given twice; give each run once")
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return runs
    longer = [f"{place.parent.name}/{place.name}" for place in places]
    chosen = longer if len(set(longer)) == len(longer) else [str(place) for place in places]
    return [Run(**{**_fields(run), "name": name}) for run, name in zip(runs, chosen, strict=True)]


def _fields(run: Run) -> dict[str, Any]:
    return {name: getattr(run, name) for name in Run.__dataclass_fields__}


def _measured(folder: Path, summary: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """Of the JSON files there, known by what is in them: the newest bench of the result, and all evaluations of its models."""
    sizes = {figures["parameters"] for name in MODELS if "parameters" in (figures := summary.get(name) or {})}
    result = (summary.get("result") or {}).get("parameters")
    benches: list[tuple[float, dict[str, Any]]] = []
    evaluations: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        found = read_object(file) if file.stem not in ("summary", "stages", "plan", "windows") else {}
        if is_bench(found) and found["models"][0]["parameters"] == result:
            benches.append((file.stat().st_mtime, found))
        elif is_evaluation(found) and found["parameters"] in sizes:
            evaluations[file.name] = found
    return max(benches, key=lambda item: item[0])[1] if benches else None, evaluations


def _yaml(text: str) -> Any:
    """By libyaml where it is there: in a tenth of the time."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
