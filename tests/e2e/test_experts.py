"""From the embedded base to experts, by the commands that a user gives: converted, loaded alone, run in llama.cpp."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from slimtune.cli import app

pytestmark = [pytest.mark.usefixtures("forked"), pytest.mark.timeout(180)]
ROOT = Path(__file__).parents[2]
ALONE, TEXT = Path(__file__).with_name("alone.py"), "Return a list of"
RECIPE = ROOT / "recipes" / "tomoe-demo.yaml"
FEW = [
    "search.steps=2",
    "recover.steps=2",
    "moe.prior_steps=1",
    "train.batch=2",
    "data.max_length=128",
    "evaluate.every=0",
    "evaluate.windows=8",
    "device=cpu",
]


def converted(out: Path, *words: str) -> dict:
    done = CliRunner().invoke(app, ["convert", str(RECIPE), f"out={out}", *FEW, *words])
    assert done.exit_code == 0, done.output
    found: dict = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return found


def test_the_embedded_base_becomes_a_mixtral_that_llama_cpp_runs(warm: Any, tmp_path: Path) -> None:
    summary = converted(tmp_path / "run", "moe.shared=false", "budget.tolerance=0.01")
    assert summary["result"]["class"] == "MixtralForCausalLM"
    assert summary["reload_difference"] < 1e-4
    assert abs(summary["result"]["active_ratio"] - 0.6) <= 0.01
    assert summary["result"]["parameters"] <= summary["base"]["parameters"]
    model = check_alone(warm, tmp_path / "run" / "model", "mixtral")
    assert sum(each.numel() for each in model.parameters()) == summary["result"]["parameters"]
    check_gguf(tmp_path / "run", "llama")
    check_perplexity(tmp_path / "run")


def test_every_expert_is_used_and_what_is_written_has_the_perplexity_of_the_gated_model(warm: Any, tmp_path: Path) -> None:
    """Held-out rows of text, both types; with a shared expert, which llama.cpp runs, too."""
    summary = converted(tmp_path / "run", "budget.keep=0.9", "moe.prior_steps=4", "recover.steps=4")
    assert summary["result"]["class"] == "Glm4MoeForCausalLM"
    assert abs(summary["result"]["active_ratio"] - 0.9) <= 0.002
    assert min(min(layer) for layer in summary["shares"]) >= 0.01
    check_perplexity(tmp_path / "run")
    check_alone(warm, tmp_path / "run" / "model", "glm4_moe")
    check_gguf(tmp_path / "run", "glm4moe")
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "run")]).exit_code == 0


def check_gguf(out: Path, architecture: str) -> None:
    done = CliRunner().invoke(app, ["export", str(out), "--to", "gguf", "-q", "f32", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["architecture"] == architecture
    assert found["tokens_same"] == found["tokens"]


def check_alone(warm: Any, folder: Path, name: str) -> Any:
    """A process without slimtune, allowed no code but that of transformers, writes the same as the model here, in fp32."""
    done = warm.run([sys.executable, "-P", str(ALONE), json.dumps([[str(folder)], [TEXT], 6, False])])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])[str(folder)]
    assert found["module"].startswith(f"transformers.models.{name}.")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(found["ids"])
    written = model.eval().generate(ids, do_sample=False, max_new_tokens=6, min_new_tokens=6)[0, ids.shape[1] :]
    assert [written.tolist()] == found["tokens"]
    assert found["static"] == written.tolist()
    assert found["same_text"]
    return model


def check_perplexity(out: Path) -> None:
    """Of the gated model, built from the base and the run's files, and of the written one."""
    path = ROOT / "benchmarks" / "routing.py"
    routing = runpy.run_path(str(path))
    exact, short = routing["rows_of"](out, 32, torch.device("cpu"), again=False)
    assert exact["same"] >= 0.999
    assert abs(exact["ppl_written"] - exact["ppl_gated"]) < 0.01
    assert short["same_given"] >= 0.999
    # 0.01 of a perplexity of ten: 16 bits round sums of another order otherwise, and this one is hardly tuned
    assert abs(short["ppl_written"] - short["ppl_gated"]) < 0.001 * short["ppl_gated"]


def test_a_recipe_that_makes_no_experts_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(RECIPE), f"out={tmp_path / 'run'}", "method=atp"])
    assert done.exit_code == 2
    assert "makes no experts: add method=tomoe" in done.output
