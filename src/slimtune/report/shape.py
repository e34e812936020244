"""The shape of the model: what stayed of each layer, and how the decision moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slimtune.report import experts
from slimtune.report.files import Row
from slimtune.report.ink import FAINT, HATCHES, INK, SERIES, Picture, grey, look, mark, scale, sheet, svg, thin
from slimtune.report.run import Run
from slimtune.report.words import finite
from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.structure.plan import Plan

NAMES = {FFN: "MLP width", KV_GROUP: "KV groups"}
_COLUMNS = 120
"""Most columns of a picture of steps."""


def final(run: Run, key: str) -> Picture | None:
    """Kept MLP width and KV groups of every layer, as bars before the outline of what was there; None before a decision."""
    if run.plan is None:
        return None
    if run.plan.experts:
        return experts.final(run.plan, key)
    plan, layers = run.plan, range(len(run.plan.kept))
    figure, axes = sheet(250, rows=2, sharex=True, hspace=24)
    for axis, name, colour, hatch in zip(axes, (FFN, KV_GROUP), SERIES, HATCHES, strict=False):
        full = [plan.full[layer][name] for layer in layers]
        kept = [len(plan.kept[layer][name]) for layer in layers]
        axis.bar(layers, full, width=0.8, fill=False, edgecolor=FAINT, linewidth=0.7)
        bars = axis.bar(layers, kept, width=0.8, color=colour, edgecolor=INK, linewidth=0.4, hatch=hatch)
        for bar in bars:
            mark(bar, f"kept-{name}")
        axis.set_title(f"{NAMES[name]}: {sum(kept):,} of {sum(full):,} stay ({sum(kept) / sum(full):.0%})")
        axis.set_ylim(0, 1.05 * max(full))
        axis.grid(visible=False, axis="x")
        whole(axis.yaxis, 4)
    whole(axes[1].xaxis, 9)
    axes[1].set_xlabel("layer")
    gone = sum(1 for layer in layers if layer not in plan.layers)
    note = "Outlines: the base." + (f" {gone} layers are gone as a whole." if gone else "")
    rows = [[str(layer), *(_of(plan, layer, name) for name in (FFN, KV_GROUP))] for layer in layers]
    title = "Shape of the model"
    return Picture(key, title, svg(figure, key, title), note, ["layer", "MLP width", "KV groups"], rows)


def _of(plan: Plan, layer: int, axis: str) -> str:
    return f"{len(plan.kept[layer][axis]):,} of {plan.full[layer][axis]:,}"


def whole(axis: Any, most: int) -> None:
    """Ticks at whole numbers, at most about ``most``."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True))


def moving(run: Run, key: str) -> Picture | None:
    """The kept part of every layer through the steps of the search; None where no rows tell of it."""
    units = _full(run)
    rows = [(step, row) for step, row in enumerate(run.main) if units and _tells(row, units)]
    if len(rows) < 2:
        return None
    rows = rows[:: -(-len(rows) // _COLUMNS)]
    figure, axes = sheet(250, rows=2, sharex=True, hspace=24, right=14)
    ends = (rows[0][0] + 0.5, rows[-1][0] + 1.5)
    for axis, name in zip(axes, (FFN, KV_GROUP), strict=True):
        full = units[name]
        parts = [[row[f"widths_{name}"][layer] / full[layer] for _, row in rows] for layer in range(len(full))]
        extent = (*ends, len(full) - 0.5, -0.5)
        grey(axis, parts, f"moving-{name}", extent)
        lowest = min(map(min, parts))
        axis.set_title(f"{NAMES[name]}: every layer kept {lowest:.0%} or more")
        axis.set_ylabel("layer")
        whole(axis.yaxis, 5)
    whole(axes[1].xaxis, 7)
    axes[1].set_xlabel("step")
    scale(figure)
    title = "How the decision moved"
    table = [[str(step + 1), *(_range(row, name) for name in (FFN, KV_GROUP))] for step, row in _some(rows)]
    head = ["step", "MLP widths, least to most", "KV groups, least to most"]
    return Picture(
        key,
        title,
        svg(figure, key, title),
        "Fields: the part of the layer that was kept.",
        head,
        table,
    )


def _tells(row: Row, units: Mapping[str, Sequence[int]]) -> bool:
    """Whether a row has widths of all layers."""
    told = {name: row.get(f"widths_{name}") for name in NAMES}
    return all(
        isinstance(widths, list) and len(widths) == len(units[name]) and all(map(finite, widths))
        for name, widths in told.items()
    )


def _full(run: Run) -> dict[str, list[int]]:
    """Units of the base's layers by axis: of the Plan, or before there is one of what the run wrote when it began."""
    if run.plan is None:
        return dict(run.stages.get("units") or {})
    return {name: [layer[name] for layer in run.plan.full] for name in NAMES}


def changing(run: Run, key: str) -> Picture | None:
    """Units that were removed and that came back, step by step: how much the decision still changes."""
    rows = [(step + 1, row) for step, row in enumerate(run.main) if finite(row.get("reopened")) and finite(row.get("closed"))]
    if len(rows) < 2:
        return None
    figure, axis = sheet(190)
    for index, (name, told) in enumerate((("closed", "removed"), ("reopened", "came back"))):
        steps, parts = thin([step for step, _ in rows], [100 * row[name] for _, row in rows])
        (line,) = axis.plot(steps, parts, **look(index), label=told)
        mark(line, name)
    axis.set_ylim(bottom=0)
    axis.set(xlabel="step", ylabel="% of all units")
    axis.legend(loc="best")
    whole(axis.xaxis, 7)
    back = sum(row["reopened"] for _, row in rows)
    last = rows[-1][1]["reopened"]
    note = f"Returns, summed over the steps of the search: {back:.1%} of all units; at the last step {last:.2%}."
    title = "How much it still changes"
    table = [[str(step), f"{100 * row['closed']:.2f}", f"{100 * row['reopened']:.2f}"] for step, row in _some(rows)]
    return Picture(key, title, svg(figure, key, title), note, ["step", "removed, % of units", "came back, %"], table)


def _range(row: Row, axis: str) -> str:
    widths = row[f"widths_{axis}"]
    return f"{min(widths):,} to {max(widths):,}"


def _some(rows: list[tuple[int, Row]], most: int = 24) -> list[tuple[int, Row]]:
    """Evenly spaced ones, the last among them: a table is to be read."""
    step = -(-len(rows) // most)
    return rows[(len(rows) - 1) % step :: step]
