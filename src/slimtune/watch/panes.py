"""The parts of what ``slimtune watch`` shows, each a block of lines; None where a run has nothing for it yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slimtune.report.experts import words
from slimtune.report.quality import telling
from slimtune.report.shape import NAMES
from slimtune.report.table import loads
from slimtune.report.words import clock, label
from slimtune.report.words import number as told
from slimtune.structure.axes import FFN, KV_GROUP
from slimtune.train.task_figures import better, names_of
from slimtune.watch import bounds, glyphs
from slimtune.watch.follow import Watched, number
from slimtune.watch.pace import Phase, left, phases

_DIRECTED = ("accuracy", "macro_f1", "rouge1", "rouge2", "rougeL", "perplexity", "bits_per_byte", "ppl", "loss")
"""Figures of which it is known which way is the better; of others a finished run knows it."""
_MODELS = {"dense": "base", "dense_lora": "dense LoRA"}
_STATES = ("BREACHED", "holds", "not yet", "at the end")
_LOUD = {"BREACHED": "bold red", "holds": "green"}
_LABEL = 12
"""Columns of the names of curves and bars, with the gap behind them."""


@dataclass(frozen=True)
class Room:
    """What there is for a frame.

    Attributes:
        width: columns.
        bars: lines of the bars of the shape.
        figures: most lines of validation figures.
        tight: whatever can be told in fewer lines is.
        ascii_only: block characters cannot be written.
    """

    width: int
    bars: int = 3
    figures: int = 100
    tight: bool = False
    ascii_only: bool = False


def name_of(phase: Phase) -> str:
    """What to call a phase."""
    return "dense LoRA" if phase.stage == "dense_lora" else phase.name


def progress(watched: Watched, room: Room) -> RenderableType | None:
    """The phases of the run as bars, with the time of a step and what is left."""
    found = phases(watched)
    if not found:
        return None
    grid = Table.grid(padding=(0, 2 if room.width >= 76 else 1))
    for justify in ("left", "left", "right", "right", "left"):
        grid.add_column(justify=justify, no_wrap=True)
    width = max(6, min(40, room.width - 54))
    for phase in found:
        bar = ProgressBar(phase.steps or phase.done or 1, phase.done, width=width, finished_style="bar.complete")
        steps = f"{phase.done:,}/{phase.steps:,}" if phase.steps is not None else f"{phase.done:,}"
        speed = f"{told('_ms', 1000 * phase.step) if phase.step < 1 else f'{phase.step:,.1f} s'}/step" if phase.step else ""
        grid.add_row(name_of(phase), bar, steps, speed, Text(_time(phase, watched), "dim" if not phase.done else ""))
    total = left(found)
    if watched.over or not total or len([phase for phase in found if phase.left]) < 2:
        return grid
    return Group(grid, Text(f"{'':{_LABEL}}about {clock(total)} left for all steps", "dim"))


def _time(phase: Phase, watched: Watched) -> str:
    if phase.steps is not None and phase.done >= phase.steps:
        return f"took {clock(phase.spent)}"
    if phase.left is None or watched.over:
        return ""
    return f"left {clock(phase.left)}" if phase.done else f"about {clock(phase.left)}"


def curves(watched: Watched, room: Room) -> RenderableType | None:
    """Loss, validation perplexity and kept ratio over the steps of a stage."""
    stage, seen = watched.seen.stage, watched.seen
    lines = seen.lines.get(stage, {})
    of = " (dense LoRA)" if stage == "dense_lora" else ""
    loss = "adapt_loss" if lines.get("adapt_loss") else "decide_loss"
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, width=_LABEL - 2)
    grid.add_column(no_wrap=True)
    grid.add_column()
    width = max(10, min(60, room.width - _LABEL - 2 - 35))
    for key, name in ((loss, "loss"), ("valid_ppl", "perplexity")):
        if values := lines.get(key):
            points = glyphs.means(values, width)
            figure = "loss" if key == loss else "ppl"
            few = values if key == "valid_ppl" else points  # of noisy ones means are told, as they are drawn
            ends = [told(figure, value) for value in (few[0], few[-1], min(few))]
            grid.add_row(name, Text(glyphs.spark(points, room.ascii_only), "cyan"), f"{ends[0]} to {ends[1]}, least {ends[2]}")
    kept = lines.get("kept")
    if kept and watched.recipe and watched.recipe.prunes and stage == "main":
        now, budget = f"{kept[-1]:.1%}", f"{100 * watched.recipe.budget.keep:.4g}%"
        experts = watched.recipe.method == "tomoe"  # whose masks have just what is the target of the step
        target = number(seen.last or {}, "decide_target") if not experts else None
        now += f", target {target:.1%}, then {budget}" if target else f", budget {budget}"
        grid.add_row("used" if experts else "kept", Text(glyphs.spark(glyphs.means(kept, width), room.ascii_only), "cyan"), now)
    if not grid.row_count:
        return None
    size = max(1, -(-len(lines.get(loss, ())) // width))
    note = f"each mark: mean of {size:,} steps" if size > 1 else ""
    return Group(_title(f"Curves{of}", note), grid)


def figures(watched: Watched, room: Room) -> RenderableType | None:
    """The latest validation figures, with what changed since those before and the same figures of the references."""
    rows = watched.seen.evaluated.get(watched.seen.stage)
    if not rows:
        return None
    now, before = rows[-1], rows[-2] if len(rows) > 1 else {}
    taken = {key.removeprefix("valid_"): value for key, value in now.items() if key.startswith("valid_")}
    names = [*(["ppl"] if "ppl" in taken else []), *telling(names_of([taken]))]
    others = bounds.references(watched.stages)
    words = [word for word in others if any(name in others[word] for name in names)]
    grid = Table.grid(padding=(0, 2 if room.width >= 64 else 1))
    grid.add_column(overflow="ellipsis", no_wrap=True, max_width=max(16, room.width - 24 - 12 * len(words)))
    grid.add_column(no_wrap=True)
    for _ in range(2 + len(words)):
        grid.add_column(justify="right", no_wrap=True)
    grid.add_row("", "", "now", "change", *(_MODELS[word] for word in words), style="dim")
    shown = names if len(names) <= room.figures else names[: room.figures - 1]
    for name in shown:
        change = _change(name, taken, before, watched)
        sign = _direction(name, watched, room)
        cells = (told(name, others[word].get(name)) for word in words)
        grid.add_row(label(name).removesuffix(", test"), sign, told(name, number(taken, name)), change, *cells)
    more = f"; {len(names) - len(shown)} more in a taller window" if len(shown) < len(names) else ""
    phase = "dense LoRA" if watched.seen.stage == "dense_lora" else now["phase"]
    return Group(_title("Validation", f"{phase}, step {now['step'] + 1:,}{more}"), grid)


def _direction(name: str, watched: Watched, room: Room) -> str:
    """Which way is the better, where that is known."""
    if not watched.summary and name.rpartition(".")[2] not in _DIRECTED:
        return ""
    lower = better(name, watched.summary.get("lower_is_better", ())) == "lower"
    return {(True, False): "↓", (False, False): "↑", (True, True): "v", (False, True): "^"}[lower, room.ascii_only]


def _change(name: str, now: dict[str, Any], before: dict[str, Any], watched: Watched) -> Text:
    value, earlier = number(now, name), number(before, f"valid_{name}")
    if value is None or earlier is None:
        return Text()
    shown = told(name, abs(value - earlier))
    if shown == told(name, 0.0):
        return Text(shown, "dim")
    lower = better(name, watched.summary.get("lower_is_better", ())) == "lower"
    known = watched.summary or name.rpartition(".")[2] in _DIRECTED
    style = ("green" if (value < earlier) == lower else "yellow") if known else ""
    return Text(f"{'-' if value < earlier else '+'}{shown}", style)


def guards(watched: Watched, room: Room) -> RenderableType | None:
    """Each figure that is held to a bound, with its state in a word."""
    lines = sorted(bounds.guards(watched), key=lambda line: _STATES.index(line.state))
    if not lines:
        return None
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, width=_LABEL - 2)
    grid.add_column()
    broken = [(line.state, line.told) for line in lines if line.state == "BREACHED"]
    others = [(line.state, line.told) for line in lines if line.state != "BREACHED"]
    if room.tight:
        named = {state: [line.guard for line in lines if line.state == state] for state, _ in others}
        others = [(state, ", ".join(dict.fromkeys(names))) for state, names in named.items()]
    for state, of in broken + others:
        grid.add_row(Text(state, _LOUD.get(state, "dim")), Text(of))
    rows = watched.seen.evaluated.get("main")
    by = "by test figures of the written model" if watched.state == "finished" else ""
    if rows and not by and {line.state for line in lines} & set(_LOUD):
        by = f"by the validation figures of {rows[-1]['phase']}, step {rows[-1]['step'] + 1:,}"
    return Group(_title("Guards", by), grid)


def shape(watched: Watched, room: Room) -> RenderableType | None:
    """What is kept of each layer, as bars beside one another, and how much of the decision still changes."""
    seen, plan, full = watched.seen, watched.plan, watched.units
    if plan is not None:
        widths = {axis: [len(layer[axis]) for layer in plan.kept] for axis in NAMES}
    elif seen.shape:
        widths = {axis: seen.shape[f"widths_{axis}"] for axis in NAMES}
    else:
        return None
    whole = full or {axis: [seen.widest[axis]] * len(widths[axis]) for axis in NAMES}
    count, columns = len(widths[FFN]), room.width - _LABEL
    step, each = max(1, min(1 if room.tight else 4, columns // count)), max(1, -(-count // columns))
    lines = []
    for axis in (FFN, KV_GROUP):
        name = "in experts" if axis == FFN and plan is not None and plan.experts else NAMES[axis]
        parts = [kept / of for kept, of in zip(widths[axis], whole[axis], strict=True)]
        bars = glyphs.bars(_joined(parts, each), room.bars, step, room.ascii_only)
        lines += [_bar("" if row < len(bars) - 1 else name, bar) for row, bar in enumerate(bars)]
        told = _kept(widths[axis], whole[axis], bool(full))
        if room.tight:
            lines[-1].append(f"  {told}", "dim")
        else:
            lines.append(Text(f"{'':{_LABEL}}{told}", "dim"))
    note = "layer by layer" if each == 1 else f"{each} layers a bar"
    if plan is None and seen.shape is not seen.last and seen.shape:  # what was decided is written at the end
        note += f", at step {seen.shape['step'] + 1:,} of the {seen.shape['phase']}"
    note += "" if full else "; full height: the widest that was seen"
    return Group(_title("Shape", note), *lines, *_moving(watched), *_experts(watched, room))


def _joined(parts: Sequence[float], each: int) -> list[float]:
    groups = [parts[start : start + each] for start in range(0, len(parts), each)]
    return [sum(group) / len(group) for group in groups]


def _bar(name: str, line: str) -> Text:
    bars = Text(line, "cyan")
    bars.highlight_regex(glyphs.GONE, "dim")
    return Text(no_wrap=True, overflow="ellipsis").append(f"{name:{_LABEL}}").append_text(bars)


def _kept(widths: Sequence[int], whole: Sequence[int], known: bool) -> str:
    least, most = min(widths), max(widths)
    span = f"{least:,} to {most:,} a layer" if least < most else f"{least:,} in every layer"
    return f"{sum(widths) / sum(whole):.0%} of {sum(whole):,}, {span}" if known else span


def _moving(watched: Watched) -> list[Text]:
    """How much of the decision still changes."""
    row = watched.seen.shape
    if not row or row is not watched.seen.last:
        return []
    closed, back = number(row, "closed") or 0.0, number(row, "reopened") or 0.0
    told = f"Last step: {closed:.2%} of all units removed, {back:.2%} came back (in all steps: {watched.seen.reopened:.1%})."
    return [Text(told)]


def _experts(watched: Watched, room: Room) -> list[Text]:
    """What the experts are, and how evenly tokens are spread over them: what the bars do not tell."""
    if not (watched.plan and watched.plan.experts) or room.tight:
        return []
    even = loads(watched.summary)
    return [Text(words(watched.plan)), *([Text(f"{even[0].upper()}{even[1:]}.")] if even else [])]


def _title(name: str, note: str = "") -> Text:
    return Text.assemble((name, "bold"), *([("  " + note, "dim")] if note else []))
