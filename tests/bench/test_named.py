"""Names of what a bench found."""

from __future__ import annotations

from typing import Any

from slimtune.bench.measure import Settings, measures
from slimtune.bench.named import speeds
from slimtune.guard.names import SPEED


def row(model: str, what: str, batch: int, ms: float, how: str = "eager", memory: int | None = None) -> dict[str, Any]:
    return {"model": model, "what": what, "how": how, "batch": batch, "ms": ms, "memory_bytes": memory}


def found(models: list[str], *rows: dict[str, Any]) -> dict[str, Any]:
    return {"models": [{"name": name} for name in models], "rows": list(rows)}


def test_the_smallest_batch_has_no_number_whatever_it_is() -> None:
    rows = [row("a", what, batch, batch + len(what)) for what in ("prefill", "decode") for batch in (32, 8)]
    assert speeds(found(["a"], *rows, row("a", "first token", 1, 5.0))) == {
        "a": {
            "speed.prefill_ms": 15,
            "speed.prefill_ms@32": 39,
            "speed.first_token_ms": 5.0,
            "speed.decode_ms": 14,
            "speed.decode_ms@32": 38,
        }
    }


def test_both_are_launched_as_is_fastest_for_the_one_that_is_held_against() -> None:
    rows = [
        row("small", "decode", 1, 2.0),
        row("dense", "decode", 1, 9.0),
        row("small", "decode", 1, 3.0, "graph"),
        row("dense", "decode", 1, 4.0, "graph"),
    ]
    assert speeds(found(["small", "dense"], *rows)) == {"small": {"speed.decode_ms": 3.0}, "dense": {"speed.decode_ms": 4.0}}


def test_a_way_that_one_of_them_has_not_is_left_out() -> None:
    rows = [row("small", "decode", 1, 2.0), row("dense", "decode", 1, 9.0), row("dense", "decode", 1, 4.0, "graph")]
    assert speeds(found(["small", "dense"], *rows)) == {"small": {"speed.decode_ms": 2.0}, "dense": {"speed.decode_ms": 9.0}}
    only = [row("small", "decode", 1, 2.0, "graph"), row("dense", "decode", 1, 9.0)]
    assert speeds(found(["small", "dense"], *only)) == {"small": {}, "dense": {}}


def test_memory_is_the_most_that_anything_took() -> None:
    rows = [row("a", "decode", 1, 2.0, memory=70), row("a", "prefill", 1, 2.0, memory=90)]
    assert speeds(found(["a"], *rows))["a"]["speed.memory_bytes"] == 90.0
    assert "speed.memory_bytes" not in speeds(found(["a"], *rows, row("a", "prefill", 8, 2.0)))["a"]


def test_a_guard_may_name_whatever_there_is() -> None:
    rows = [row("a", each.what, each.batch, 1.0, memory=1) for each in measures(Settings((1, 8)), cuda=False)]
    names = speeds(found(["a"], *rows))["a"]
    assert len(names) == 6
    assert all(SPEED.fullmatch(name) for name in names)
