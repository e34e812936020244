"""From the embedded base to experts, by the commands that a user gives: converted, loaded alone, run in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from slimtune.cli import app
from slimtune.data.batches import load_splits
from slimtune.export import adapter, apply
from slimtune.methods.masked import routed
from slimtune.models.buffers import exact_buffers
from slimtune.models.load import load_config, load_tokenizer, structure_of
from slimtune.prune.router import Router
from slimtune.recipe import Recipe
from slimtune.recipe import load as load_recipe
from slimtune.structure.experts import host_of
from slimtune.structure.plan import Plan

pytestmark = [pytest.mark.usefixtures("forked"), pytest.mark.timeout(180)]
WINDOWS = 32
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
    assert summary["result"]["parameters"] <= summary["base"]["parameters"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", dtype=torch.float32)
    assert sum(each.numel() for each in model.parameters()) == summary["result"]["parameters"]
    done = CliRunner().invoke(app, ["export", str(tmp_path / "run"), "--to", "gguf", "-q", "f32", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["architecture"] == "llama"
    assert found["tokens_same"] == found["tokens"]
    check_perplexity(tmp_path / "run")


def test_every_expert_is_used_and_what_is_written_has_the_perplexity_of_the_gated_model(tmp_path: Path) -> None:
    """Held-out rows of text, both types; with a shared expert."""
    summary = converted(tmp_path / "run", "budget.keep=0.9", "moe.prior_steps=4", "recover.steps=4")
    assert summary["result"]["class"] == "Glm4MoeForCausalLM"
    assert min(min(layer) for layer in summary["shares"]) >= 0.01
    check_perplexity(tmp_path / "run")


def check_perplexity(out: Path) -> None:
    """Of the gated model, built from the base and the run's files, and of the written one."""
    recipe, folder = load_recipe(RECIPE, [f"out={out}", *FEW]), out / "adapter"
    plan, structure = Plan.from_json((out / "plan.json").read_text(encoding="utf-8")), structure_of(load_config(recipe.model))
    model, _ = apply._built(recipe.model, structure, plan, folder, adapter.read_record(folder))
    stored, first = load_file(folder / adapter.ROUTERS), plan.experts[0]
    host = host_of(structure.family, bool(first.shared))
    router = Router(structure.hidden, len(stored), len(first.routed), plan.top_k, host)
    router.start({int(layer): weight for layer, weight in stored.items()})
    ids = windows(recipe)
    for dtype in (torch.float32, torch.bfloat16):
        exact_buffers(model.to(dtype), model.config)
        with routed(model, structure, plan, router.rounded(dtype)):
            gated = perplexity(model, ids)
        found = perplexity(AutoModelForCausalLM.from_pretrained(out / "model", dtype=dtype), ids)
        # 0.01 of a perplexity of ten: 16 bits round sums of another order otherwise, and this one is hardly tuned
        assert abs(found - gated) < (0.01 if dtype is torch.float32 else 0.001 * gated)


def windows(recipe: Recipe) -> Tensor:
    """Test windows of the recipe's text [B, T], the full ones."""
    tokenizer = load_tokenizer(recipe.model)
    test = load_splits(recipe.data, tokenizer, frozenset({"test"})).test
    ids = [test.collate([index])["input_ids"] for index in range(len(test))]
    return torch.cat([each for each in ids if each.shape == (1, recipe.data.max_length)][:WINDOWS])


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    """Of ``ids`` [B, T]."""
    logits = model.eval()(input_ids=ids).logits[:, :-1].flatten(0, 1).float()
    return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).exp())


def test_a_recipe_that_makes_no_experts_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["convert", str(RECIPE), f"out={tmp_path / 'run'}", "method=atp"])
    assert done.exit_code == 2
    assert "makes no experts: add method=tomoe" in done.output
