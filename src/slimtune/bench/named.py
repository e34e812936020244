"""What ``slimtune bench`` found, as figures with names: ``speed.decode_ms``, ``speed.prefill_ms@8``. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WHATS = ("prefill", "first_token", "decode")


def speeds(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """``{model: {figure: value}}`` of a bench's JSON.

    ``speed.decode_ms`` is the median time of a step at the smallest batch that was asked for, ``speed.decode_ms@8`` that of one
    at batch 8; of several ways to launch it that both models have (on a GPU: by Python, as a graph) the fastest of the one that
    another is held against. The first token is one of a single row. ``speed.memory_bytes`` is the most that anything took on a
    GPU.
    """
    rows: list[Mapping[str, Any]] = found["rows"]
    models = [each["name"] for each in found["models"]]
    result: dict[str, dict[str, float]] = {name: {} for name in models}
    for what in WHATS:
        batches = sorted({row["batch"] for row in rows if _what(row) == what})
        for batch in batches:
            name = f"speed.{what}_ms" + ("" if batch == batches[0] else f"@{batch}")
            for model, row in _alike([row for row in rows if _what(row) == what and row["batch"] == batch], models).items():
                result[model][name] = row["ms"]
    for name in models:
        taken = [row["memory_bytes"] for row in rows if row["model"] == name]
        if all(taken):
            result[name]["speed.memory_bytes"] = float(max(taken))
    return result


def _alike(rows: list[Mapping[str, Any]], models: list[str]) -> dict[str, Mapping[str, Any]]:
    """Each model's row of the fastest way that all have, by the last of them; empty where there is none."""
    ways = {(row["model"], row["how"]): row for row in rows}
    common = [how for model, how in ways if model == models[-1] and all((each, how) in ways for each in models)]
    how = min(common, key=lambda how: float(ways[models[-1], how]["ms"]), default=None)
    return {} if how is None else {model: ways[model, how] for model in models}


def _what(row: Mapping[str, Any]) -> str:
    return str(row["what"]).replace(" ", "_")
