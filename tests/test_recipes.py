"""The shipped recipes: short, valid, within reach of their budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from slimtune.comparison import config, jobs
from slimtune.data import sources
from slimtune.estimate import estimate
from slimtune.evaluate.tasks import find_task
from slimtune.recipe import Recipe, load

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
COMPARISONS = sorted((FOLDER / "compare").glob("*.yaml"))
SHAPES: dict[str, dict[str, Any]] = json.loads((FOLDER.parent / "benchmarks" / "shapes.json").read_text())
"""What the hub's config.json says, so that nothing is downloaded."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLIMTUNE_DATA", "SLIMTUNE_MEDNLI"):
        monkeypatch.setenv(name, "somewhere")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30
    recipe = load(path)
    assert recipe.data.train
    assert recipe.out == f"runs/{path.stem}"


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_is_short_and_its_runs_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMTUNE_DATA", "somewhere")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30
    found = config.load(path)
    assert found.out == f"runs/compare-{path.stem}"
    assert {"atp", "dense_lora"} < set(found.methods)
    there = get_args(Recipe.model_fields["method"].annotation)
    valid = {name: method for name, method in found.methods.items() if method.changes.get("method", "atp") in there}
    work = jobs.jobs_of(found.model_copy(update={"methods": valid}))
    assert {job.method for job in work} == set(valid)
    budgets = sum(1 if name == "dense_lora" else len(method.keep or found.keep) for name, method in valid.items())
    assert len(work) == len(found.seeds) * budgets
    costs = {job.windows for job in work if job.method in ("atp", "dense_lora")}
    assert max(costs) - min(costs) < work[0].recipe.train.batch


HUB_ROWS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    (
        "llama-2-7b-pubmedqa",
        "test",
        {
            "pubid": 1,
            "question": "Is it so?",
            "context": {"contexts": ["First {part}.", "Second."], "labels": ["A", "B"], "meshes": ["M"]},
            "long_answer": "It may be.",
            "final_decision": "maybe",
        },
        {
            "prompt": "Abstract: First {part}. Second.\nQuestion: Is it so?\nAnswer (yes, no or maybe):",
            "completion": " maybe",
            "choices": (" yes", " no", " maybe"),
            "label": 2,
        },
    ),
    (
        "llama-3-8b-casehold",
        "train",
        {"context": "The court (<HOLDING>).", "endings": ["a", "b", "c", "d", "e"], "label": 3},
        {
            "prompt": "The court (<HOLDING>).\n(A) a\n(B) b\n(C) c\n(D) d\n(E) e\nThe correct holding is",
            "completion": " (D)",
            "choices": (" (A)", " (B)", " (C)", " (D)", " (E)"),
            "label": 3,
        },
    ),
    (
        "qwen3-1.7b-billsum",
        "train",
        {"text": "SECTION 1.", "summary": "Amends.", "title": "An act"},
        {"prompt": "Bill: SECTION 1.\nSummary:", "completion": " Amends.", "choices": None, "label": None},
    ),
]
"""A row each with the fields and types that the data sets' pages on the hub give, and what the recipe makes of it."""


@pytest.mark.parametrize(("name", "split", "fields", "expected"), HUB_ROWS, ids=[row[0] for row in HUB_ROWS])
def test_the_templates_of_a_hub_recipe(
    name: str, split: str, fields: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = getattr(load(FOLDER / f"{name}.yaml").data, split)[0]
    monkeypatch.setattr(sources, "records", lambda asked: iter([(asked.path, fields)]))
    (row,) = sources.read(source)
    assert {key: getattr(row, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("llama-2-7b-pubmedqa", "pubmedqa"),
        ("llama-3-8b-casehold", "casehold"),
        ("llama-3-8b-mednli", "mednli"),
        ("qwen3-1.7b-billsum", "billsum"),
    ],
)
def test_a_hub_recipe_trains_with_the_prompts_of_the_task(name: str, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIMTUNE_MEDNLI", "somewhere")
    asked = find_task(task).file.sources[-1]
    for source in load(FOLDER / f"{name}.yaml").data.train:
        for key in ("prompt", "completion", "label"):
            assert getattr(source, key) == asked.get(key)


@pytest.mark.parametrize(
    ("shape", "total"), [("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("qwen3-1.7b", 1_720_574_976)]
)
def test_the_estimate_of_a_hub_recipe(shape: str, total: int) -> None:
    path = next(path for path in RECIPES if path.stem.startswith(shape))
    overrides = ['model.path=""', "model.init=config", f"model.config={SHAPES[shape]}"]
    made = estimate(load(path, overrides), measure=False)
    assert made.problem is None
    assert made.to_dict()["before"]["total"] == total
