"""A whole run under two processes is the run of one: same losses, same Plan, and only one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bases import Bench, metrics
from slimtune.pipeline import tune


def test_two_processes_do_what_one_does(bench: Bench, tmp_path: Path) -> None:
    compensate = {"generator__prior": "mixed", "compensate__weights": "decide"}
    overrides = {**compensate, "generator__prior_steps": 2, "train__micro_batch": 2}
    one = tune(bench.recipe(tmp_path / "one", **overrides))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(bench.recipe(tmp_path / "two", **overrides).to_yaml(), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, "-m", "slimtune", "tune", str(recipe)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "summary.json").read_text(encoding="utf-8"))
    assert two["plan"] == one["plan"]
    assert two["tokens"] == one["tokens"]
    rows = [[row for row in metrics(tmp_path / name) if "step" in row] for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 8
    for ours, theirs in zip(*rows, strict=True):
        for key in ("decide_loss", "adapt_loss"):
            if key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-5)
    assert two["result"]["ppl"] == pytest.approx(one["result"]["ppl"], rel=1e-4)
