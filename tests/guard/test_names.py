"""What a guard may name, and what it is refused for before anything is read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from slimtune.errors import UserError
from slimtune.evaluate import folder
from slimtune.guard import names
from slimtune.guard.names import at_steps, check, figures_of
from slimtune.recipe import Recipe, parse
from slimtune.train.task_figures import names_of

TASKS = ("pubmedqa", "rqe", "meqsum", "wikitext2")


def recipe(guard: dict[str, str], **changed: Any) -> Recipe:
    return parse({"guard": guard, "evaluate": {"tasks": list(TASKS), "dense_lora": True}} | changed)


@pytest.mark.parametrize(
    ("guard", "figures"),
    [
        ("ppl", ["ppl"]),
        ("block_ratio", ["block_ratio"]),
        ("active_ratio", ["active_ratio"]),
        ("healthcare.pubmedqa.accuracy", ["pubmedqa.accuracy"]),
        ("pubmedqa.macro_f1", ["pubmedqa.macro_f1"]),
        ("healthcare.accuracy", ["pubmedqa.accuracy", "rqe.accuracy"]),
        ("healthcare.rougeL", ["meqsum.rougeL"]),
        ("general.bits_per_byte", ["wikitext2.bits_per_byte"]),
        ("healthcare.wikitext2.perplexity", ["wikitext2.perplexity"]),  # general is a suite inside it
        ("speed.decode_ms", ["speed.decode_ms"]),
        ("speed.prefill_ms@8", ["speed.prefill_ms@8"]),
        ("speed.memory_bytes", ["speed.memory_bytes"]),
    ],
)
def test_figures_by_name(guard: str, figures: list[str]) -> None:
    assert figures_of(guard, TASKS) == figures


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        ("pubmed.accuracy", r"'pubmed' is no figure, followed task or suite\. Did you mean 'pubmedqa'\?"),
        ("perplexity", r"'perplexity' is no .* Figures: ppl, loss"),
        ("medmcqa.accuracy", r"'medmcqa' is no .* tasks of evaluate\.tasks: pubmedqa, rqe"),
        ("healthcare.medmcqa.accuracy", r"the run does not follow 'medmcqa'; add it to evaluate\.tasks"),
        ("healthcare.casehold.accuracy", r"'casehold' is no task of healthcare\. Its: pubmedqa, rqe"),
        ("healthcare.pubmedqa", r"task 'pubmedqa' has several figures: name one\. Its: accuracy, macro_f1"),
        ("healthcare", r"name a figure\. Figures of healthcare: accuracy, macro_f1"),
        ("healthcare.acuracy", r"no task of healthcare has 'acuracy'\. Did you mean 'accuracy'\?"),
        ("healthcare.perplexity", r"the run follows none of healthcare_docs; add one to evaluate\.tasks"),
        ("general.accuracy", r"no task of general has 'accuracy'\. Figures of general: perplexity, bits_per_byte"),
        ("pubmedqa.rougeL", r"task 'pubmedqa' has no figure 'rougeL'\. Its: accuracy, macro_f1"),
        ("pubmedqa.acuracy", r"Did you mean 'accuracy'\?"),
        ("speed.decode", r"no such figure of speed; name speed\.prefill_ms, speed\.decode_ms"),
        ("speed.first_token_ms@8", r"speed\.first_token_ms \(of one row\)"),
        ("speed.decode_ms@0", "no such figure of speed"),
        ("ppl.x", r"'ppl' is no figure, followed task or suite"),
    ],
)
def test_what_names_nothing_says_what_there_is(guard: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        figures_of(guard, TASKS)
    assert str(caught.value).startswith(f"guard.{guard}: ")


def test_without_tasks_that_is_told() -> None:
    with pytest.raises(UserError, match=r"evaluate\.tasks names none to follow"):
        figures_of("rqe.accuracy", ())


def test_a_task_of_ones_own_goes_by_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("metric: choice\nsources: [rows.jsonl]\n")
    (tmp_path / "marks.py").write_text("def mark(answer, row): return 1.0\n")
    (tmp_path / "cited.yaml").write_text("metric: marks.py:mark\nsources: [rows.jsonl]\n")
    tasks = [str(tmp_path / f"{name}.yaml") for name in ("mine", "cited")]
    assert figures_of("mine.accuracy", tasks) == ["mine.accuracy"]
    assert figures_of("cited.anything", tasks) == ["cited.anything"]  # known when the function was tried on its rows
    with pytest.raises(UserError, match=r"task 'cited' has several figures: name one\. Its: those that its function gives"):
        figures_of("cited", tasks)


def test_figures_of_tasks_are_those_that_are_taken() -> None:
    assert {kind: (*figures,) for kind, figures in folder._METRICS.items()} == names._METRICS


def test_what_is_taken_at_every_evaluation() -> None:
    assert all(map(at_steps, ("ppl", "loss", "rqe.accuracy", "mine.x")))
    assert not [name for name in (*names.OWN, "speed.decode_ms") if at_steps(name) and name not in ("ppl", "loss")]
    assert not names_of([dict.fromkeys(names.OWN, 1.0)])  # no figure of a run could be taken for one of a task


def test_guards_by_figure() -> None:
    found = check(recipe({"rqe.accuracy": "> 0.5", "healthcare.accuracy": ">= 0.9 x base", "bytes": "<= 0.6 x dense"}))
    assert {figure: [(name, bound.text) for name, bound in bounds] for figure, bounds in found.items()} == {
        "rqe.accuracy": [("rqe.accuracy", "> 0.5"), ("healthcare.accuracy", ">= 0.9 x base")],
        "pubmedqa.accuracy": [("healthcare.accuracy", ">= 0.9 x base")],
        "bytes": [("bytes", "<= 0.6 x dense")],
    }


def test_the_examples_of_the_documentation_can_be_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guard.md").read_text(encoding="utf-8")
    example, command = (yaml.safe_load(part.partition("```")[0]) for part in page.split("```yaml\n")[1:])
    assert list(check(parse(example))) == ["pubmedqa.accuracy", "wikitext2.bits_per_byte", "speed.decode_ms"]
    assert parse(command).alarm.command[0] == "sh"
    assert len(parse(command).alarm.command) == 3
    table = page.partition("| guard | figure |")[2].partition("## Conditions")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`([^`]+)`", row.partition(" | ")[0])]
    assert {*names.OWN} <= {*named}
    assert sum(bool(names.SPEED.fullmatch(name)) for name in named) == 5


SCRATCH = {"model": {"init": "config", "path": "x"}, "method": "finetune"}


@pytest.mark.parametrize(
    ("guard", "changed", "message"),
    [
        (
            {"ppl": "<= dense"},
            {"evaluate": {"base": False}},
            "to the base, which evaluate.base=false leaves unmeasured",
        ),
        ({"ppl": "<= dense"}, SCRATCH, "relative to the base, and model.init=config has none; give a number"),
        ({"speed.decode_ms": "<= dense"}, SCRATCH, "relative to the base, and model.init=config has none"),
        ({"seconds": "<= 2 x base"}, {}, "the base, which was not trained here; write dense_lora, or a number"),
        ({"memory": "<= dense"}, {}, "the base, which was not trained here"),
        ({"ppl": "<= dense_lora"}, {"evaluate": {}}, "needs evaluate.dense_lora=true"),
        (
            {"ppl": "<= dense_lora"},
            {"method": "finetune"},
            "dense_lora=true.*; method=finetune has no such reference",
        ),
        ({"bytes": "<= dense_lora"}, {}, "relative to a model that is not written: write dense for dense_lora"),
        ({"speed.decode_ms": "<= dense_lora"}, {}, "as fast tuned as untuned: write dense for dense_lora"),
        ({"speed.decode_ms": "< 5"}, {"speed": {"measure": False}}, "speed.measure=false leaves it unmeasured"),
        ({"speed.decode_ms@8": "< 5"}, {}, r"speed.batches=\[1\] does not hold it beside a smaller one; add it$"),
        ({"speed.decode_ms@8": "< 5"}, {"speed": {"batches": [16, 8]}}, r"the smallest has no @: speed.decode_ms$"),
        ({"speed.decode_ms@8": "< 5"}, {"speed": {"batches": [8, 8]}}, "does not hold it beside a smaller one"),
        ({}, {"alarm": {"then": "stop"}}, "alarm is set, but guard has no bound that could be left"),
        ({}, {"alarm": {"webhook": "https://x.example"}}, "alarm is set, but guard has no bound"),
    ],
)
def test_what_cannot_be_held_is_refused(guard: dict[str, str], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(recipe(guard, **changed))


@pytest.mark.parametrize(("guard", "instead"), [("active_parameters", "parameters"), ("active_ratio", "block_ratio")])
def test_what_a_token_uses_is_held_where_experts_are_made(guard: str, instead: str) -> None:
    assert check(parse({"method": "tomoe", "guard": {guard: "<= 0.7 x dense"}}))
    with pytest.raises(UserError, match=rf"method=atp makes no experts, .*: write {instead} for {guard}"):
        check(parse({"guard": {guard: "<= 0.7 x dense"}}))


def test_what_is_measured_without_the_base_or_by_the_bench_may_be_held() -> None:
    assert check(recipe({"ppl": "<= 30"}, evaluate={"base": False}))
    assert check(recipe({"speed.decode_ms": "<= 0.7 x dense"}, evaluate={"base": False}))  # timed beside the base itself
    assert check(recipe({"speed.decode_ms@8": "< 5"}, speed={"batches": [8, 1]}))
    assert check(recipe({"seconds": "<= 2 x dense_lora"}))
