"""A model of experts in pictures: whose channels are whose, and where tokens go."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from slimtune.report.ink import FAINT, HATCHES, INK, LEVEL, SERIES, Picture, mark, sheet, svg
from slimtune.report.run import Run
from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.structure.plan import Plan

_OF_LAYER = ("shared", "routed")


def final(plan: Plan, key: str) -> Picture:
    """Channels of every layer that are shared, routed or in no expert, and KV groups, before the outline of what was there."""
    figure, axes = sheet(276, rows=2, sharex=True, hspace=26, top=38)
    layers = range(len(plan.kept))
    parts = [_parts(plan, layer) for layer in layers]
    bottom = [0] * len(parts)
    _outline(axes[0], [layer[FFN] for layer in plan.full])
    for place, name in enumerate(_OF_LAYER):
        heights = [part[place] for part in parts]
        if not any(heights):
            continue
        bars = axes[0].bar(layers, heights, 0.8, bottom, color=SERIES[2 * place], label=name, hatch=HATCHES[2 * place], **_EDGE)
        for bar in bars:
            mark(bar, f"{name}-{FFN}")
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    whole = sum(layer[FFN] for layer in plan.full)
    told = [sum(part[place] for part in parts) / whole for place in range(3)]
    named = (f"{part:.0%} {name}" for part, name in zip(told, (*_OF_LAYER, "in none"), strict=True) if part)
    axes[0].set_title(f"MLP channels: {', '.join(named)}", pad=20)
    axes[0].legend(loc="lower left", bbox_to_anchor=(-0.01, 0.98), ncols=2, handleheight=0.9)
    _groups(axes[1], plan)
    note = f"{words(plan)} Outlines: the base."
    rows = [[str(layer), *map(_counted, part), _groups_of(plan, layer)] for layer, part in enumerate(parts)]
    title = "Shape of the model"
    head = ["layer", "shared channels", "routed", "in no expert", "KV groups"]
    return Picture(key, title, svg(figure, key, title), note, head, rows)


_EDGE: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.4}


def words(plan: Plan) -> str:
    """The experts of a layer, all layers having the same, in a sentence or two."""
    first = plan.experts[0]
    beside = f" beside {len(first.shared):,} shared ones" if first.shared else ""
    used = f"{len(first.routed)} experts of {first.width:,} channels, of which a token uses {plan.top_k}{beside}"
    total = f"{first.used(plan.top_k):,} of {plan.full[0][FFN]:,} in all"
    copies = sum(each.used(len(each.routed)) for each in plan.experts)
    stored = copies / sum(len(each.union) for each in plan.experts)
    twice = f" A channel that is in some expert is stored {stored:.1f} times, on average." if stored > 1.05 else ""
    return f"A layer has {used}: {total}. {fmean(plan.coverage):.1%} of all channels are in some expert.{twice}"


def _parts(plan: Plan, layer: int) -> tuple[int, int, int]:
    """Channels that are shared, that are in routed experts alone, and in none."""
    shared, kept, full = len(plan.experts[layer].shared), len(plan.kept[layer][FFN]), plan.full[layer][FFN]
    return shared, kept - shared, full - kept


def _counted(channels: int) -> str:
    return f"{channels:,}"


def _groups_of(plan: Plan, layer: int) -> str:
    return f"{len(plan.kept[layer][KV_GROUP]):,} of {plan.full[layer][KV_GROUP]:,}"


def _outline(axis: Any, full: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.bar(range(len(full)), full, 0.8, fill=False, edgecolor=FAINT, linewidth=0.7)
    axis.set_ylim(0, 1.05 * max(full))
    axis.grid(visible=False, axis="x")
    axis.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _groups(axis: Any, plan: Plan) -> None:
    from matplotlib.ticker import MaxNLocator

    full, kept = [layer[KV_GROUP] for layer in plan.full], [len(layer[KV_GROUP]) for layer in plan.kept]
    _outline(axis, full)
    for bar in axis.bar(range(len(kept)), kept, 0.8, color=SERIES[1], hatch=HATCHES[1], **_EDGE):
        mark(bar, f"kept-{KV_GROUP}")
    axis.set_title(f"KV groups: {sum(kept):,} of {sum(full):,} stay ({sum(kept) / sum(full):.0%})")
    axis.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axis.set_xlabel("layer")


def loads(run: Run, key: str) -> Picture | None:
    """The part of a layer's choices that every expert gets, against the even one; None where that was not measured."""
    from matplotlib.ticker import MaxNLocator

    if not run.shares:
        return None
    number, layers = len(run.shares[0]), range(len(run.shares))
    even, ends = 100 / number, [(min(each), max(each)) for each in run.shares]
    figure, axis = sheet(230)
    axis.vlines(layers, [100 * low for low, _ in ends], [100 * high for _, high in ends], color=FAINT, linewidth=1)
    places = [layer for layer in layers for _ in range(number)]
    heights = [100 * share for each in run.shares for share in each]
    (drawn,) = axis.plot(places, heights, "_", color=SERIES[0], markersize=_wide(len(layers)), markeredgewidth=1.1)
    mark(drawn, "share")
    axis.axhline(even, **LEVEL)
    axis.set_ylim(0, 1.08 * max(heights))
    axis.set_xlim(-0.7, len(layers) - 0.3)
    axis.grid(visible=False, axis="x")
    axis.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    axis.set_xlabel("layer")
    axis.set_title("share of a layer's choices, %")
    rows = [_row(layer, each) for layer, each in enumerate(run.shares)]
    head = ["layer", "least used (expert)", "most used (expert)", "most, times even", "used half as much as even"]
    title = "Where tokens go"
    return Picture(key, title, svg(figure, key, title), _told(run, even), head, rows)


def _told(run: Run, even: float) -> str:
    each = [(share, layer, expert) for layer, shares in enumerate(run.shares) for expert, share in enumerate(shares)]
    least, most = (f"{share:.1%} (layer {layer}, expert {expert})" for share, layer, expert in (min(each), max(each)))
    idle = sum(share == 0 for share, _, _ in each)
    covered = f" {fmean(run.plan.coverage):.1%} of all channels are in some expert." if run.plan and run.plan.experts else ""
    return (
        f"On validation rows, a mark an expert. Dotted: all alike, {even:.1f}%. Least used: {least}; most used: {most}."
        + (f" {idle} are never chosen." if idle > 1 else " One is never chosen." if idle else "")
        + covered
    )


def _wide(layers: int) -> float:
    """Pixels of a mark, which is narrower than the room of a layer."""
    return max(3.0, min(14.0, 0.6 * 286 / layers))


def _row(layer: int, shares: Sequence[float]) -> list[str]:
    least, most = min(shares), max(shares)
    few = sum(share < 0.5 / len(shares) for share in shares)
    cells = (f"{share:.1%} ({shares.index(share)})" for share in (least, most))
    return [str(layer), *cells, f"{most * len(shares):.2f}", f"{few} of {len(shares)}"]
