"""The comparison file: what it says, and what is wrong with it in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from comparisons import write_comparison
from slimtune.comparison.config import load
from slimtune.errors import UserError


def test_a_file_says_what_all_runs_share_and_what_each_method_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOMEWHERE", "/else")
    methods = {"atp": None, "small": {"method": "finetune", "model": {"path": "${SOMEWHERE}/{keep}"}, "keep": 0.6}}
    found = load(write_comparison(tmp_path, keep=0.6, methods=methods))
    assert (found.keep, found.seeds, found.recipe) == ((0.6,), (0, 1), str(tmp_path / "recipe.yaml"))
    assert found.methods["atp"].changes == {}
    assert found.methods["small"].keep == (0.6,)
    assert found.methods["small"].changes == {"method": "finetune", "model.path": "/else/{keep}"}
    with pytest.raises(ValidationError, match="frozen"):
        found.domain = "other"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"seedz": [0]}, "comparison: unknown key 'seedz'. Did you mean 'seeds'?"),
    ({"domain": None, "domian": "x"}, "comparison: unknown key 'domian'. Did you mean 'domain'?"),
    ({"base": None}, "comparison: the key 'base' is missing"),
    ({"keep": [0.6, 1.2]}, "comparison: keep.1=1.2 is not valid: Input should be less than or equal to 1"),
    ({"seeds": [0, 0]}, "comparison: seeds=[0, 0] is not valid: an item stands there twice"),
    ({"seeds": []}, "comparison: seeds=[] is not valid"),
    ({"methods": {}}, "comparison: methods={} is not valid"),
    ({"methods": {"a/b": {}}}, "comparison: methods.a/b='a/b' is not valid: String should match"),
    ({"methods": {"atp": "finetune"}}, "comparison: methods.atp='finetune' is not valid: it must be a mapping"),
    ({"set": {"budget.keep": 0.5}}, "comparison: set: budget.keep cannot stand there: the comparison's `keep`"),
    ({"methods": {"atp": {"evaluate": {"dense_lora": True}}}}, "methods.atp: evaluate.dense_lora cannot stand there: a method"),
    ({"recipe": "nowhere.yaml"}, "comparison: recipe='nowhere.yaml' does not exist beside"),
    ({"out": "${NOT_SET_ANYWHERE}"}, "the environment variable NOT_SET_ANYWHERE is not set"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:45] for _, message in BAD])
def test_what_is_wrong_is_said_in_one_sentence(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(write_comparison(tmp_path, **changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_no_comparison() -> None:
    file = Path(__file__).parents[2] / "recipes" / "demo.yaml"
    with pytest.raises(
        UserError, match=r"demo.yaml' is a recipe for slimtune tune; .* holds recipe, base, domain, out, methods"
    ):
        load(file)


def test_no_file() -> None:
    with pytest.raises(UserError, match=r"comparison 'nowhere.yaml' does not exist"):
        load("nowhere.yaml")
