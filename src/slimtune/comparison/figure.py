"""Quality against size: a panel for each base and domain, a line for each method, dense LoRA as the level to reach."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slimtune.comparison.jobs import ALL, Job, Part
from slimtune.comparison.rows import DENSE, Row
from slimtune.comparison.stats import OURS, PPL, Board, boards, deviation
from slimtune.errors import UserError

STYLES = [
    ("#0072b2", "s", "--"),
    ("#d55e00", "^", "-."),
    ("#009e73", "D", ":"),
    ("#cc79a7", "v", (0, (5, 1))),
    ("#e69f00", "P", (0, (3, 1, 1, 1))),
    ("#56b4e9", "X", (0, (1, 1))),
    ("#7f7f7f", "<", (0, (5, 1, 1, 1, 1, 1))),
    ("#8c564b", ">", (0, (7, 2))),
    ("#5e4fa2", "p", (0, (2, 2))),
    ("#a6761d", "*", (0, (4, 2, 1, 2))),
]
"""Colours that colour-blind readers tell apart; markers and line styles that do without colour."""
WIDE = 2.5
"""Largest over smallest perplexity from which the axis is logarithmic: one bad method must not flatten the rest."""
LOWEST, HIGHEST = 1e-9, 1e30
"""What is drawn lies between: nothing real is beyond, and matplotlib fails near the ends of what a float holds."""

NEEDS = "needs matplotlib: pip install 'slimtune[plot]'"


def installed() -> bool:
    """Whether matplotlib is there, without which there is no figure. Nothing is imported."""
    return importlib.util.find_spec("matplotlib") is not None


def drawable(rows: Iterable[Row], asked: Iterable[Job] = (), part: Part = ALL) -> bool:
    """Whether a method has a perplexity at a budget."""
    return any(_points(board) for board in boards(rows, asked, part))


def draw(rows: Iterable[Row], file: Path, asked: Iterable[Job] = (), part: Part = ALL) -> None:
    """Write the figure as SVG; the same rows give the same bytes.

    Raises:
        UserError: matplotlib is missing, no method has a perplexity at a budget, or the file cannot be written.
    """
    plt = _pyplot()
    shown = [board for board in boards(rows, asked, part) if _points(board)]
    if not shown:
        raise UserError("there is nothing to draw: no method has a perplexity at a budget below 1; the rows miss those runs")
    styles = _styles(shown)
    with plt.rc_context({"svg.hashsalt": "slimtune", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        size = (1.9 + 4.3 * len(shown), 3.9)
        figure, axes = plt.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
        for axis, board in zip(axes[0], shown, strict=True):
            _panel(axis, board, styles)
        axes[0][0].set_ylabel("perplexity on the domain's test text")
        names = _ranked(shown)
        handles = {name: handle for axis in axes[0] for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend([handles[name] for name in names], names, loc="outside right upper", frameon=False, handlelength=4)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, format="svg", metadata={"Date": None})
        except OSError as error:
            raise UserError(f"{str(file)!r} cannot be written: {error.strerror}; choose another out") from error
        finally:
            plt.close(figure)


def _pyplot() -> Any:
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError(f"the figure {NEEDS}, then --table draws it") from error
    mpl.use("svg")
    from matplotlib import pyplot

    return pyplot


def _points(board: Board) -> dict[str, list[float]]:
    """The budgets at which each method has a perplexity that an axis holds."""
    found = {method: [keep for keep in board.keeps if _on_axis(board.of(method, keep))] for method in board.methods}
    return {method: keeps for method, keeps in found.items() if keeps}


def _on_axis(values: Mapping[int, float]) -> bool:
    return bool(values) and LOWEST <= statistics.mean(values.values()) <= HIGHEST


def _styles(shown: list[Board]) -> dict[str, tuple[Any, ...]]:
    names = [name for name in dict.fromkeys(name for board in shown for name in _points(board)) if name != OURS]
    return {OURS: ("black", "o", "-"), **{name: STYLES[index % len(STYLES)] for index, name in enumerate(names)}}


def _ranked(shown: list[Board]) -> list[str]:
    """Methods as the lines lie at the smallest budget of the first panel, the worst at the top as in the panel."""
    heights: dict[str, float] = {}
    for board in shown:
        for name, keeps in _points(board).items():
            heights.setdefault(name, statistics.mean(board.of(name, keeps[-1]).values()))
    return sorted(heights, key=lambda name: -heights[name])


def _size(board: Board, method: str, keep: float) -> float | None:
    """Millions of parameters; of other methods at that budget where the method's rows do not say; None where no row does."""
    told = {name: board.of(name, keep, "parameters") for name in (method, *board.methods)}
    sizes = {name: list(each.values()) for name, each in told.items() if _on_axis(each)}
    mine, others = sizes.get(method), [value for each in sizes.values() for value in each]
    return statistics.mean(mine or others) / 1e6 if mine or others else None


