"""The shipped recipes: short, valid, within reach of their budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slimtune.estimate import estimate
from slimtune.recipe import load

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SHAPES: dict[str, dict[str, Any]] = json.loads((FOLDER.parent / "benchmarks" / "shapes.json").read_text())
"""What the hub's config.json says, so that nothing is downloaded."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMTUNE_DATA", "somewhere")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30
    recipe = load(path)
    assert recipe.data.train
    assert recipe.out == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("shape", "total"), [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("qwen3-1.7b", 1_720_574_976)]
)
def test_the_estimate_of_a_hub_recipe(shape: str, total: int) -> None:
    path = next(path for path in RECIPES if path.stem.startswith(shape))
    overrides = ['model.path=""', "model.init=config", f"model.config={SHAPES[shape]}"]
    made = estimate(load(path, overrides), measure=False)
    assert made.problem is None
    assert made.to_dict()["before"]["total"] == total
