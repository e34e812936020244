"""What ``slimtune bench`` found, as a table."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

_SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_HEAD = 10
"""Letters of a model's name over its column: tables fit 80."""


def render(found: dict[str, Any]) -> RenderableType:
    """Every measurement; against another model also how much faster, and how much of what its size allows that is."""
    models = found["models"]
    lines = [_model(each) for each in models]
    kind = _SHORT.get(found["dtype"], found["dtype"]) + (", random weights" if found["random"] else "")
    title = Text.assemble(("\n".join(lines), "bold"), f"\n{found['machine']}, {found['runtime']}, {kind}, {_lengths(found)}")
    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if found["ratios"]:
        _two(table, found)
    else:
        _one(table, found)
    sizes = "\n".join(_sizes(found)) if found["ratios"] else ""
    return Group(table, *([Text(sizes)] if sizes else []), Text(_footer(found), style="dim"))


def _model(each: dict[str, Any]) -> str:
    return f"{each['name']}: {each['class']}, {each['parameters']:,} parameters, {_bytes(each['weight_bytes'])}"


def _lengths(found: dict[str, Any]) -> str:
    context = f", decode after {found['context']}" if "context" in found else ""
    return f"prompts of {found['prompt']} tokens{context}"


def _one(table: Table, found: dict[str, Any]) -> None:
    _head(table, "batch", "ms", "", "tokens/s", "rate", "memory")
    for row in found["rows"]:
        rate = f"{row['gb_s']:,.3g} GB/s" if row["what"] == "decode" else f"{row['tflops_s']:,.3g} TFLOP/s"
        memory = _bytes(row["memory_bytes"]) if row["memory_bytes"] else ""
        spread = _spread(row["ms_low"], row["ms_high"])
        tokens = "" if row["what"] == "first token" else f"{row['tokens_s']:,.0f}"
        table.add_row(_name(row), str(row["batch"]), f"{row['ms']:,.2f}", spread, tokens, rate, memory)


def _two(table: Table, found: dict[str, Any]) -> None:
    mine, other = (each["name"] for each in found["models"])
    saved = ["by saved"] if _rates(found) else []
    _head(table, "batch", *map(_clipped, (mine, other)), "faster", "", "by size", *saved)
    rows = {(row["model"], _key(row)): row for row in found["rows"]}
    for ratio in found["ratios"]:
        speeds = [_speed(rows[name, _key(ratio)]) for name in (mine, other)]
        allowed = [f"{ratio['by_size']:.2f}", *([f"{ratio['by_saved']:.2f}" if "by_saved" in ratio else ""] if saved else [])]
        faster = f"{ratio['faster']:.2f}", _spread(ratio["low"], ratio["high"])
        table.add_row(_name(ratio), str(ratio["batch"]), *speeds, *faster, *allowed)


def _speed(row: dict[str, Any]) -> str:
    return f"{row['ms']:,.1f} ms" if row["what"] == "first token" else f"{row['tokens_s']:,.0f}/s"


def _rates(found: dict[str, Any]) -> bool:
    return any("by_saved" in ratio for ratio in found["ratios"])


def _head(table: Table, *names: str) -> None:
    table.add_column("", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)


def _name(row: dict[str, Any]) -> str:
    return row["what"] if row["how"] in ("eager", "llama.cpp") else f"{row['what']}, {row['how'].removesuffix(' graph')}"


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["what"], row["how"], row["batch"]


def _sizes(found: dict[str, Any]) -> list[str]:
    """Of both models: what a decode step reads, by batch, and the most memory that anything took."""
    mine, other = (each["name"] for each in found["models"])
    read: dict[int, dict[str, int]] = {}
    memory: dict[str, int] = {}
    for row in found["rows"]:
        if row["what"] == "decode":
            read.setdefault(row["batch"], {})[row["model"]] = row["bytes"]
        memory[row["model"]] = max(memory.get(row["model"], 0), row["memory_bytes"] or 0)
    lines = [f"a step of {batch} reads {_bytes(each[mine])}, of {other} {_bytes(each[other])}" for batch, each in read.items()]
    if all(memory.values()):
        lines.append(f"most memory {_bytes(memory[mine])}, of {other} {_bytes(memory[other])}")
    return lines


def _clipped(name: str) -> str:
    return name if len(name) <= _HEAD else f"{name[: _HEAD - 1]}…"


def _spread(low: float, high: float) -> str:
    return f"{low:,.2f}-{high:,.2f}"


def _bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _footer(found: dict[str, Any]) -> str:
    turns = f"median of {found['repeats']} turns (lowest-highest)"
    if not found["ratios"]:
        return f"{turns}; rate: bytes that a decode step reads, operations of a prompt"
    by = "by size: the most there could be, if nothing but the bytes that a step reads (operations of a prompt) took time"
    saved = "; by saved: the least to expect, if what is gone had taken the time that this machine takes at its best"
    return f"tokens a second; faster: {turns}; {by}{saved if _rates(found) else ''}"
