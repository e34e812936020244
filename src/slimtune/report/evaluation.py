"""What ``slimtune evaluate`` found, as a table."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slimtune.report.words import METRICS, metric_name
from slimtune.train.task_figures import better

_SHORT_NAMES = {"bits_per_byte": "bits/byte"}
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


def render(found: dict[str, Any]) -> RenderableType:
    """Tasks by suite: each figure with its interval, what answers get that know nothing, and the rows that it was taken on."""
    dtype = _SHORT.get(found["dtype"], found["dtype"])
    given = _given(found)
    rows = "rows of given files" if len(given) == len(found["tasks"]) else f"{found['split']} rows"
    title = Text.assemble((found["model"], "bold"), f"\n{found['parameters']:,} parameters, {dtype}, {rows}", style="default")
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    for name in ("value", "95% interval", "baseline", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    poor = False
    for suite, names in found["suites"].items():
        table.add_section()
        table.add_row(Text(suite, style="bold cyan"))
        for name in names:
            poor |= _add_task(table, name, found["tasks"][name])
    return Group(table, Text(_footer(found, poor), style="dim"))


def _given(found: dict[str, Any]) -> list[str]:
    """Tasks whose rows are those of a file that the user gave, and not of a split."""
    return [name for name, task in found["tasks"].items() if task["split"] == "given"]


def _add_task(table: Table, name: str, task: dict[str, Any]) -> bool:
    """Rows of one task; whether a figure is not clearly above that of answers that know nothing."""
    poor = False
    for index, (metric, figure) in enumerate(task["figures"].items()):
        baseline = figure.get("majority", figure.get("chance"))
        lower = figure.get("better", better(metric)) == "lower"
        end = figure["high" if lower else "low"]
        worst = figure["value"] if end is None else end
        weak = baseline is not None and (worst >= baseline if lower else worst <= baseline)
        poor |= weak
        table.add_row(
            Text(f" {name}" if index == 0 else ""),
            Text(_SHORT_NAMES.get(metric, metric_name(metric)) + (" ↓" if lower else "")),
            Text(_number(metric, figure["value"]), style="bold yellow" if weak else "bold"),
            Text(_interval(metric, figure, task["rows"]), style="dim"),
            Text("" if baseline is None else _number(metric, baseline)),
            Text(f"{task['rows']:,}" if index == 0 else ""),
        )
    return poor


def _interval(metric: str, figure: dict[str, Any], rows: int) -> str:
    if figure["low"] is None:
        return "one row: none" if rows == 1 else "rows alike: none"
    return f"{_number(metric, figure['low'])} to {_number(metric, figure['high'])}"


def _number(metric: str, value: float) -> str:
    if metric == "bits_per_byte":
        return f"{value:.3f}"
    if metric == "perplexity":
        return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"
    if metric in METRICS:
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"  # of a function, in what it is in


def _footer(found: dict[str, Any], poor: bool) -> str:
    lines = ["Accuracy, macro-F1 and ROUGE in percent; ↓ lower is better."]
    own = any(name not in METRICS for task in found["tasks"].values() for name in task["figures"])
    written = "ROUGE and metrics of your own (plain numbers)" if own else "ROUGE"
    lines.append(f"baseline: the most frequent answer, always given; of {written}, the reference answer of another row.")
    if poor:
        below = ", or below it where lower is better" if own else ""
        lines.append(f"Yellow: the interval does not lie above the baseline{below}.")
    if given := [f"{name} ({found['tasks'][name]['source']})" for name in _given(found)]:
        lines.append(f"Rows of a given file, of no split: {', '.join(given)}.")
    if empty := [f"{task['rows_empty']:,} of {name}" for name, task in found["tasks"].items() if task["rows_empty"]]:
        lines.append(f"Rows without an answer, left out: {', '.join(empty)}.")
    cut = {name: task["prompts_cut"] for name, task in found["tasks"].items() if task["prompts_cut"]}
    if cut:
        told = ", ".join(f"{count} of {name}" for name, count in cut.items())
        room = min(found["window"], found["max_length"] or found["window"])
        lines.append(f"Prompts cut from the left to fit {room:,} tokens, answers included: {told}.")
    if found["skipped"]:
        names = ", ".join(found["skipped"])
        lines.append(f"Skipped, for their rows cannot be read: {names} (why: the lines above, or the JSON).")
    if found["not_protected"]:
        names = ", ".join(found["not_protected"])
        lines.append(f"Their rows were not kept from what this model was tuned on: {names}.")
    versions = found["versions"]
    lines.append(
        f"lm-eval {versions['lm_eval']}, transformers {versions['transformers']}, torch {versions['torch']}; "
        f"seed {found['seed']}; {found['seconds']:,.0f} s on {found['device']}"
    )
    return "\n".join(lines)
