"""Curves of a run, or of several in one picture: loss, kept ratio, validation figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from statistics import median
from typing import Any

from slimtune.report.files import kept as kept_of
from slimtune.report.ink import FAINT, LEVEL, SERIES, Picture, legend, look, mark, room, sheet, smooth, svg, thin
from slimtune.report.quality import Table
from slimtune.report.run import Points, Run
from slimtune.report.words import label, number, share

Line = tuple[str, Points]
_POINTS = 60
"""Of a line with markers; of many lines fewer, so that they can be told apart."""
_ROWS = 100
"""Of a table, at most."""


def loss(runs: Sequence[Run], key: str) -> Picture | None:
    """Training loss of the adapt turns (running mean, single steps faint where one run is shown), and of dense LoRA."""
    lines: list[Line] = []
    for run in runs:
        lines.append((run.name if len(runs) > 1 else "adapt", run.line("adapt_loss")))
        if len(runs) == 1:
            lines.append(("decide (held-out rows)", run.line("decide_loss")))
            lines.append(("dense LoRA", run.line("adapt_loss", "dense_lora")))
    if not _any(lines):
        return None
    figure, axis = _sheet(runs)
    for index, name, points in _drawn(lines):
        steps, values = [step for step, _ in points], [value for _, value in points]
        window = max(1, len(values) // 40)
        if len(runs) == 1 and window > 1:
            axis.plot(*thin(steps, values), color=SERIES[index % len(SERIES)], alpha=0.25, linewidth=0.8)
        (line,) = axis.plot(*thin(steps, smooth(values, window), 200), **look(index, len(steps) == 1), label=name)
        mark(line, f"loss-{index}")
    note = "Running mean; single steps faint." if len(runs) == 1 else f"Running means of the adapt turns.{_within(axis)}"
    _finish(figure, axis, "loss, nats a token", runs)
    _cuts(axis, runs)
    title = "Training loss"
    return Picture(key, title, svg(figure, key, title), note, *_table(lines, lambda value: f"{value:.3f}"))


def _within(axis: Any) -> str:
    """Cut off what lies far above where most lines are, and tell of what: a run that went astray would flatten the others."""
    tops = {str(line.get_label()): float(max(line.get_ydata())) for line in axis.get_lines()}
    top = 1.5 * median(tops.values())
    out = {name: most for name, most in tops.items() if most > top}
    if not out:
        return ""
    axis.set_ylim(top=top)
    return f" Beyond the picture: {', '.join(f'{name}, to {most:.2f}' for name, most in out.items())}."


def kept(runs: Sequence[Run], key: str) -> Picture | None:
    """The kept ratio against its target, in per cent of what the budget is of."""
    lines: list[Line] = []
    shown = 2 * max((run.cut or 0 for run in runs), default=0)
    short = 0 < shown < max(len(run.main) for run in runs) / 4  # drawn whole, its search would be a line at the edge
    for run in runs:
        name = run.name if len(runs) > 1 else "used" if run.experts else "kept"
        lines.append((name, [(step, 100 * value) for step, value in run.line("kept")]))
    if len(runs) == 1 and (target := runs[0].line("decide_target")):
        lines.append(("target", [(step, 100 * value) for step, value in target]))
        lines.append(("sampled", [(step, 100 * value) for step, value in runs[0].line("decide_sampled")]))
    lines = [(name, points[:shown] if short else points) for name, points in lines]
    if not _any(lines):
        return None
    figure, axis = _sheet(runs)
    for index, name, points in _drawn(lines):
        style = {"drawstyle": "steps-post"} if name != "sampled" else {"linewidth": 0.8}
        xs, ys = thin([step for step, _ in points], [value for _, value in points], 200)
        (line,) = axis.plot(xs, ys, **look(index, len(xs) == 1), label=name, **style)
        mark(line, f"kept-{index}")
    of = {run.recipe.get("budget", {}).get("of", "total") for run in runs}
    what = "all parameters" if of == {"total"} else "the blocks" if of == {"block"} else "the budget"
    goals = {100 * run.recipe["budget"]["keep"] for run in runs if run.recipe and run.recipe.get("method") != "finetune"}
    for goal in goals:
        axis.axhline(goal, **LEVEL)
    _finish(figure, axis, f"% of {what}", runs)
    _cuts(axis, runs)
    note = f"Dotted: the budget, {', '.join(f'{goal:g}%' for goal in sorted(goals))}." if goals else ""
    if short:
        note += f" The first {shown} steps: after the cut nothing changes."
    if routed := [run.name for run in runs if run.experts]:
        whose = "" if len(routed) == len(runs) else f" of {', '.join(routed)}"
        note += f" What a token uses{whose}: more is stored."
    title = "Used by a token, against target" if len(routed) == len(runs) else "Kept ratio against target"
    return Picture(key, title, svg(figure, key, title), note, *_table(lines, lambda value: f"{value:.2f}"))


def validation(runs: Sequence[Run], figure_name: str, key: str) -> Picture | None:
    """A validation figure at the steps at which it was taken, with the level of the base where it is known."""
    lines: list[Line] = []
    for run in runs:
        lines.append((run.name if len(runs) > 1 else "this run", run.line(f"valid_{figure_name}")))
        if len(runs) == 1:
            lines.append(("dense LoRA", run.line(f"valid_{figure_name}", "dense_lora")))
    if not _any(lines):
        return None
    figure, axis = _sheet(runs)
    most = max(20, _POINTS // len(runs))
    factor = 100 if number(figure_name, 0.5).endswith("%") else 1
    for index, name, points in _drawn(lines):
        some = points[:: -(-len(points) // most)] + points[-1:] if len(points) > most else points
        (line,) = axis.plot(
            [step for step, _ in some],
            [factor * value for _, value in some],
            **look(index, points=True),
            label=name,
        )
        mark(line, f"valid-{index}")
    levels = _levels(runs, figure_name)
    for level in levels:
        axis.axhline(factor * level, **LEVEL)
    values = [value for _, points in lines for _, value in points] + levels
    if figure_name in ("ppl",) and min(values) > 0 and max(values) / min(values) > 8:
        axis.set_yscale("log")
        _plain_log(axis)
    name = label(figure_name).removesuffix(", test")
    _finish(figure, axis, f"{name}, %" if factor == 100 else name, runs)
    _cuts(axis, runs)
    own = {(run.summary.get("data") or {}).get("valid") for run in runs}
    rows = "validation rows" if "." in figure_name or len(own) < 2 else "each run's own validation rows, which differ"
    note = f"On {rows}, present hard masks." + (f" Dotted: the base, {number(figure_name, levels[0])}." if levels else "")
    title = f"{name[0].upper() + name[1:]} through the run" if figure_name == "ppl" else name
    return Picture(key, title, svg(figure, key, title), note, *_table(lines, lambda value: number(figure_name, value)))


def followed(runs: Iterable[Run]) -> list[str]:
    """Validation figures of tasks that any run has, in their order."""
    every = dict.fromkeys(chain.from_iterable(run.keys for run in runs))
    keys = [key for key in every if key.startswith("valid_") and "." in key]
    return [key.removeprefix("valid_") for key in keys if not key.endswith((".rows", "_low", "_high", "_majority", "_chance"))]


def evaluations(run: Run, key: str) -> Table | None:
    """All validation figures of a run, step by step."""
    figures = [figure for figure in ("ppl", *followed([run])) if any(f"valid_{figure}" in row for row in run.main)]
    rows = [
        [
            f"{step:,}",
            row["phase"],
            share(kept_of(row)),
            *(number(figure, row.get(f"valid_{figure}")) for figure in figures),
        ]
        for step, row in enumerate(run.main, 1)
        if any(f"valid_{figure}" in row for figure in figures)
    ]
    rows = rows[(len(rows) - 1) % (every := -(-len(rows) // _ROWS)) :: every] if rows else []
    part = "used by a token" if run.experts else "kept"
    head = ["step", "phase", part, *(label(figure).removesuffix(", test") for figure in figures)]
    return Table(key, "Validation figures", head, rows, "On validation rows, present hard masks.", numbers=2) if rows else None


def _levels(runs: Sequence[Run], figure: str) -> list[float]:
    """Of the base on validation rows, where one was measured; of several runs only if all have the same."""
    found: list[float] = []
    for run in runs:
        value = run.stages.get("valid", {}).get("dense", {}).get(figure)
        value = run.of("base").get("valid_ppl") if value is None and figure == "ppl" else value
        if value is None:
            return []
        found.append(float(value))
    return found[:1] if max(found) - min(found) <= 1e-3 * abs(max(found)) else []


def _any(lines: Sequence[Line]) -> bool:
    return any(points for _, points in lines)


def _drawn(lines: Sequence[Line]) -> list[tuple[int, str, Points]]:
    """Lines that have points, with their numbers: a run looks the same in every picture, whatever others lack."""
    return [(index, name, points) for index, (name, points) in enumerate(lines) if points]


def _sheet(runs: Sequence[Run]) -> tuple[Any, Any]:
    """Of several runs with room for their names."""
    more = room(len(runs)) if len(runs) > 1 else 0
    return sheet(230 + more, bottom=36 + more)


def _finish(figure: Any, axis: Any, name: str, runs: Sequence[Run]) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set(xlabel="step", title=name)
    lines = [line for line in axis.get_lines() if (line.get_gid() or "").startswith("mark-")]
    if len(runs) > 1:
        legend(figure, lines, [line.get_label() for line in lines])
    elif len(lines) > 1:
        axis.legend(handles=lines, loc="best")


def _plain_log(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _cuts(axis: Any, runs: Sequence[Run]) -> None:
    """A line where the model was cut, if that is at the same step in all runs."""
    cuts = {run.cut for run in runs}
    if len(cuts) == 1 and (cut := cuts.pop()):
        axis.axvline(cut + 0.5, color=FAINT, linewidth=1)
        fixed = "experts fixed" if all(run.experts for run in runs) else "cut"
        axis.annotate(fixed, (cut + 0.5, 1), xycoords=("data", "axes fraction"), xytext=(3, -9), textcoords="offset points")


def _table(lines: Sequence[Line], told: Callable[[float], str], most: int = 24) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the lines' values at some steps, the last among them."""
    lines = [line for line in lines if line[1]]
    steps = sorted(set().union(*([step for step, _ in points] for _, points in lines)))
    every = -(-len(steps) // most)
    chosen = steps[(len(steps) - 1) % every :: every]
    shown = set(chosen)
    by_step = [{step: value for step, value in points if step in shown} for _, points in lines]
    rows = [[str(step), *(told(points[step]) if step in points else "" for points in by_step)] for step in chosen]
    return ["step", *(name for name, _ in lines)], rows
