"""Fifty steps of a tiny recipe give the losses in losses.txt: no change of the method goes unseen.

They are compared at 1e-4, not exactly: matrix products add up in another order on another CPU (or with another release of
torch), and fifty steps of AdamW carry such last-digit differences on. A real change moves losses by far more: another seed
of the noise, one unit more or less, or a learning rate 1% higher is seen. One thread and fp32 keep the rest equal.
Record anew with ``make golden`` and look at the difference.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bases import Bench, metrics
from slimtune.pipeline import tune

FILE = Path(__file__).with_name("losses.txt")
RELATIVE = 1e-4


def test_fifty_steps(bench: Bench, tmp_path: Path, record: bool) -> None:
    # the prior spreads the logits, so that a last digit does not change which units are above the level
    recipe = bench.recipe(tmp_path, search__steps=25, recover__steps=25, generator__prior="taylor", generator__prior_steps=4)
    tune(recipe)
    found = {
        f"{row['phase']} {row['step']} {turn}": row[f"{turn}_loss"]
        for row in metrics(tmp_path)
        for turn in ("decide", "adapt")
        if f"{turn}_loss" in row
    }
    assert len(found) == 75
    if record:
        FILE.write_text("".join(f"{name} {loss:.8f}\n" for name, loss in found.items()), encoding="utf-8")
        return
    lines = (line.rsplit(" ", 1) for line in FILE.read_text(encoding="utf-8").splitlines())
    expected = {name: float(loss) for name, loss in lines}
    assert found == pytest.approx(expected, rel=RELATIVE)
