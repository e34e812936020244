"""From the embedded base to experts, by the commands that a user gives: converted, loaded alone, run in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from slimtune.cli import app

pytestmark = [pytest.mark.usefixtures("forked"), pytest.mark.timeout(180)]
RECIPE = Path(__file__).parents[2] / "recipes" / "tomoe-demo.yaml"
FEW = [
    "search.steps=2",
    "recover.steps=2",
    "moe.prior_steps=1",
    "train.batch=2",
    "data.max_length=128",
    "evaluate.every=0",
    "evaluate.windows=8",
    "budget.tolerance=0.01",
    "device=cpu",
]


def converted(out: Path, *words: str) -> dict:
    done = CliRunner().invoke(app, ["convert", str(RECIPE), f"out={out}", *FEW, *words])
    assert done.exit_code == 0, done.output
    found: dict = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return found


def test_the_embedded_base_becomes_a_mixtral_that_llama_cpp_runs(tmp_path: Path) -> None:
    summary = converted(tmp_path / "run", "moe.shared=false")
    assert summary["result"]["class"] == "MixtralForCausalLM"
    assert summary["reload_difference"] < 1e-4
    assert abs(summary["result"]["active_ratio"] - 0.6) <= 0.01
    assert summary["result"]["parameters"] <= 1.01 * summary["base"]["parameters"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert sum(each.numel() for each in model.parameters()) == summary["result"]["parameters"]
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--to", "gguf", "-q", "f32", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["architecture"] == "llama"
    assert found["tokens_same"] == found["tokens"]


def test_a_recipe_that_makes_no_experts_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(RECIPE), f"out={tmp_path / 'run'}", "method=atp"])
    assert done.exit_code == 2
    assert "makes no experts: add method=tomoe" in done.output
