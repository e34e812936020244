"""The summary as a table: what was timed, and whether guards hold."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from slimtune.condition import Condition
from slimtune.guard.ruling import rule
from slimtune.report.table import render

SUMMARY: dict[str, Any] = {
    "method": "atp",
    "out": "runs/[x]",
    "model": "runs/[x]/model",
    "base": {"parameters": 200, "ppl": 30.0},
    "dense_lora": {"parameters": 200, "ppl": 15.0},
    "result": {"parameters": 120, "ppl": 20.0, "class": "LlamaForCausalLM"},
    "tokens": {"adapt": 1024},
    "resumed": False,
    "seconds": 61.0,
    "machine": "a machine",
}
SPEED = {
    "base": {"speed.prefill_ms": 1234.5, "speed.decode_ms": 10.0, "speed.decode_ms@8": 20.0, "speed.memory_bytes": 2e9},
    "result": {"speed.prefill_ms": 800.0, "speed.decode_ms": 6.251, "speed.decode_ms@8": 12.0, "speed.memory_bytes": 1e9},
}


def lines(summary: dict[str, Any], width: int = 120) -> list[str]:
    """As a file gets it: without colour."""
    file = io.StringIO()
    Console(width=width, file=file).print(render(summary))
    return file.getvalue().splitlines()


def row(summary: dict[str, Any], label: str) -> list[str]:
    (found,) = [line for line in lines(summary) if line.startswith(f"│ {label} ")]
    return [cell.strip() for cell in found.strip("│").split("│")][1:]


def test_what_was_timed_stands_there() -> None:
    timed = SUMMARY | {"speed": SPEED}
    assert row(timed, "reading a prompt") == ["1,234.50 ms", "", "800.00 ms"]
    assert row(timed, "decode step") == ["10.00 ms", "", "6.25 ms"]
    assert row(timed, "decode step, batch 8") == ["20.00 ms", "", "12.00 ms"]
    assert row(timed, "memory to run, GPU") == ["2,000.0 MB", "", "1,000.0 MB"]
    alone = SUMMARY | {"speed": {"result": SPEED["result"]}, "base": {}, "dense_lora": {}}
    assert row(alone, "decode step") == ["6.25 ms"]


def test_every_guard_has_its_verdict_in_words() -> None:
    figures, base = {"ppl": 20.0, "rqe.accuracy": 0.4}, {"dense": {"ppl": 30.0, "rqe.accuracy": 0.5}}
    guards = [("ppl", "ppl", "<= dense"), ("healthcare.accuracy", "rqe.accuracy", ">= 0.95 x dense"), ("bytes", "bytes", "< 5")]
    rulings = [rule(guard, figure, Condition.of(text), figures, base).to_dict() for guard, figure, text in guards]
    told = [line for line in lines(SUMMARY | {"guard": rulings}) if line.startswith("guard ")]
    assert told == [
        "guard      holds    ppl is 20, to be <= dense = 30",
        "guard      BREACHED healthcare.accuracy (rqe.accuracy) is 0.4, to be >= 0.95 x dense = 0.475",
        "guard      BREACHED bytes has no finite value, to be < 5",
    ]


def test_a_run_without_either_has_neither() -> None:
    for summary in (SUMMARY, SUMMARY | {"speed": {}, "guard": []}):
        text = "\n".join(lines(summary))
        assert "decode" not in text
        assert "guard" not in text
