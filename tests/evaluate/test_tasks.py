"""Task and suite files: what is shipped, what a user may write, and how a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from slimtune.errors import UserError
from slimtune.evaluate.shipped import built_in
from slimtune.evaluate.tasks import Task, find_suites, find_task

FOLDER = Path(__file__).parents[2] / "src" / "slimtune" / "assets"


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def source_path(task: Task, split: str = "test", index: int = 0) -> str:
    return task.source(task.file.sources[index], split).path  # type: ignore[arg-type]


@pytest.mark.parametrize("name", built_in("tasks"))
def test_shipped_tasks_are_short_and_have_both_splits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SLIMTUNE_DATA", "SLIMTUNE_MEDNLI"):
        monkeypatch.setenv(variable, "/somewhere")
    task = find_task(name)
    assert task.about
    assert len((FOLDER / "tasks" / f"{name}.yaml").read_text().splitlines()) <= 15
    for raw in task.file.sources:
        test, valid = (task.source(raw, split) for split in ("test", "valid"))  # type: ignore[arg-type]
        assert (test.path, test.split) != (valid.path, valid.split)


def test_every_suite_of_a_domain_shows_what_was_forgotten() -> None:
    assert built_in("suites") == ["general", "healthcare", "legal"]
    general = ["wikitext2", "general_docs"]
    for suite, first in (("healthcare", "pubmedqa"), ("legal", "casehold")):
        found = find_suites([suite])
        assert list(found) == [suite, "general"]
        assert found[suite][0].name == first
        assert [task.name for task in found["general"]] == general


def test_a_suite_file_names_tasks_beside_it(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", "metric: choice\nsources: [{path: 'rows-{split}.jsonl'}]")
    write(tmp_path, "rows-test.jsonl", "")
    suite = write(tmp_path, "all.yaml", "tasks: [mine.yaml, rqe]\nsuites: [general]")
    found = find_suites([suite])
    assert {name: [task.name for task in tasks] for name, tasks in found.items()} == {
        "all": ["mine", "rqe"],
        "general": ["wikitext2", "general_docs"],
    }
    assert source_path(found["all"][0]) == str(tmp_path / "rows-test.jsonl")
    assert source_path(found["all"][0], "valid") == "rows-valid.jsonl"  # not beside the file: as it stands


def test_the_split_of_a_hub_data_set(tmp_path: Path) -> None:
    text = "metric: choice\nsources: [{path: org/a, splits: {valid: 'train[:9]'}}, {path: org/b}]"
    task = find_task(write(tmp_path, "t.yaml", text))
    first, second = task.file.sources
    assert [task.source(first, split).split for split in ("test", "valid")] == ["test", "train[:9]"]
    with pytest.raises(UserError, match=r"'t' has no valid rows: its path 'org/b' is the same"):
        task.source(second, "valid")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metric: choise\nsources: [{path: a}]", r"metric='choise' is not valid"),
        ("metrics: choice\nsources: [{path: a}]", r"(metric is missing|unknown key 'metrics'\. Did you mean 'metric'\?)"),
        ("metric: choice\nsources: []", r"sources=\[\] is not valid"),
        ("metric: choice\nsources: [{path: a, promt: b}]", r"unknown key 'promt' of a source\. Did you mean 'prompt'\?"),
        ("metric: choice\nsources: [{path: a}]\nrows: 0", r"rows=0 is not valid"),
        ("- a", r"must be a mapping"),
        ("metric: [", r"is not valid YAML"),
    ],
)
def test_a_wrong_task_file_is_told(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        find_task(write(tmp_path, "wrong.yaml", text))


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"suite 'helthcare' is unknown\. Did you mean 'healthcare'\?"):
        find_suites(["helthcare"])
    with pytest.raises(UserError, match=r"suite 'rqe' is unknown\. It is a task: --tasks rqe\."):
        find_suites(["rqe"])
    with pytest.raises(UserError, match=r"task 'legal' is unknown\. It is a suite: --suite legal\."):
        find_task("legal")
    with pytest.raises(UserError, match=r"task file '.*none\.yaml' does not exist"):
        find_task(str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="its name becomes the task's"):
        find_task(write(tmp_path, "a b.yaml", "metric: choice\nsources: [{path: a}]"))


def test_a_suite_that_holds_itself_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds itself"):
        find_suites([write(tmp_path, "loop.yaml", "tasks: [rqe]\nsuites: [loop.yaml]")])
    with pytest.raises(UserError, match="has no tasks"):
        find_suites([write(tmp_path, "empty.yaml", "tasks: []")])


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIMTUNE_DATA", raising=False)
    with pytest.raises(UserError, match="SLIMTUNE_DATA is not set"):
        source_path(find_task("rqe"))


def test_a_source_is_a_path_or_has_one(tmp_path: Path) -> None:
    plain = write(tmp_path, "plain.yaml", "metric: perplexity\nsources: ['rows-{split}.jsonl']\n")
    assert source_path(find_task(plain), "valid") == "rows-valid.jsonl"
    none = write(tmp_path, "none.yaml", "metric: perplexity\nsources: [{text: '{body}'}]\n")
    with pytest.raises(UserError, match="task 'none': a source has no path; name a file"):
        find_task(none)
