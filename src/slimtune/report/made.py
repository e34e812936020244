"""How a run was made: all that is needed to repeat it."""

from __future__ import annotations

import re
import shlex
import urllib.parse
from typing import Any

import yaml

from slimtune.guard.ruling import apart
from slimtune.report.quality import Table
from slimtune.report.run import Run
from slimtune.report.words import clock
from slimtune.version import LIBRARIES


def facts(run: Run, key: str) -> Table:
    """Hashes, versions, machine, seeds."""
    summary = run.summary
    data = summary.get("data") or {}
    rows = [
        ["Plan (SHA-256)", run.plan_digest or ("none" if run.finished else "none yet")],
        ["weights of the base", str(summary.get("weights") or run.stages.get("weights") or "not recorded")],
        *([f"data, {split}", digest] for split, digest in data.items()),
        *([f"rows of {task}", digest] for task, digest in (summary.get("task_rows") or {}).items()),
        ["rows", _listed(summary.get("rows") or {})],
        ["tokens", _listed(summary.get("tokens") or {})],
        ["seed", str(summary.get("seed", run.recipe.get("seed", "")))],
        ["versions", _versions(summary)],
        ["machine", f"{summary.get('machine', 'not recorded')}, {_processes(summary)}"],
        [
            "time",
            clock(summary["seconds"]) + (" since --resume" if summary.get("resumed") else "") if summary else "not finished",
        ],
    ]
    if summary.get("reload_difference") is not None:
        rows.append(["reload in a fresh process", f"logits differ by {summary['reload_difference']:.1e}"])
    if summary.get("leak") is not None:
        rows.append(["leak before the cut", f"{summary['leak']:.1e}"])
    return Table(key, "How it was made", ["", ""], [row for row in rows if row[1]], code=True)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in values.items() if count)


def _versions(summary: dict[str, Any]) -> str:
    names = {"version": "slimtune", **{name: name for name in LIBRARIES}}
    return ", ".join(f"{name} {summary[key]}" for key, name in names.items() if summary.get(key))


def _processes(summary: dict[str, Any]) -> str:
    count = summary.get("processes", 1)
    return f"{count} processes" if count > 1 else "one process"


def verb(method: Any) -> str:
    """The command of slimtune that runs such a recipe."""
    return "convert" if method == "tomoe" else "tune"


def command(run: Run) -> str:
    """The command that repeats the run, beside it."""
    out = str(run.recipe.get("out") or run.path)
    count = run.summary.get("processes", 1)
    start = f"torchrun --nproc-per-node {count} -m slimtune" if count > 1 else "slimtune"
    there = f"cd {shlex.quote(run.stages['cwd'])}\n" if run.stages.get("cwd") else ""
    file = f"{out}/recipe.yaml" if there else str(run.path / "recipe.yaml")  # a copy of a run's files is where it is
    recipe, again = shlex.quote(file), shlex.quote(f"out={out}-again")
    return f"{there}{start} {verb(run.recipe.get('method'))} {recipe} {again}"


def recipe(run: Run) -> str:
    """The recipe as YAML; of an alarm's webhook the host alone, of its command the program: they may hold a secret."""
    shown = dict(run.recipe)
    alarm = dict(shown.get("alarm") or {})
    if alarm.get("webhook"):
        alarm["webhook"] = _host(alarm["webhook"])
    if alarm.get("command"):
        alarm["command"] = [alarm["command"][0], "..."]
    if alarm:
        shown["alarm"] = alarm
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml where it is there: in a tenth of the time
    text = yaml.dump(shown, Dumper=dumper, sort_keys=False, allow_unicode=True) if shown else ""
    return re.sub(r"://[^/@\s]+@", "://...@", text)  # whom an address of data or a model is asked as


def _host(address: str) -> str:
    """What may be told of a webhook: the name of a variable that holds it, or its host."""
    if named := re.match(r"\$\{\w+\}", address):
        return named.group() + ("" if named.group() == address else "/...")
    parts = urllib.parse.urlsplit(address)
    return f"{parts.scheme}://{parts.hostname}/..."


def guards(run: Run, key: str) -> Table | None:
    """What the written model was held to."""
    rulings = run.summary.get("guard") or []
    if not rulings:
        return None
    rows = [
        [
            ruling["guard"],
            ruling["figure"],
            value or "not measured",
            ruling["condition"],
            limit,
            "holds" if ruling["holds"] else "BREACHED",
        ]
        for ruling in rulings
        for value, limit in [apart(ruling["value"], ruling["limit"])]
    ]
    marks = {index: "bad" for index, ruling in enumerate(rulings) if not ruling["holds"]}
    return Table(key, "Guards", ["guard", "figure", "value", "to be", "that is", ""], rows, numbers=9, marks=marks)


def breaches(run: Run) -> list[str]:
    """Guards that were out of their bounds at steps, in sentences."""
    found: dict[str, list[int]] = {}
    for step, row in enumerate(run.main, 1):
        for name in row.get("breached", ()):
            found.setdefault(name, []).append(step)
    return [
        f"{name}: out of its bound at {len(steps)} evaluation{'s' if len(steps) > 1 else ''}, first at step {steps[0]:,}, "
        f"last at {steps[-1]:,}"
        for name, steps in found.items()
    ]