def _place(board: Board, method: str, keep: float) -> float:
    """On the axis: the size; where no row says it, as far along as the budget is among those of known sizes, or of 1."""
    if (size := _size(board, method, keep)) is not None:
        return size
    wholes = [size / other for other in board.keeps if (size := _size(board, method, other)) is not None]
    return keep * statistics.mean(wholes or [1.0])


def _panel(axis: Any, board: Board, styles: dict[str, tuple[Any, ...]]) -> None:
    points, heights = _points(board), []
    aside = _aside(board, points)
    for name, keeps in points.items():
        colour, marker, line = styles[name]
        means = [statistics.mean(board.of(name, keep).values()) for keep in keeps]
        bars = [deviation(board.of(name, keep).values()) for keep in keeps]
        ours = name == OURS
        axis.errorbar(
            [_place(board, name, keep) + aside[name] for keep in keeps],
            means,
            bars,
            label=name,
            color=colour,
            marker=marker,
            ls=line,
            lw=2.2 if ours else 1.3,
            ms=6 if ours else 5,
            mfc=colour if ours else "white",
            capsize=3,
            zorder=4 if ours else 3,
        )
        heights += means
    if _on_axis(board.of(DENSE, 1.0)):
        dense = list(board.of(DENSE, 1.0).values())
        _level(axis, statistics.mean(dense), deviation(dense))
        heights.append(statistics.mean(dense))
    _scales(axis, board, points, heights)


def _aside(board: Board, points: dict[str, list[float]]) -> dict[str, float]:
    """With one budget the methods would lie on one spot: side by side instead, the best on the left."""
    if len(board.keeps) > 1:
        return dict.fromkeys(points, 0.0)
    names = sorted(points, key=lambda name: statistics.mean(board.of(name, board.keeps[0]).values()))
    return {name: index - (len(names) - 1) / 2 for index, name in enumerate(names)}


def _level(axis: Any, mean: float, bar: float) -> None:
    axis.axhline(mean, color="black", lw=1, ls=(0, (8, 3)), zorder=2)
    if bar:
        axis.axhspan(mean - bar, mean + bar, color="black", alpha=0.12, lw=0, zorder=1)
    text = f"dense LoRA, nothing cut: {mean:.2f}"
    place = {"xycoords": ("axes fraction", "data"), "xytext": (0, -4), "textcoords": "offset points"}
    axis.annotate(text, (1, mean), **place, ha="right", va="top", fontsize=9)


def _scales(axis: Any, board: Board, points: dict[str, list[float]], heights: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

    low, high = min(heights), max(heights)
    if high > WIDE * low:
        axis.set_yscale("log")
        ticks = [tick for tick in MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(low, high) if tick >= low * 0.9 and tick > 0]
        axis.set_yticks(sorted({*ticks, math.floor(low)}))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(low * (low / high) ** 0.12, high * (high / low) ** 0.06)
    else:
        axis.set_ylim(low - 0.14 * (high - low or low), high + 0.08 * (high - low or low))
    axis.set_xticks(*_ticks(board, points))
    axis.margins(x=0.08)
    axis.set_xlabel("parameters kept")
    axis.set_title(_title(board), loc="left", fontsize=11)
    axis.grid(axis="y", lw=0.4, color="0.85")


def _ticks(board: Board, points: dict[str, list[float]]) -> tuple[list[float], list[str]]:
    """Places and labels of the budgets: the median size over methods, where the rows tell sizes, above the budget."""
    places, labels = [], []
    for keep in sorted({keep for each in points.values() for keep in each}):
        names = [name for name, each in points.items() if keep in each]
        places.append(statistics.median(_place(board, name, keep) for name in names))
        told = _size(board, names[0], keep) is not None
        labels.append(f"{places[-1]:,.1f} M\n{keep:.0%}" if told else f"{keep:.0%}")
    return places, labels


def _title(board: Board) -> str:
    base = [row["base_value"] for row in board.rows if row["metric"] == PPL and row.get("base_value")]
    untuned = f" (untuned {base[0]:.1f})" if base else ""
    return f"{board.domain}, {board.base}{untuned}"
