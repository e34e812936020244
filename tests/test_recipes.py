"""The shipped recipes: short, valid, within reach of their budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slimtune.estimate import estimate
from slimtune.recipe import load

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
}
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
