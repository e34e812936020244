"""Several runs beside one another: quality against size, a table, and where their Plans differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from slimtune.report.ink import INK, MARKERS, SERIES, Picture, look, mark, sheet, svg
from slimtune.report.quality import Table, interval, task_figures
from slimtune.report.run import Run
from slimtune.report.shape import NAMES
from slimtune.report.verdict import decode_ratio
from slimtune.report.words import label, millions, number
from slimtune.structure.axes import FFN, KV_GROUP


def against_size(runs: Sequence[Run], figure_name: str, key: str) -> Picture | None:
    """A quality figure of every run against its parameters; bases and dense LoRA as open marks."""
    points = [(run, run.of("result").get("parameters"), run.of("result").get(figure_name)) for run in runs]
    known = [(run, size, value) for run, size, value in points if size and value is not None and math.isfinite(value)]
    if len(known) < 2:
        return None
    figure, axis = sheet(260, left=52, bottom=36)
    factor = 100 if number(figure_name, 0.5).endswith("%") else 1
    for index, (run, size, value) in enumerate(known):
        ends = [run.of("result").get(f"{figure_name}_{end}") for end in ("low", "high")]
        if None not in ends:
            axis.plot(
                [size, size],
                [factor * float(end) for end in ends if end is not None],
                color=SERIES[index % len(SERIES)],
                linewidth=1,
            )
        style = {**look(index, points=True), "linestyle": ""}
        (drawn,) = axis.plot([size], [factor * value], label=run.name, markersize=7, **style)
        mark(drawn, f"size-{index}")
    others = {
        (name, run.of(model).get("parameters"), run.of(model).get(figure_name))
        for run, _, _ in known
        for model, name in (("base", "base"), ("dense_lora", "dense LoRA"))
    }
    shown = [(name, size, value) for name, size, value in others if size and value is not None]
    limit = 3 * max(value for _, _, value in known)
    for name, size, value in sorted(shown):
        if value > limit and run_lower(known, figure_name):
            continue  # an untuned base far above all would flatten the rest
        marker = MARKERS[0] if name == "base" else MARKERS[1]
        axis.plot([size], [factor * value], marker, markerfacecolor="none", color=INK)
        axis.annotate(name, (size, factor * value), xytext=(-6, 5), textcoords="offset points", ha="right")
    from matplotlib.ticker import FuncFormatter

    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: millions(value)))
    axis.set_xlabel("parameters")
    axis.set_title(label(figure_name) + (", %" if factor == 100 else ""))
    axis.margins(0.12)
    axis.legend(loc="best")
    title = f"Quality against size: {label(figure_name)}"
    rows = [[run.name, f"{size:,}", interval(run.of("result"), figure_name)] for run, size, value in known]
    note = "Better: lower." if run_lower(known, figure_name) else "Better: higher."
    return Picture(key, title, svg(figure, key, title), note, ["run", "parameters", label(figure_name)], rows)


def run_lower(known: Sequence[tuple[Run, Any, Any]], figure: str) -> bool:
    """Whether a figure is the better the lower it is."""
    return known[0][0].better(figure) == "lower"


def beside(runs: Sequence[Run], key: str) -> Table:
    """A row for each figure, a column for each run; with those of speed that a bench took."""
    own = ["parameters", "block_ratio", "bytes", "ppl", "valid_ppl", "accuracy", "seconds", "memory"]
    figures = [*own, *dict.fromkeys(figure for run in runs for figure in task_figures(run))]
    rows = [[label(figure), *(_cell(run, figure) for run in runs)] for figure in figures]
    rows = [row for row in rows if any(row[1:])]
    rows.append(["decodes, times as fast as its base", *map(_decodes, runs)])
    settings = [("method", "method"), ("keep", "budget.keep"), ("seed", "seed"), ("steps", "recover.steps")]
    told = [[name, *(_setting(run, path) for run in runs)] for name, path in settings]
    rows = [
        *told,
        *(row for row in rows if any(row[1:])),
        ["Plan", *(run.plan.digest[:12] if run.plan else "" for run in runs)],
    ]
    rows.append(["test data", *(str(run.summary.get("data", {}).get("test", ""))[:12] for run in runs)])
    note = ""
    if len({row for row in rows[-1][1:] if row}) > 1:
        note = "Test data differ between these runs: their figures on test rows do not compare."
    return Table(key, "Side by side", ["", *(run.name for run in runs)], rows, note)


def _cell(run: Run, figure: str) -> str:
    error = run.of("result").get(f"{figure}_se")
    told = interval(run.of("result"), figure)
    return f"{told} ± {number(figure, error)}" if told and error else told


def _decodes(run: Run) -> str:
    found = decode_ratio(run.bench["ratios"]) if run.bench else None
    return f"{found['faster']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else ""


def _setting(run: Run, path: str) -> str:
    value: Any = run.recipe
    for part in path.split("."):
        value = value.get(part, "") if isinstance(value, dict) else ""
    return str(value)


def plan_differences(one: Run, other: Run, key: str) -> tuple[Picture, Table] | None:
    """Layer by layer: widths of both, and units that only one of them keeps; None where they do not compare."""
    if one.plan is None or other.plan is None or one.plan.full != other.plan.full:
        return None
    layers = range(len(one.plan.full))
    figure, axes = sheet(250, rows=2, sharex=True, hspace=24)
    rows = [[str(layer)] for layer in layers]
    for axis, name in zip(axes, (FFN, KV_GROUP), strict=True):
        kept = [(set(one.plan.kept[layer][name]), set(other.plan.kept[layer][name])) for layer in layers]
        mine, theirs = [len(a - b) for a, b in kept], [len(b - a) for a, b in kept]
        for sign, values, colour, hatch in ((1, mine, SERIES[0], ""), (-1, theirs, SERIES[1], "////")):
            bars = axis.bar(
                layers, [sign * value for value in values], 0.8, color=colour, edgecolor=INK, linewidth=0.4, hatch=hatch
            )
            for bar in bars:
                mark(bar, f"only-{name}")
        axis.axhline(0, color=INK, linewidth=0.8)
        both, any_of = sum(len(a & b) for a, b in kept), sum(len(a | b) for a, b in kept)
        axis.set_title(f"{NAMES[name]}: {both / max(1, any_of):.0%} of what either keeps is kept by both")
        axis.grid(visible=False, axis="x")
        for row, (a, b), more, less in zip(rows, kept, mine, theirs, strict=True):
            row += [f"{len(a):,} / {len(b):,}", f"{more:,} / {less:,}"]
    axes[1].set_xlabel("layer")
    title = f"Plans: {one.name} against {other.name}"
    head = ["layer", "MLP width, each", "only in one, each", "KV groups, each", "only in one, each"]
    note = f"Up: units that only {one.name} keeps; down: only {other.name}."
    picture = Picture(key, title, svg(figure, key, title), note)
    return picture, Table(f"{key}-table", title, head, rows)
