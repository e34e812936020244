"""The runs of a comparison: at equal cost, checked before the first one, the same on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from comparisons import write_comparison
from slimtune.comparison.config import load
from slimtune.comparison.jobs import Job, chosen, jobs_of, words_of
from slimtune.errors import UserError


def runs(folder: Path, **changes: Any) -> list[Job]:
    return jobs_of(load(write_comparison(folder, **changes)))


def test_every_method_runs_at_every_budget_and_what_cuts_nothing_once_a_seed(tmp_path: Path) -> None:
    jobs = runs(tmp_path)
    expected = [
        ("atp", 0.8, 0),
        ("atp", 0.6, 0),
        ("dense_lora", 1.0, 0),
        ("atp", 0.8, 1),
        ("atp", 0.6, 1),
        ("dense_lora", 1.0, 1),
    ]
    assert [(job.method, job.keep, job.seed) for job in jobs] == expected
    assert [job.folder.name for job in jobs[:3]] == ["atp-0.8-0", "atp-0.6-0", "dense_lora-0"]
    assert [job.recipe.budget.keep for job in jobs[:2]] == [0.8, 0.6]


def test_tuning_alone_reads_the_windows_that_atp_reads(tmp_path: Path) -> None:
    atp, dense = runs(tmp_path, keep=0.6, seeds=0)
    assert atp.windows == atp.recipe.windows == 52
    assert (atp.steps, dense.steps, dense.windows) == (10, 13, 52)
    assert dense.tokens == 52 * 512
    halved = {"dense_lora": {"method": "finetune", "train.batch": 8}}
    assert [job.steps for job in runs(tmp_path, methods=halved, seeds=0)] == [6]
    given = {"dense_lora": {"method": "finetune", "train": {"steps": 7}}}
    assert [job.steps for job in runs(tmp_path, methods=given, seeds=0)] == [7]
    longer = runs(tmp_path, set={"recover.steps": 16}, seeds=0)
    assert [job.windows for job in longer] == [92, 92, 92]


def test_a_method_may_say_which_budgets_it_stands_for(tmp_path: Path) -> None:
    small = {"method": "finetune", "model.path": "runs/small-{keep}", "keep": [0.6, 0.5]}
    jobs = runs(tmp_path, methods={"atp": {"keep": 0.8}, "small": small}, seeds=0)
    assert [(job.method, job.keep) for job in jobs] == [("atp", 0.8), ("small", 0.6), ("small", 0.5)]
    assert [job.recipe.model.path for job in jobs[1:]] == ["runs/small-0.6", "runs/small-0.5"]
    with pytest.raises(UserError, match=r"methods.small uses \{keep\} but has no budget"):
        runs(tmp_path, methods={"small": {**small, "keep": None}, "atp": {}})


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"methods": {"atp": {}, "mine": {"lora.rnk": 3}}},
        "comparison: methods.mine: unknown key 'lora.rnk'. Did you mean 'lora.rank'?",
    ),
    ({"methods": {"mine": {"method": "prune"}}}, "comparison: methods.mine: method='prune' is not valid"),
    ({"methods": {"mine": {"lora": {"rank": 0}}}}, "comparison: methods.mine: lora.rank=0 is not valid"),
    ({"methods": {"mine": {"search.steps": 0, "generator.prior": "none"}}}, "methods.mine: search.steps=0 leaves nothing"),
    ({"set": {"trian.batch": 3}}, "comparison: set: unknown key 'trian'. Did you mean 'train'?"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[12:50] for _, message in BAD])
def test_a_run_that_is_no_recipe_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        runs(tmp_path, **changes)
    assert message in str(caught.value)


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    values = {
        "a": "plain",
        "b": "0.5",
        "c": True,
        "d": None,
        "e": [{"path": "x: y"}],
        "f": 1e-9,
        "g": "",
        "h": "two\nlines",
        "i": "a: b",
    }
    words = words_of(values)
    assert words[:5] == ["a=plain", 'b="0.5"', "c=true", "d=null", 'e=[{"path": "x: y"}]']
    assert words[5:] == ["f=1e-09", 'g=""', 'h="two\\nlines"', 'i="a: b"']


def test_the_digest_follows_the_words_and_the_recipe_but_not_the_folder(tmp_path: Path) -> None:
    first = runs(tmp_path)
    assert len({job.digest for job in first}) == len(first)
    again = runs(tmp_path, out=str(tmp_path / "else"))
    assert [job.digest for job in again] == [job.digest for job in first]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# a comment\n" + recipe.read_text())
    assert jobs_of(load(tmp_path / "comparison.yaml"))[0].digest == first[0].digest
    recipe.write_text(recipe.read_text().replace("prior_steps: 2", "prior_steps: 3"))
    assert jobs_of(load(tmp_path / "comparison.yaml"))[0].digest != first[0].digest


def test_the_digest_follows_the_tasks_that_are_measured(tmp_path: Path) -> None:
    task = tmp_path / "mine.yaml"
    file = write_comparison(tmp_path, set={"evaluate.tasks": [str(task)]})
    found = []
    for tokens in (8, 9, 8):
        task.write_text(f"metric: rouge\ntokens: {tokens}\nsources: [{{path: rows.jsonl}}]\n")
        found.append(jobs_of(load(file))[0].digest)
    assert found[0] == found[2] != found[1]


def test_the_digest_follows_the_functions_that_score(tmp_path: Path) -> None:
    """But no other of the file's neighbours; and none of them is run for it."""
    (tmp_path / "mine.yaml").write_text("metric: scoring.py:f\nsources: [{path: rows.jsonl}]\n")
    file = write_comparison(tmp_path, set={"evaluate.tasks": [str(tmp_path / "mine.yaml")]})
    found = []
    for number in (1, 2, 1):
        (tmp_path / "scoring.py").write_text(f"def f(answer, row): return {number}\nraise AssertionError\n")
        (tmp_path / "other.py").write_text(f"x = {len(found)}\n")
        found.append(jobs_of(load(file))[0].digest)
    assert found[0] == found[2] != found[1]


def test_a_part_can_be_chosen(tmp_path: Path) -> None:
    jobs = runs(tmp_path)
    assert {(job.method, job.keep) for job in chosen(jobs, keep=[0.6])} == {("atp", 0.6), ("dense_lora", 1.0)}
    assert [job.folder.name for job in chosen(jobs, ["atp"], [0.8], [1])] == ["atp-0.8-1"]
    with pytest.raises(UserError, match=r"--only dense_lra: .* Did you mean 'dense_lora'\? It has: atp, dense_lora"):
        chosen(jobs, ["dense_lra"])
    with pytest.raises(UserError, match=r"--keep 0.7: .* It has: 0.8, 0.6"):
        chosen(jobs, keep=[0.7])
    with pytest.raises(UserError, match=r"--seeds 5: .* It has: 0, 1"):
        chosen(jobs, seeds=[5])
