"""Numbers as a reader wants them."""

from __future__ import annotations

import math
from typing import Any

LABELS = {
    "ppl": "perplexity, test",
    "valid_ppl": "perplexity, validation",
    "loss": "loss, test",
    "accuracy": "accuracy, test",
    "parameters": "parameters",
    "block_ratio": "kept of the blocks",
    "active_parameters": "used by a token",
    "active_ratio": "used by a token, of the blocks",
    "bytes": "weights on disk",
    "seconds": "training time",
    "memory": "peak GPU memory",
    "speed.memory_bytes": "memory while running",
}
METRICS = {
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}
"""Figures of the tasks' own metrics, and what to call them."""
BYTES = ("bytes", "memory", "speed.memory_bytes")
PERCENT = ("accuracy", "macro_f1", "rouge1", "rouge2", "rougeL", "block_ratio", "active_ratio")
STORED = "stored of the blocks"
"""What ``block_ratio`` is where some model has experts, of which a token uses a few."""


def label(figure: str, experts: bool = False) -> str:
    """What to call a figure; with ``experts`` beside one of what a token uses."""
    if experts and figure == "block_ratio":
        return STORED
    if figure in LABELS:
        return LABELS[figure]
    if figure.startswith("speed."):
        name, _, batch = figure.removeprefix("speed.").partition("@")
        return name.replace("_ms", "").replace("_", " ") + (f", batch {batch}" if batch else "")
    task, _, metric = figure.partition(".")
    return f"{task}, {metric_name(metric)}" if metric else figure.replace("_", " ")


def metric_name(metric: str) -> str:
    """Of a task's figure; one of a user's own function is called by its name."""
    return METRICS.get(metric, metric)


def number(figure: str, value: float | None) -> str:
    """A figure's value with its unit; nothing of None."""
    if value is None or not finite(value):
        return "" if value is None else str(value)
    if figure in BYTES:
        return size(value)
    if figure in ("parameters", "active_parameters"):
        return f"{value:,.0f}"
    if figure == "seconds":
        return clock(value)
    if "_ms" in figure:
        return f"{value:,.3g} ms" if value < 100 else f"{value:,.0f} ms"
    metric = figure.rpartition(".")[2]
    if metric in PERCENT:
        return f"{100 * value:.1f}%"
    if metric in ("bits_per_byte", "loss"):
        return f"{value:.3f}"
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"


def finite(value: Any) -> bool:
    """Whether a figure was measured, and is a number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def share(value: Any) -> str:
    """The kept part, which is all where nothing is told."""
    return f"{value if isinstance(value, (int, float)) else 1.0:.1%}"


def size(count: float) -> str:
    """Bytes in words."""
    if count >= 1e8:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def clock(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def millions(count: float) -> str:
    """Parameters in words."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,.0f}"
