"""A run's folder, read: finished, going on or broken off. Only files; nothing of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import UserError
from slimtune.structure.plan import Plan
from slimtune.train.task_figures import better

Row = dict[str, Any]
Figures = Mapping[str, Any]
MODELS = {"base": "base", "dense_lora": "dense LoRA", "result": "result"}
"""Models that a summary has figures of, and what to call them."""
_TEXTS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""Numbers that metrics.jsonl has as text, for JSON has no others."""


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

    def of(self, model: str) -> Figures:
        """Figures of ``base``, ``dense_lora`` or ``result`` on test rows, as far as they were taken."""
        found: Figures = self.summary.get(model) or (self.stages.get(model) if model != "result" else None) or {}
        return {**found, **self.summary.get("speed", {}).get(model, {})}

    def better(self, figure: str) -> str:
        """``lower`` or ``higher``."""
        if figure.startswith("speed.") or figure in ("parameters", "bytes", "memory", "seconds", "block_ratio"):
            return "lower"
        return better(figure, self.summary.get("lower_is_better", ()))

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
    summary = _json(folder / "summary.json")
    recipe = _yaml(folder / "recipe.yaml")
    if not isinstance(summary.get("result", {}), dict) or not (summary.get("result") or {"method", "model"} <= recipe.keys()):
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
        stages=_json(folder / "stages.json"),
        rows=read_rows(folder / "metrics.jsonl"),
        plan=_plan(folder / "plan.json"),
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


def read_rows(file: Path) -> list[Row]:
    """Rows of steps; half of one at the end, which is being written, is passed over."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    rows = _parsed(lines)
    if any('"nan"' in line or 'inf"' in line for line in lines):
        rows = [{key: _read(value) for key, value in row.items()} if isinstance(row, dict) else row for row in rows]
    return [row for row in rows if isinstance(row, dict) and "step" in row and "phase" in row]


def _parsed(lines: Sequence[str]) -> list[Any]:
    try:  # all at once, in two thirds of the time
        found: list[Any] = json.loads(f"[{','.join(lines)}]")
        return found
    except ValueError:
        found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def _read(value: Any) -> Any:
    return _TEXTS.get(value, value) if isinstance(value, str) else value


def _measured(folder: Path, summary: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """Of the JSON files there, known by what is in them: the newest bench of the result, and all evaluations of its models."""
    sizes = {figures["parameters"] for name in MODELS if "parameters" in (figures := summary.get(name) or {})}
    result = (summary.get("result") or {}).get("parameters")
    benches: list[tuple[float, dict[str, Any]]] = []
    evaluations: dict[str, dict[str, Any]] = {}
    for file in sorted(folder.glob("*.json")):
        found = _json(file) if file.stem not in ("summary", "stages", "plan", "windows") else {}
        if {"rows", "models", "ratios"} <= found.keys() and found["models"] and found["models"][0].get("parameters") == result:
            benches.append((file.stat().st_mtime, found))
        elif {"tasks", "suites", "parameters"} <= found.keys() and found["parameters"] in sizes:
            evaluations[file.name] = found
    return max(benches, key=lambda item: item[0])[1] if benches else None, evaluations


def _json(file: Path) -> dict[str, Any]:
    """An object in a file; empty where there is none. Raises UserError where it is damaged."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        if file.name == "summary.json":
            raise UserError(f"{str(file)!r} is damaged ({error}); the run writes it anew with --resume") from error
        return {}
    return found if isinstance(found, dict) else {}


def _yaml(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _plan(file: Path) -> Plan | None:
    try:
        return Plan.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (UserError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} cannot be used: {error}") from error
