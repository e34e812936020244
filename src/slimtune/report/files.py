"""The files of a run, read and held to what a run writes: what reads them further need not ask."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from slimtune.errors import UserError
from slimtune.structure.plan import Plan

Row = dict[str, Any]
MODELS = {"base": "base", "dense_lora": "dense LoRA", "result": "result"}
"""Models that a summary has figures of, and what to call them."""
TARGETS = ("adapt_generator_target", "decide_generator_target")
"""Of a search of experts the part that a token is to use: its masks have just that."""
_TEXTS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
"""Numbers that metrics.jsonl has as text, for JSON has no others."""
_RULING = {"guard": str, "figure": str, "condition": str, "holds": bool, "words": dict}
_BENCH: dict[str, dict[str, type]] = {
    "models": {"name": str, "parameters": int, "weight_bytes": int},
    "rows": {"model": str, "what": str, "how": str, "batch": int, "ms": float},
    "ratios": {"what": str, "how": str, "batch": int, "faster": float, "low": float, "high": float, "by_size": float},
}
"""Of a bench, what is read of its tables."""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _of_kind(value: Any, kind: type) -> bool:
    return _number(value) if kind is float else isinstance(value, kind)


def read_rows(file: Path) -> list[Row]:
    """Rows of steps; half of one at the end, which is being written, is passed over, and so is what is none."""
    try:
        content = file.read_bytes()
    except OSError:
        return []
    rows = _parsed(content.splitlines())
    if b'"nan"' in content or b'inf"' in content:
        rows = [{key: _read(value) for key, value in row.items()} if isinstance(row, dict) else row for row in rows]
    return [row for row in rows if type(row) is dict and type(row.get("step")) is int and type(row.get("phase")) is str]


def _parsed(lines: Sequence[bytes]) -> list[Any]:
    import orjson

    try:  # all at once; json takes three times as long
        found: list[Any] = orjson.loads(b"[" + b",".join(lines) + b"]")
        return found
    except ValueError:
        found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line.decode(errors="replace")))
    return found


def _read(value: Any) -> Any:
    return _TEXTS.get(value, value) if isinstance(value, str) else value


def read_summary(file: Path) -> dict[str, Any]:
    """A run's summary; empty where there is none. Raises UserError where it is damaged, or holds what no run writes."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{str(file)!r} is damaged ({error}); the run writes it anew with --resume") from error
    if not isinstance(found, dict):
        raise UserError(f"{str(file)!r} is damaged ({found!r} is no object); the run writes it anew with --resume")
    for name, odd in _odd(found):
        raise UserError(f"{str(file)!r} is no summary of a run: {name} is {odd!r}; the run writes it anew with --resume")
    return found


def _odd(summary: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What is not as a run writes it."""
    counts = {name: summary.get(name) or {} for name in (*MODELS, "rows", "tokens")}
    counts |= {f"speed.{name}": value for name, value in _mapping(summary.get("speed")).items()}
    found = [(name, value) for name, value in counts.items() if not isinstance(value, dict)]
    figures = [(f"{name}.{key}", value) for name, each in counts.items() for key, value in _mapping(each).items()]
    found += [(name, value) for name, value in figures if not (value is None or _number(value) or name.endswith(".class"))]
    kinds = {"speed": dict, "data": dict, "task_rows": dict, "guard": list, "lower_is_better": list, "seconds": float}
    found += [("shares", each) for each in _rows(summary.get("shares"))[:1]]
    found += [(name, summary[name]) for name, kind in kinds.items() if summary.get(name) and not _of_kind(summary[name], kind)]
    rulings = summary["guard"] if isinstance(summary.get("guard"), list) else []
    return found + [("guard", each) for each in rulings if not _is_ruling(each)]


def _rows(shares: Any) -> list[Any]:
    """What is odd of the shares of experts: every layer has a number for each, and all have as many."""
    if not isinstance(shares, list):
        return [shares] if shares else []
    number = len(shares[0]) if shares and isinstance(shares[0], list) else 0
    return [each for each in shares if not (isinstance(each, list) and len(each) == number > 0 and all(map(_number, each)))]


def _is_ruling(found: Any) -> bool:
    whole = isinstance(found, dict) and all(_of_kind(found.get(name), kind) for name, kind in _RULING.items())
    return whole and all(name in found and (found[name] is None or _number(found[name])) for name in ("value", "limit"))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def is_bench(found: Mapping[str, Any]) -> bool:
    """Whether it is what ``slimtune bench --json`` wrote."""
    if not (isinstance(found.get("machine"), str) and isinstance(found.get("dtype"), str) and found.get("rows")):
        return False
    if not (_number(found.get("prompt")) and _number(found.get("repeats")) and found.get("models")):
        return False
    tables = ((found.get(table), keys) for table, keys in _BENCH.items())
    return all(isinstance(rows, list) and all(_has(row, keys) for row in rows) for rows, keys in tables)


def is_evaluation(found: Mapping[str, Any]) -> bool:
    """Whether it is what ``slimtune evaluate --json`` wrote."""
    if not (isinstance(found.get("tasks"), dict) and "suites" in found and _number(found.get("parameters"))):
        return False
    entries = found["tasks"].values()
    whole = all(isinstance(entry, dict) and _number(entry.get("rows")) and "figures" in entry for entry in entries)
    return whole and all(
        isinstance(entry["figures"], dict)
        and all(_has(figure, {"value": float}) and {"low", "high"} <= figure.keys() for figure in entry["figures"].values())
        for entry in entries
    )


def _has(row: Any, keys: Mapping[str, type]) -> bool:
    return isinstance(row, dict) and all(_of_kind(row.get(key), kind) for key, kind in keys.items())


def kept(row: Mapping[str, Any]) -> Any:
    """The kept part of the model at a step, with experts the part that a token uses: in a search the step's target."""
    targets = [row[name] for name in TARGETS if name in row]
    return targets[0] if targets else row.get("kept")


def read_object(file: Path, read: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """An object in a file that a run can do without; empty where there is none, or it is damaged."""
    try:
        found = read(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def read_plan(file: Path) -> Plan | None:
    """A run's Plan; None where there is none. Raises UserError where it is damaged."""
    try:
        return Plan.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (UserError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{str(file)!r} cannot be used: {error}") from error
