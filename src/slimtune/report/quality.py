"""Figures of the models of a run beside one another: tables, and tasks with their intervals as a picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimtune.report.files import MODELS
from slimtune.report.ink import LEVEL, MARKERS, SERIES, Picture, labels, mark, sheet, svg
from slimtune.report.run import Run
from slimtune.report.verdict import general_tasks
from slimtune.report.words import finite, label, metric_name, number

SIZES = ("parameters", "block_ratio", "active_parameters", "active_ratio", "bytes")
"""What a model is of; the active ones are known of models with experts, and of what those are held to."""
_OWN = (*SIZES, "ppl", "valid_ppl", "accuracy", "seconds", "memory", "speed.memory_bytes")

_ALIKE = (".macro_f1", ".perplexity", ".rouge1", ".rouge2")
"""Figures of tasks that go with another one."""


@dataclass(frozen=True)
class Table:
    """A table of the page; cells are text, the first of a row is its head."""

    key: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    numbers: int = 1
    """Columns from this one on hold numbers."""
    marks: Mapping[int, str] = field(default_factory=dict)
    """{row: class}: rows that stand out."""
    code: bool = False
    """Cells are hashes and the like, which may break anywhere."""


def overview(run: Run, key: str) -> Table:
    """Size, quality and cost of base, dense LoRA and result."""
    models = [model for model in MODELS if run.of(model)]
    rows = []
    for figure in _OWN:
        cells = [_with_error(run.of(model), figure) for model in models]
        if any(cells):
            rows.append([label(figure, run.experts), *cells])
    return Table(key, "Size, quality, cost", ["", *(MODELS[model] for model in models)], rows, _errors(run))


def _errors(run: Run) -> str:
    return "± one standard error over test windows or rows." if any("_se" in key for key in run.of("result")) else ""


def _with_error(figures: Mapping[str, Any], figure: str) -> str:
    told = number(figure, figures.get(figure))
    error = figures.get(f"{figure}_se")
    return f"{told} ± {number(figure, error)}" if told and error else told


def task_figures(run: Run) -> list[str]:
    """Figures of tasks that the result has, in their order."""
    ends = (".rows", "_low", "_high", "_majority", "_chance")
    found = [key for key in run.of("result") if "." in key and not key.startswith("speed.") and not key.endswith(ends)]
    return found


def telling(figures: Iterable[str]) -> list[str]:
    """Of figures of tasks those that say most: others go with one of them."""
    figures = list(figures)
    told = {figure.partition(".")[0] for figure in figures if not figure.endswith(_ALIKE)}
    return [figure for figure in figures if not figure.endswith(_ALIKE) or figure.partition(".")[0] not in told]


def tasks(run: Run, key: str, general: bool = False) -> Table | None:
    """Every task before and after, with 95% intervals; with ``general`` those of general text alone, else all others."""
    figures = [figure for figure in task_figures(run) if (figure.partition(".")[0] in general_tasks()) == general]
    if not figures:
        return None
    models = [model for model in MODELS if run.of(model)]
    head = ["task", "figure", "better", *(f"{MODELS[model]} (95%)" for model in models), "baseline", "rows"]
    if general:
        head = [*head[:-2], "result against base", "rows"]
    rows = []
    for figure in figures:
        task, _, metric = figure.partition(".")
        cells = [interval(run.of(model), figure) for model in models]
        count = run.of("result").get(f"{task}.rows")
        last = _change(run, figure) if general else number(figure, _baseline(run, figure))
        told = f"{count:,.0f}" if count else ""
        rows.append([task, metric_name(metric), "↓" if run.better(figure) == "lower" else "↑", *cells, last, told])
    title = "General ability: what was forgotten" if general else "Tasks, before and after"
    note = "" if general else "Baseline: the most frequent answer, always given; of ROUGE, the reference answer of another row."
    return Table(key, title, head, rows, note, numbers=3)


def interval(figures: Mapping[str, Any], figure: str) -> str:
    """A figure with its 95% interval, where it has one."""
    if figures.get(figure) is None:
        return ""
    ends = [figures.get(f"{figure}_low"), figures.get(f"{figure}_high")]
    told = number(figure, figures[figure])
    return told if None in ends else f"{told} ({number(figure, ends[0])} to {number(figure, ends[1])})"


def _baseline(run: Run, figure: str) -> float | None:
    result = run.of("result")
    found: float | None = result.get(f"{figure}_majority", result.get(f"{figure}_chance"))
    return found


def _change(run: Run, figure: str) -> str:
    base, result = run.of("base").get(figure), run.of("result").get(figure)
    return f"{result / base - 1:+.1%}" if base and result is not None else ""


def _ends(figures: Mapping[str, Any], name: str) -> list[float]:
    """Of the interval; the figure itself where it has none."""
    ends = [figures.get(f"{name}_{end}") for end in ("low", "high")]
    return [float(end if finite(end) else figures[name]) for end in ends]  # type: ignore[arg-type]


def dots(run: Run, key: str) -> Picture | None:
    """Scores of tasks with their intervals: base, dense LoRA, result, one line a figure."""
    figures = [figure for figure in task_figures(run) if number(figure, 0.5).endswith("%")]
    if not figures:
        return None
    models = [model for model in MODELS if run.of(model)]
    names, left = labels(label(name) for name in figures)
    figure, axis = sheet(70 + 30 * len(figures), left=left)
    for index, model in enumerate(models):
        found = run.of(model)
        points = [(place, found[name], name) for place, name in enumerate(figures) if finite(found.get(name))]
        if not points:
            continue
        ys = [place + 0.22 * (index - (len(models) - 1) / 2) for place, _, _ in points]
        xs = [100 * value for _, value, _ in points]
        ends = [_ends(found, name) for _, _, name in points]
        errors = [[x - 100 * low for x, (low, _) in zip(xs, ends, strict=True)]]
        errors.append([100 * high - x for x, (_, high) in zip(xs, ends, strict=True)])
        colour = SERIES[index]
        drawn = axis.errorbar(xs, ys, xerr=errors, fmt=MARKERS[index], color=colour, elinewidth=1, label=MODELS[model])
        mark(drawn.lines[0], f"dots-{model}")
    for place, name in enumerate(figures):
        if (baseline := _baseline(run, name)) is not None:
            axis.plot([100 * baseline] * 2, [place - 0.4, place + 0.4], **LEVEL)
    axis.set_yticks(range(len(figures)), names)
    axis.set_ylim(len(figures) - 0.4, -0.6 - 0.5)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("%")
    axis.legend(loc="upper center", ncols=len(models), bbox_to_anchor=(0.36, 1.0 + 24 / (30 * len(figures) + 14)))
    title = "Tasks with their intervals"
    return Picture(key, title, svg(figure, key, title), "95% intervals; dotted: the baseline.")
