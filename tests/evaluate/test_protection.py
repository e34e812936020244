"""Which tasks a run protected: those of its recipe, and those that read the recipe's own held-out files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bases import make_tokenizer, write_rows
from slimtune.errors import UserError
from slimtune.evaluate.protection import Run, not_protected, runs_behind, tell_of_base
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
    return not_protected([Run(Recipe.model_validate(sections))], tasks)


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


def test_a_task_whose_file_is_the_same_but_not_its_rows_is_not_protected(tasks: list[Prepared], tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"evaluate": {"tasks": [str(tmp_path / "a.yaml")]}})
    for rows, names in (({}, ["b", "c"]), ({"a": tasks[0].whole}, ["b", "c"]), ({"a": "other"}, ["a", "b", "c"])):
        assert not_protected([Run(recipe, rows)], tasks) == names
    held = Recipe.model_validate({"evaluate": {"tasks": [str(tmp_path / "a.yaml")]}, "data": {"test": tasks[0].source}})
    assert not_protected([Run(held, {"a": "other"})], tasks) == ["b", "c"]


def run_of(folder: Path, recipe: Recipe, summary: str = "{}") -> str:
    """A run's folder with all that is read of it; its model."""
    (folder / "model").mkdir(parents=True)
    for name, text in (("recipe.yaml", recipe.to_yaml()), ("stages.json", "{}"), ("summary.json", summary)):
        (folder / name).write_text(text)
    return str(folder / "model")


def test_the_runs_behind_a_model(tmp_path: Path) -> None:
    assert runs_behind("org/model") == []
    other = Recipe.model_validate({"data": {"train": "rows.jsonl"}, "model": {"path": "org/model"}})
    base = run_of(tmp_path / "base", other, '{"task_rows": {"a": "b"}}')
    teacher = run_of(tmp_path / "teacher", other, "no JSON")
    recipe = Recipe.model_validate({"model": {"path": base}, "distill": {"teacher": teacher, "weight": 1.0}})
    model = run_of(tmp_path / "run", recipe)
    assert runs_behind(model) == [Run(recipe), Run(other), Run(other, {"a": "b"})]
    (tmp_path / "base" / "stages.json").unlink()  # some other recipe's folder
    assert runs_behind(base) == []
    (tmp_path / "teacher" / "recipe.yaml").write_text("nonsense: 1")
    with pytest.raises(UserError, match=r"teacher/recipe\.yaml cannot be read: .*unknown key 'nonsense'"):
        runs_behind(model)


def test_relative_paths_go_by_where_the_run_was_started(
    tasks: list[Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.model_validate({"evaluate": {"tasks": ["a.yaml"]}, "data": {"test": "b-test.jsonl"}})
    model = run_of(tmp_path / "run", recipe)
    (tmp_path / "run" / "stages.json").write_text(json.dumps({"cwd": str(tmp_path)}))
    other = tmp_path / "other"
    other.mkdir()
    write_rows(other / "b-test.jsonl", [{"text": "what the run may have learned"}])
    (other / "b.yaml").write_text((tmp_path / "b.yaml").read_text())
    monkeypatch.chdir(other)
    here = prepare(find_task("b.yaml", other), "test", make_tokenizer(), 128)
    assert not_protected(runs_behind(model), tasks) == ["c"]
    assert not_protected(runs_behind(model), [here]) == ["b"]


def test_what_the_run_of_a_base_did_not_protect_is_told(tasks: list[Prepared], tmp_path: Path) -> None:
    test = str(tmp_path / "b-test.jsonl")
    base = run_of(tmp_path / "base", Recipe.model_validate({"evaluate": {"tasks": [str(tmp_path / "a.yaml")]}}))
    other = run_of(tmp_path / "else", Recipe.model_validate({"data": {"test": test}, "model": {"path": base}}))

    def told(path: str, **data: Any) -> list[str]:
        lines: list[str] = []
        tell_of_base(Recipe.model_validate({"model": {"path": path}, "data": data}), tasks[:2], lines.append)
        return [line.split("learned: ")[-1].removesuffix("[/yellow]") for line in lines]

    assert told("org/model", test=test) == []
    assert told(base) == ["b"]
    assert told(base, test=test) == [f"b, data.test ({test})"]
    assert told(other, test=test) == [f"a, b, data.test ({test})"]  # each was kept from one of the two only
    (tmp_path / "base" / "recipe.yaml").write_text("nonsense: 1")
    assert "nonsense" in told(other)[0]
