"""What ``slimtune bench`` found, as figures with names: ``speed.decode_ms``, ``speed.prefill_ms@8``. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WHATS = ("prefill", "first_token", "decode")


def speeds(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """``{model: {figure: value}}`` of a bench's JSON.

    ``speed.decode_ms`` is the median time of a step at the smallest batch, ``speed.decode_ms@8`` that of one at batch 8; of
    several ways to launch it (on a GPU: by Python, as a graph) the fastest of the model that another is held against, so that
    both are timed in the same way. ``speed.memory_bytes`` is the most that anything took on a GPU.
    """
    rows: list[Mapping[str, Any]] = found["rows"]
    models = [each["name"] for each in found["models"]]
    judge = models[-1]
    smallest = min(row["batch"] for row in rows)
    result: dict[str, dict[str, float]] = {name: {} for name in models}
    for what in WHATS:
        for batch in sorted({row["batch"] for row in rows if _what(row) == what}):
            some = [row for row in rows if _what(row) == what and row["batch"] == batch]
            how = min((row for row in some if row["model"] == judge), key=lambda row: float(row["ms"]))["how"]
            name = f"speed.{what}_ms" + ("" if batch == smallest else f"@{batch}")
            for row in some:
                if row["how"] == how:
                    result[row["model"]][name] = row["ms"]
    for name in models:
        taken = [row["memory_bytes"] for row in rows if row["model"] == name]
        if all(taken):
            result[name]["speed.memory_bytes"] = float(max(taken))
    return result


def _what(row: Mapping[str, Any]) -> str:
    return str(row["what"]).replace(" ", "_")
