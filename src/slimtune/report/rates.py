"""Speed and memory of a run's model beside its base, as ``slimtune bench`` found them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slimtune.report.ink import HATCHES, INK, LEVEL, SERIES, Picture, labels, mark, sheet, svg
from slimtune.report.quality import Table
from slimtune.report.run import Run
from slimtune.report.verdict import beside
from slimtune.report.words import size


def table(run: Run, key: str) -> Table | None:
    """Every measurement: times of both models, the ratio with its range over turns, and what the sizes allow."""
    if not run.bench:
        return None
    found = run.bench
    names = [each["name"] for each in found["models"]]
    ratios = {_key(each): each for each in found["ratios"]}
    rows = []
    for row in (row for row in found["rows"] if row["model"] == names[0]):
        others = [each for each in found["rows"] if each["model"] != names[0] and _key(each) == _key(row)]
        cells = [_time(row), *(_time(other) for other in others)] + [""] * (len(names) - 1 - len(others))
        ratio = ratios.get(_key(row))
        told = f"{ratio['faster']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else ""
        last = [told, f"{ratio['by_size']:.2f}" if ratio else ""] if len(names) > 1 else []
        rows.append([_name(row), str(row["batch"]), *cells, *last])
    rows += _memory(found, names)
    head = ["", "batch", "this model", *([beside(run) or "base", "times as fast", "size allows"] if len(names) > 1 else [])]
    kind = "random weights, " if found.get("random") else ""
    kind += "llama.cpp, " if found.get("runtime") == "llama.cpp" else ""
    after = f", decode after {found['context']}" if "context" in found else ""
    note = (
        f"{found['machine']}, {kind}{found['dtype']}, prompts of {found['prompt']} tokens{after}; "
        f"medians of {found['repeats']} turns (lowest to highest ratio). Size allows: if bytes "
        "read (operations of a prompt) alone took time."
    )
    return Table(key, "Speed and memory", head, rows, note)


def _memory(found: Mapping[str, Any], names: list[str]) -> list[list[str]]:
    models = found["models"]
    blank = ["", ""] if len(names) > 1 else []
    rows = [["weights", "", *(size(each["weight_bytes"]) for each in models), *blank]]
    peaks = [max((row["memory_bytes"] or 0 for row in found["rows"] if row["model"] == name), default=0) for name in names]
    if all(peaks):
        rows.append(["most memory", "", *map(size, peaks), *blank])
    return rows


def picture(run: Run, key: str) -> Picture | None:
    """How many times as fast as the base, bar by bar, with the range over turns and what the sizes allow."""
    if not run.bench or not run.bench["ratios"]:
        return None
    ratios = run.bench["ratios"]
    names, left = labels(f"{_name(ratio)}, {ratio['batch']}" for ratio in ratios)
    figure, axis = sheet(64 + 22 * len(ratios), left=left, top=26)
    places = range(len(ratios))
    values = [ratio["faster"] for ratio in ratios]
    errors = [[ratio["faster"] - ratio["low"] for ratio in ratios], [ratio["high"] - ratio["faster"] for ratio in ratios]]
    bars = axis.barh(places, values, color=SERIES[0], edgecolor=INK, linewidth=0.4, hatch=HATCHES[0], height=0.66)
    for bar in bars:
        mark(bar, "faster")
    axis.errorbar(values, places, xerr=errors, fmt="none", ecolor=INK, elinewidth=1)
    axis.plot([ratio["by_size"] for ratio in ratios], places, "|", color=SERIES[1], markersize=11, markeredgewidth=2)
    axis.axvline(1, **LEVEL)
    axis.set_yticks(places, names)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_title(f"times as fast as {beside(run) or 'the base'}")
    title = "Speed against another model" if beside(run) else "Speed against the base"
    return Picture(key, title, svg(figure, key, title), "Thin lines: range over turns. Tall marks: what the sizes allow.")


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["what"], row["how"], row["batch"]


def _name(row: Mapping[str, Any]) -> str:
    way = "" if row["how"] in ("eager", "llama.cpp") else f" ({row['how']})"
    return f"{row['what']}{way}"


def _time(row: Mapping[str, Any]) -> str:
    return f"{row['ms']:,.3g} ms" if row["ms"] < 1000 else f"{row['ms']:,.0f} ms"
