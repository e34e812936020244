"""Which tasks a run protected: those of its recipe, and those that read the recipe's own held-out files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bases import Bench, make_tokenizer, write_rows
from slimtune.errors import UserError
from slimtune.evaluate.leakage import not_protected, recipe_of
from slimtune.evaluate.rows import Prepared, prepare
from slimtune.evaluate.tasks import find_task
from slimtune.recipe import Recipe


@pytest.fixture
def tasks(tmp_path: Path) -> list[Prepared]:
    """Three tasks on files of their own."""
    for name in "abc":
        for split in ("test", "valid"):
            write_rows(tmp_path / f"{name}-{split}.jsonl", [{"text": f"the text of {name} in {split}"}])
        (tmp_path / f"{name}.yaml").write_text(f"metric: perplexity\nsources: [{{path: '{name}-{{split}}.jsonl'}}]")
    return [prepare(find_task(str(tmp_path / f"{name}.yaml")), "test", make_tokenizer(), 128) for name in "abc"]


def left(tasks: list[Prepared], **sections: Any) -> list[str]:
    return not_protected(Recipe.model_validate(sections), tasks)


def test_tasks_of_the_recipe_and_its_own_held_out_files_are_protected(tasks: list[Prepared], tmp_path: Path) -> None:
    a, b = str(tmp_path / "a.yaml"), str(tmp_path / "b-test.jsonl")
    assert left(tasks) == ["a", "b", "c"]
    assert left(tasks, evaluate={"tasks": [a]}) == ["b", "c"]
    for key in ("test", "valid", "protect"):
        assert left(tasks, data={key: b}) == ["a", "c"]
    assert left(tasks, evaluate={"tasks": [a]}, data={"protect": [b, str(tmp_path / "c-test.jsonl")]}) == []
    assert left(tasks, data={"train": b, "protect": str(tmp_path / "b-valid.jsonl")}) == ["a", "b", "c"]


def test_the_first_rows_of_a_file_protect_them_alone(tasks: list[Prepared], tmp_path: Path) -> None:
    assert left(tasks, data={"protect": {"path": str(tmp_path / "b-test.jsonl"), "rows": 1}}) == ["a", "b", "c"]


def test_a_path_is_the_same_however_it_is_written(
    tasks: list[Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert left(tasks, data={"test": "./b-test.jsonl"}) == ["a", "c"]


def test_other_rows_of_a_task_are_not_those_of_the_recipe(tasks: list[Prepared], tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"text": "rows of the user's own"}])
    given = prepare(find_task(str(tmp_path / "a.yaml")).reading(other), "test", make_tokenizer(), 128)
    recipe: dict[str, Any] = {"evaluate": {"tasks": [str(tmp_path / "a.yaml")]}}
    assert left([given], **recipe) == ["a"]
    assert left([given], **recipe, data={"protect": other}) == []
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "a.yaml").write_text((tmp_path / "a.yaml").read_text())
    assert left(tasks, evaluate={"tasks": [str(tmp_path / "else" / "a.yaml")]}) == ["a", "b", "c"]
    assert left(tasks, evaluate={"tasks": [str(tmp_path / "gone.yaml")]}) == ["a", "b", "c"]


def test_the_recipe_of_a_runs_model(bench: Bench, tmp_path: Path) -> None:
    recipe = bench.recipe(tmp_path / "run")
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert recipe_of(str(tmp_path / "run" / "model")) is None
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    assert recipe_of(str(tmp_path / "run" / "model")) is None  # some other recipe
    (tmp_path / "run" / "stages.json").write_text("{}")
    assert recipe_of(str(tmp_path / "run" / "model")) == recipe
    assert recipe_of("org/model") is None
    (tmp_path / "run" / "recipe.yaml").write_text("nonsense: 1")
    with pytest.raises(UserError, match="unknown key 'nonsense'"):
        recipe_of(str(tmp_path / "run" / "model"))
