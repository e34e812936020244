"""The summary as a table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slimtune.guard.ruling import Ruling
from slimtune.report.words import LABELS, STORED, number
from slimtune.train.task_figures import names_of, told

Summary = dict[str, Any]

COLUMNS = {"base": "base", "dense_lora": "dense LoRA", "result": "slimtune"}


def render(summary: Summary) -> RenderableType:
    """Figures of the base, the dense reference if it was run, and the result; below it what the run cost."""
    present = [name for name in COLUMNS if summary.get(name)]
    table = Table(title=Text(f"{summary['method']}: {summary['out']}"), title_justify="left")
    table.add_column("")
    for name in present:
        table.add_column(COLUMNS[name], justify="right")
    experts = any("active_ratio" in summary[name] for name in present)
    for label, key, form in _ROWS:
        label = STORED if experts and key == "block_ratio" else label
        cells = [_cell(summary[name], key, form, summary.get("base")) for name in present]
        if any(cells):
            table.add_row(label, *cells)
    for key, label in names_of(summary[name] for name in present).items():
        table.add_row(label, *(told(summary[name], key) for name in present))
    for label, cells in _speeds(summary, present):
        table.add_row(label, *cells)
    below = [*_guards(summary), *(Text(line, "yellow") for line in cautions(summary))]
    return Group(table, Text(_footer(summary)), *below)


def _speeds(summary: Summary, present: list[str]) -> list[tuple[str, list[str]]]:
    """Rows of what was timed; of dense LoRA nothing is."""
    speed = summary.get("speed") or {}
    rows = []
    for figure in speed.get("result", {}):
        name, _, batch = figure.removeprefix("speed.").partition("@")
        label = _SPEEDS[name] + (f", batch {batch}" if batch else "")
        form = _bytes if name == "memory_bytes" else _milliseconds
        rows.append((label, [_cell(speed.get(model, {}), figure, form, None) for model in present]))
    return rows


def _guards(summary: Summary) -> list[Text]:
    """A line for each figure that was held to a bound."""
    rulings = [Ruling(**each) for each in summary.get("guard") or ()]
    verdicts = {True: ("holds   ", "green"), False: ("BREACHED", "bold red")}
    return [Text.assemble("guard      ", verdicts[ruling.holds], f" {ruling.told}") for ruling in rulings]


def cautions(summary: Summary) -> list[str]:
    """What a reader of the figures should not overlook."""
    base, result = summary.get("base") or {}, summary["result"]
    if not base.get("ppl") or not result.get("ppl") or result["ppl"] <= 1.01 * base["ppl"]:  # nan is told as well
        return []
    more = "train.steps" if summary["method"] == "finetune" else "recover.steps or budget.keep"
    above = f"perplexity is above the base's, {number('ppl', result['ppl'])} for {number('ppl', base['ppl'])}"
    return [f"caution    {above}: if the loss rose in training, lower train.lr or raise train.warmup; else raise {more}"]


def _cell(figures: Summary, key: str, form: Callable[[Any, Summary, Summary | None], str], base: Summary | None) -> str:
    return form(figures[key], figures, base) if figures.get(key) is not None else ""


def _parameters(value: int, figures: Summary, base: Summary | None) -> str:
    share = f" ({value / base['parameters']:.1%})" if base and value != base["parameters"] else ""
    return f"{value:,}{share}"


def _perplexity(value: float, figures: Summary, base: Summary | None) -> str:
    error = figures.get("ppl_se")  # none of a single window
    return number("ppl", value) + (f" ± {number('ppl', error)}" if error else "")


def _plain(value: float, figures: Summary, base: Summary | None) -> str:
    return number("ppl", value)


def _accuracy(value: float, figures: Summary, base: Summary | None) -> str:
    return f"{value:.1%} ± {figures.get('accuracy_se', 0.0):.1%}"


def _ratio(value: float, figures: Summary, base: Summary | None) -> str:
    return f"{value:.1%}"


def _bytes(value: int, figures: Summary, base: Summary | None) -> str:
    return f"{value / 1e6:,.1f} MB"


def _milliseconds(value: float, figures: Summary, base: Summary | None) -> str:
    return f"{value:,.2f} ms"


def _seconds(value: float, figures: Summary, base: Summary | None) -> str:
    return f"{value:,.0f} s"


_ROWS: list[tuple[str, str, Callable[[Any, Summary, Summary | None], str]]] = [
    ("parameters", "parameters", _parameters),
    ("kept of the blocks", "block_ratio", _ratio),
    (LABELS["active_parameters"], "active_parameters", _parameters),
    (LABELS["active_ratio"], "active_ratio", _ratio),
    ("perplexity, test", "ppl", _perplexity),
    ("perplexity, validation", "valid_ppl", _plain),
    ("accuracy, test", "accuracy", _accuracy),
    ("most frequent answer", "majority", _ratio),
    ("on disk", "bytes", _bytes),
    ("training time", "seconds", _seconds),
    ("peak memory, GPU", "memory", _bytes),
]

_SPEEDS = {
    "prefill_ms": "reading a prompt",
    "first_token_ms": "first token",
    "decode_ms": "decode step",
    "memory_bytes": "memory to run, GPU",
}
"""Figures of ``slimtune.bench.named``."""


def loads(summary: Summary) -> str:
    """How evenly tokens are spread over the experts of a layer; nothing of a model without experts."""
    each = [share for layer in summary.get("shares") or () for share in layer]
    if not each:
        return ""
    even, ends = 1 / len(summary["shares"][0]), (min(each), max(each))
    least, most = (f"{share:.1%}" for share in ends)
    return f"of a layer's choices the least used one gets {least}, the most used {most}; evenly {even:.1%}"


def _footer(summary: Summary) -> str:
    lines = [f"model      {summary['model']} ({summary['result']['class']})"]
    if told := loads(summary):
        lines.append(f"experts    {told}")
    if summary.get("reload_difference") is not None:
        lines.append(f"reload     logits of a fresh process differ by {summary['reload_difference']:.1e}")
    if summary.get("leak") is not None:
        lines.append(f"leak       {summary['leak']:.1e} before the cut")
    tokens = ", ".join(f"{name} {count:,}" for name, count in summary["tokens"].items() if count)
    lines.append(f"tokens     {tokens}")
    since = " since --resume" if summary["resumed"] else ""
    lines.append(f"time       {summary['seconds']:,.0f} s{since} on {summary['machine']}")
    return "\n".join(lines)
