"""Several runs beside one another: quality against size, a table, and where their Plans differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slimtune.report.ink import (
    HATCHES,
    INK,
    SERIES,
    Picture,
    grey,
    labels,
    legend,
    look,
    mark,
    room,
    scale,
    sheet,
    svg,
)
from slimtune.report.quality import SIZES, Table, interval, task_figures
from slimtune.report.run import Figures, Run
from slimtune.report.shape import NAMES, whole
from slimtune.report.verdict import fastest, same_rows
from slimtune.report.words import finite, label, millions, number
from slimtune.train.task_figures import OF_EXPERTS

_COSTS = ("seconds", "memory")
"""What two runs of the same model differ in."""
_MOST = 3
"""Models of a kind without a run of their own that have a column."""
_SPEEDS = {"prefill": "reads prompts", "first token": "first token", "decode": "decodes"}
_OPEN = {"markersize": 7, "markerfacecolor": "none", "markeredgewidth": 1.6}
"""Points that do not hide one another."""


def against_size(runs: Sequence[Run], figure_name: str, key: str) -> Picture | None:
    """A quality figure of every run against its parameters; bases and dense LoRA as crosses."""
    points: dict[str, tuple[Any, Any]] = {
        run.name: (_used(run.of("result")), run.of("result").get(figure_name)) for run in runs
    }
    known = [run for run in runs if all(finite(value) for value in points[run.name])]
    if len(known) < 2:
        return None
    more = room(len(known))
    figure, axis = sheet(260 + more, left=52, bottom=36 + more)
    factor = 100 if number(figure_name, 0.5).endswith("%") else 1
    for index, run in enumerate(runs):
        if run in known:
            size, value = points[run.name]
            _point(axis, run, figure_name, (size, factor * value), factor, index)
    lower = known[0].better(figure_name) == "lower"
    _uncut(axis, known, figure_name, factor, 3 * max(points[run.name][1] for run in known) if lower else math.inf)
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(4))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: millions(value)))
    experts = _any_experts(known)
    axis.set_xlabel("parameters that a token uses" if experts else "parameters")
    axis.set_title(label(figure_name) + (", %" if factor == 100 else ""))
    axis.margins(0.12)
    lines = [line for line in axis.get_lines() if line.get_gid()]
    legend(figure, lines, [line.get_label() for line in lines])
    title = f"Quality against size: {label(figure_name)}"
    models = [*((run.name, run.of("result")) for run in known), *((name, run.of(model)) for name, model, run in uncut(known))]
    sizes = ("parameters", "active_parameters") if experts else ("parameters",)
    rows = [[name, *_sizes(each, sizes), interval(each, figure_name)] for name, each in models]
    rows = [row for row in rows if all(row)]
    note = f"Better: {'lower' if lower else 'higher'}." + (" Of experts more is stored than a token uses." if experts else "")
    return Picture(key, title, svg(figure, key, title), note, ["run", *map(label, sizes), label(figure_name)], rows)


def _used(figures: Figures) -> Any:
    """Parameters that a token uses: all, but of experts."""
    return figures.get("active_parameters", figures.get("parameters"))


def _sizes(figures: Figures, names: Sequence[str]) -> list[str]:
    values = {"parameters": figures.get("parameters"), "active_parameters": _used(figures)}
    return [number(name, values[name]) for name in names]


def _point(axis: Any, run: Run, figure: str, place: tuple[float, float], factor: int, index: int) -> None:
    """One run, with the interval of its figure where it has one."""
    ends = [run.of("result").get(f"{figure}_{end}") for end in ("low", "high")]
    if all(map(finite, ends)):
        heights = [factor * float(end) for end in ends if end is not None]
        axis.plot([place[0]] * 2, heights, color=SERIES[index % len(SERIES)], linewidth=1)
    (drawn,) = axis.plot(*([part] for part in place), label=run.name, **{**look(index, points=True), "linestyle": "", **_OPEN})
    mark(drawn, f"size-{index}")


def uncut(runs: Sequence[Run]) -> list[tuple[str, str, Run]]:
    """Bases and dense LoRA, each once: what to call it, the model, a run that has it. Of many dense LoRA the first ones."""
    found: list[tuple[str, str, Run]] = []
    for model, called in (("base", "base"), ("dense_lora", "dense LoRA")):
        seen: dict[Any, Run] = {}
        for run in runs:
            if run.of(model):
                seen.setdefault(_identity(run, model), run)
        some = list(seen.values())[:_MOST]
        found += [(called if len(seen) == 1 else f"{called} of {run.name}", model, run) for run in some]
    return found


def _identity(run: Run, model: str) -> Any:
    """What tells it from others: of a base its weights and rows; else its figures, which machines round in their own ways."""
    told = run.summary.get("weights"), (run.summary.get("data") or {}).get("test")
    if model == "base" and all(told):
        return told
    figures = {name: value for name, value in run.of(model).items() if name not in _COSTS and "speed." not in name}
    return told[1], *((name, f"{value:.3g}") for name, value in sorted(figures.items()) if finite(value))


def _uncut(axis: Any, runs: Sequence[Run], figure: str, factor: int, limit: float) -> None:
    """Bases and dense LoRA as crosses; an untuned base beyond ``limit`` would flatten the rest."""
    for name, model, run in uncut(runs):
        size, value = run.of(model).get("parameters"), run.of(model).get(figure)
        if size is not None and value is not None and finite(size) and finite(value) and value <= limit:
            axis.plot([size], [factor * value], "+" if model == "base" else "x", color=INK)
            axis.annotate(name, (size, factor * value), xytext=(-6, 5), textcoords="offset points", ha="right")


def beside(runs: Sequence[Run], key: str) -> Table:
    """A row for each figure, a column for each run and for what they were cut from; with speeds that a bench took."""
    own, experts = [*SIZES, "ppl", "valid_ppl", "accuracy", "seconds", "memory"], _any_experts(runs)
    figures = [*own, *dict.fromkeys(figure for run in runs for figure in task_figures(run))]
    others = uncut(runs)
    models = [*((run, "result") for run in runs), *((run, model) for _, model, run in others)]
    rows = [[label(figure, experts), *(_cell(run.of(model), figure, experts) for run, model in models)] for figure in figures]
    blank = [""] * len(others)
    settings = [("method", "method"), ("keep", "budget.keep"), ("seed", "seed"), ("steps", "recover.steps")]
    speeds = [[f"{name}, times as fast as its base", *(_faster(run, what) for run in runs)] for what, name in _SPEEDS.items()]
    told = [[name, *(_setting(run, path) for run in runs), *blank] for name, path in settings]
    rows = [
        *told,
        *rows,
        *([*row, *blank] for row in speeds),
        ["guards", *map(_guards, runs), *blank],
        ["Plan", *(run.plan_digest[:12] for run in runs), *blank],
        ["test data", *(str(run.summary.get("data", {}).get("test", ""))[:12] for run in runs), *blank],
    ]
    note = "" if same_rows(runs) else "Test data differ between these runs: their figures on test rows do not compare."
    head = ["", *(run.name for run in runs), *(name for name, _, _ in others)]
    return Table(key, "Side by side", head, [row for row in rows if any(row[1:])], note)


def _guards(run: Run) -> str:
    out = dict.fromkeys(ruling["guard"] for ruling in run.summary.get("guard", ()) if not ruling["holds"])
    return f"out: {', '.join(out)}" if out else "all hold" if run.summary.get("guard") else ""


def _cell(figures: Figures, figure: str, experts: bool) -> str:
    """A figure with its error; beside experts it is told of other models too that a token uses all of them."""
    error = figures.get(f"{figure}_se")
    figures = {**{name: figures[stored] for name, stored in OF_EXPERTS.items() if experts and stored in figures}, **figures}
    told = interval(figures, figure)
    return f"{told} ± {number(figure, error)}" if told and error else told


def _faster(run: Run, what: str) -> str:
    found = fastest([ratio for ratio in run.bench["ratios"] if ratio["what"] == what]) if run.bench else None
    return f"{found['faster']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else ""


def _setting(run: Run, path: str) -> str:
    if run.recipe.get("method") == "finetune":  # which cuts nothing
        path = {"budget.keep": "", "recover.steps": "train.steps"}.get(path, path)
    value: Any = run.recipe
    for part in path.split("."):
        value = value.get(part, "") if isinstance(value, dict) else ""
    return str(value)


def shapes(runs: Sequence[Run], key: str) -> Picture | None:
    """The kept part of every layer, a line for each run, darker for more."""
    known = [run for run in runs if run.plan]
    if len(known) < 2:
        return None
    parts = {name: [_parts(run, name) for run in known] for name in NAMES}
    of = ", of experts: that some expert has" if _any_experts(known) else ""
    note = f"Fields: the part of the layer that is kept{of}."
    return _strips([run.name for run in known], parts, key, "Kept part of every layer", note, "kept")


def _any_experts(runs: Sequence[Run]) -> bool:
    return any(run.experts for run in runs)


def _parts(run: Run, axis: str) -> list[float]:
    assert run.plan is not None
    return [len(kept[axis]) / full[axis] for kept, full in zip(run.plan.kept, run.plan.full, strict=True)]


def _strips(
    names: Sequence[str], parts: Mapping[str, Sequence[Sequence[float]]], key: str, title: str, note: str, what: str
) -> Picture:
    """Two pictures, one an axis, of lines of layers."""
    short, left = labels(names)
    figure, axes = sheet(66 + 2 * 24 * len(names) + 30, rows=2, sharex=True, left=left, hspace=28)
    for axis, (name, lines) in zip(axes, parts.items(), strict=True):
        longest = max(map(len, lines))
        padded = [[*line, *[float("nan")] * (longest - len(line))] for line in lines]
        grey(axis, padded, f"{what}-{name}")
        axis.set_title(NAMES[name])
        axis.set_yticks(range(len(names)), short)
    axes[1].set_xlabel("layer")
    whole(axes[1].xaxis, 9)
    scale(figure)
    rows = [
        [run, *(f"{min(lines[index]):.0%} to {max(lines[index]):.0%}" for lines in parts.values())]
        for index, run in enumerate(names)
    ]
    return Picture(key, title, svg(figure, key, title), note, ["run", *(f"{NAMES[name]}, by layer" for name in parts)], rows)


def comparable(one: Run, other: Run) -> bool:
    """Whether their Plans are of the same base."""
    return one.plan is not None and other.plan is not None and one.plan.full == other.plan.full


def _sets(one: Run, other: Run, axis: str) -> list[tuple[set[int], set[int]]]:
    """Units of an axis that the two Plans keep, layer by layer."""
    assert one.plan is not None
    assert other.plan is not None
    return [(set(a[axis]), set(b[axis])) for a, b in zip(one.plan.kept, other.plan.kept, strict=True)]


def agreement(first: Run, others: Sequence[Run], key: str) -> Picture | None:
    """Layer by layer, how much of what either of two Plans keeps is kept by both: each run against the first."""
    if not others:
        return None
    parts = {name: [[len(a & b) / max(1, len(a | b)) for a, b in _sets(first, run, name)] for run in others] for name in NAMES}
    note = f"Of what {first.name} or the other run keeps, the part that both keep; 100%: the same units."
    return _strips([run.name for run in others], parts, key, f"Agreement with {first.name}", note, "both")


def plan_difference(one: Run, other: Run, key: str) -> Picture:
    """Layer by layer, how many units only one of two Plans keeps."""
    figure, axes = sheet(250, rows=2, sharex=True, hspace=28)
    for axis, name in zip(axes, NAMES, strict=True):
        kept = _sets(one, other, name)
        counts = [len(a - b) for a, b in kept], [-len(b - a) for a, b in kept]
        for values, colour, hatch in zip(counts, SERIES, HATCHES, strict=False):
            for bar in axis.bar(range(len(kept)), values, 0.8, color=colour, edgecolor=INK, linewidth=0.4, hatch=hatch):
                mark(bar, f"only-{name}")
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_ylim(1.1 * min(-1, *counts[1]), 1.1 * max(1, *counts[0]))
        both, either = sum(len(a & b) for a, b in kept), sum(len(a | b) for a, b in kept)
        axis.set_title(f"{NAMES[name]}: {both / max(1, either):.0%} kept by both")
        axis.grid(visible=False, axis="x")
    axes[1].set_xlabel("layer")
    whole(axes[1].xaxis, 9)
    title = f"{one.name} against {other.name}"
    note = f"Up: units that only {one.name} keeps; down: only {other.name}."
    return Picture(key, title, svg(figure, key, title), note)


def plan_table(one: Run, other: Run, key: str) -> Table:
    """The same as a table: widths of both, and units that only one keeps."""
    rows = []
    for layer, pairs in enumerate(zip(*(_sets(one, other, name) for name in NAMES), strict=True)):
        cells = [cell for a, b in pairs for cell in (f"{len(a):,} / {len(b):,}", f"{len(a - b):,} / {len(b - a):,}")]
        rows.append([str(layer), *cells])
    head = ["layer", *(cell for name in NAMES.values() for cell in (f"{name}, each", "only in one, each"))]
    return Table(key, f"{one.name} / {other.name}", head, rows)
