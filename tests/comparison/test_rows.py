"""Raw rows: flat, joined by what a run is, of several domains in one file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from comparisons import row, write_comparison
from slimtune.comparison.config import load
from slimtune.comparison.jobs import Job, Part, jobs_of
from slimtune.comparison.rows import Row, check_part, has_run, joined, of_run, packed, read, unpacked, write
from slimtune.errors import UserError

SUMMARY = {
    "keep": 0.8,
    "of": "total",
    "base": {"ppl": 40.0, "parameters": 100, "rqe.accuracy": 0.3},
    "result": {
        "ppl": 20.0,
        "ppl_se": 0.5,
        "parameters": 60,
        "seconds": 3.0,
        "block_ratio": 0.5,
        "rqe.accuracy": 0.5,
        "rqe.accuracy_se": 0.1,
        "rqe.accuracy_low": 0.4,
        "rqe.accuracy_majority": 0.4,
        "meqsum.rouge1": 0.6,
        "meqsum.rougeL": 0.3,
        "meqsum.rougeL_chance": 0.25,
        "rqe.rows": 30.0,
        "rqe.note": "text",
    },
    "tokens": {"adapt": 10, "decide": 5},
    "reload_difference": 1e-6,
    "plan": "abc",
    "version": "0",
    "machine": "somewhere",
    "torch": "2",
    "commit": "c",
    "program": "p",
    "words": "w",
    "kv_groups": 3,
}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return jobs_of(load(write_comparison(tmp_path)))[0]


def test_a_row_for_each_metric_and_every_key_with_a_dot_is_one(job: Job) -> None:
    rows = of_run(job, SUMMARY)
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
    assert {row["metric"]: (row["value"], row["se"], row["base_value"]) for row in rows} == {
        "domain_ppl": (20.0, 0.5, 40.0),
        "parameters": (60, None, 100),
        "rqe.accuracy": (0.5, 0.1, 0.3),
        "meqsum.rouge1": (0.6, None, None),
        "meqsum.rougeL": (0.3, None, None),
        "tasks_above_chance": (pytest.approx((0.1 + 0.05) / 2), None, None),
    }
    beside = {row["metric"]: [row.get(name) for name in ("low", "high", "majority", "chance")] for row in rows}
    assert beside["rqe.accuracy"] == [0.4, None, 0.4, None]
    assert beside["meqsum.rougeL"] == [None, None, None, 0.25]
    common = {"base": "tiny", "domain": "somewhere", "method": "atp", "keep": 0.8, "seed": 0, "tokens": 15, "gpu_seconds": 3.0}
    common |= {"machine": "somewhere", "commit": "c", "program": "p", "words": "w", "kv_groups": 3, "block_ratio": 0.5}
    for found in rows:
        assert common.items() <= found.items()


def test_the_accuracy_on_choices_has_its_baseline_and_interval(job: Job) -> None:
    """By hand, Wilson's: the middle (0.9 + 1.92 / 50) / (1 + 3.84 / 50); of the base nothing but its value."""
    figures = {"accuracy": 0.9, "accuracy_se": 0.042, "majority": 0.4, "rows": 50.0}
    summary = {**SUMMARY, "base": {"ppl": 40.0, "accuracy": 0.3}, "result": {**SUMMARY["result"], **figures}}
    (found,) = (row for row in of_run(job, summary) if row["metric"] == "accuracy")
    assert (found["value"], found["se"], found["base_value"], found["majority"]) == (0.9, 0.042, 0.3, 0.4)
    assert (found["low"], found["high"]) == (pytest.approx(0.7864, abs=1e-4), pytest.approx(0.9565, abs=1e-4))


def test_the_perplexitys_row_tells_of_its_windows(job: Job) -> None:
    found = [0.25, -1.5, 0.1234]
    dense = {"ppl": 16.0, "parameters": 100, "seconds": 2.0}
    rows = of_run(job, {**SUMMARY, "windows": {"windows": "abc", "numbers": found}, "dense_lora": dense, "peft": "1"})
    (told,) = (row for row in rows if "windows" in row)
    assert (told["method"], told["metric"], told["peft"]) == ("atp", "domain_ppl", "1")
    assert isinstance(told["windows"], str)
    digest, numbers = unpacked(told["windows"])
    assert digest == "abc"
    assert numbers == pytest.approx(found, abs=1e-4)
    for bad in ([], [math.nan], [7e4]):
        assert packed({"windows": "abc", "numbers": bad}) is None


def test_the_reference_inside_a_run_is_a_row_of_dense_lora(job: Job) -> None:
    dense = {"ppl": 16.0, "parameters": 100, "seconds": 2.0, "tokens": 7, "tuning_tokens": 10}
    rows = joined([], of_run(job, {**SUMMARY, "dense_lora": dense}))
    found = [row for row in rows if row["method"] == "dense_lora" and row["metric"] == "domain_ppl"]
    assert [(row["value"], row["tokens"], row["keep"], row["dense_value"]) for row in found] == [(16.0, 10, 1.0, 16.0)]
    assert {row["dense_value"] for row in rows if row["metric"] == "domain_ppl"} == {16.0}


def test_rows_of_experts_tell_what_a_token_uses(job: Job) -> None:
    result = {**SUMMARY["result"], "active_ratio": 0.4, "active_parameters": 50}
    shares = [[0.25, 0.25, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]]
    rows = of_run(job, {**SUMMARY, "result": result, "shares": shares, "coverage": [0.5, 1.0]})
    keys = ("active_ratio", "least_share", "most_share", "coverage")
    assert {tuple(row[key] for key in keys) for row in rows} == {(0.4, 0.0, 2.0, 0.75)}
    assert all("active_ratio" not in row for row in of_run(job, SUMMARY))


def test_rows_of_several_calls_and_domains_are_joined() -> None:
    first = [row("atp", 0.6, 0, 15.0), row("atp", 0.5, 0, 17.0), row("atp", 0.6, 0, 30.0, domain="other")]
    second = [row("dense_lora", 1.0, 0, 12.0), row("atp", 0.6, 0, 14.0), row("atp", 0.6, 1, 14.5)]
    rows = joined(joined([], first), second)
    found = {(it["domain"], it["method"], it["keep"], it["seed"]): (it["value"], it["dense_value"]) for it in rows}
    assert found == {
        ("other", "atp", 0.6, 0): (30.0, None),
        ("somewhere", "atp", 0.6, 0): (14.0, 12.0),
        ("somewhere", "atp", 0.6, 1): (14.5, None),
        ("somewhere", "atp", 0.5, 0): (17.0, 12.0),
        ("somewhere", "dense_lora", 1.0, 0): (12.0, 12.0),
    }


def test_a_failed_run_is_a_row_until_it_succeeds(job: Job) -> None:
    failed = of_run(job, {"failed": "error: no", "program": "p"})
    assert [(row["metric"], row["value"], row["keep"]) for row in failed] == [("failed", "error: no", 0.8)]
    assert [row["metric"] for row in joined(failed, of_run(job, SUMMARY))] == [
        "domain_ppl",
        "parameters",
        "rqe.accuracy",
        "meqsum.rouge1",
        "meqsum.rougeL",
        "tasks_above_chance",
    ]
    assert not has_run(failed, job, "p")


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_run_without_numbers_is_a_failed_row(job: Job, value: float) -> None:
    summary = {**SUMMARY, "words": job.digest, "result": {**SUMMARY["result"], "ppl": value}}
    (failed,) = of_run(job, summary)
    reason = f"its figures are no numbers (perplexity {value}): lower train.lr, or train.precision=float32"
    assert (failed["metric"], failed["value"]) == ("failed", reason)
    older = [{**row, "value": value} if row["metric"] == "domain_ppl" else row for row in of_run(job, SUMMARY)]
    assert not has_run([{**row, "words": job.digest} for row in older], job, "p")


def test_rows_hold_a_run_of_the_same_words_and_program_alone(job: Job) -> None:
    rows = of_run(job, {**SUMMARY, "words": job.digest})
    assert has_run(rows, job, "p")
    assert not has_run(rows, job, "q")
    assert not has_run(of_run(job, SUMMARY), job, "p")
    assert not has_run([], job, "p")


@pytest.mark.parametrize(
    ("part", "some", "there"),
    [
        (Part(only=("flop",)), False, "Did you mean 'flap'? It has: atp, flap"),
        (Part(keep=(0.7,)), False, "It has: 0.8, 0.6"),
        (Part(seeds=(5,)), False, "It has: 0, 1"),
        (Part(seeds=(5,)), True, "It has: 0, 1"),
        (Part(("flap",), (0.6,), (1,)), True, "It has: flap 0.6 seed 0"),
        (Part(("flap",), (0.8,)), False, "It has: flap 0.6 seed 0"),
        (Part((), (0.6,), (1,)), False, "It has: atp 0.6 seed 0, flap 0.6 seed 0"),
    ],
)
def test_a_part_that_is_not_there_is_told_with_what_is(part: Part, some: bool, there: str) -> None:
    with pytest.raises(UserError) as caught:
        check_part(PARTS, part, Path("rows.json"), some)
    assert str(caught.value) == f"{part}: 'rows.json' has no such run. {there}"


def test_all_of_a_part_must_be_there_or_some() -> None:
    assert str(Part(("flap",), (0.6, 0.5), (1,))) == "--only flap --keep 0.6,0.5 --seeds 1"
    for part, some in ((Part(("atp", "flap"), (0.8,)), False), (Part(("atp", "flop"), (0.8,)), True), (Part(), False)):
        check_part(PARTS, part, Path("rows.json"), some)
    with pytest.raises(UserError, match="--only flop: "):
        check_part(PARTS, Part(("atp", "flop"), (0.8,)), Path("rows.json"))


PARTS = [row("atp", 0.8, 1, 15.0), row("atp", 0.6, 0, 15.0), row("flap", 0.6, 0, 15.0)]


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "rows.json"
    assert read(file) == []
    write(file, [row("atp", 0.6, 0, 15.0)])
    assert read(file) == [row("atp", 0.6, 0, 15.0)]
    for text, reason in (("{", "it is no JSON"), ("\xff", "it is no JSON"), ("3", "it is no list"), ("{}", "it is no list")):
        file.write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=rf"holds no rows of a comparison \({reason}\); give another --rows file"):
            read(file)
    with pytest.raises(UserError, match=r"\(Is a directory\); give another"):
        read(file.parent)
    with pytest.raises(UserError, match="cannot be written"):
        write(file / "rows.json", [])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"keep": "x"}, "keep='x' is no number above 0 and up to 1"),
        ({"keep": 6}, "keep=6 is no number above 0 and up to 1"),
        ({"keep": math.nan}, "keep=nan is no number above 0 and up to 1"),
        ({"value": "abc"}, "value='abc' is no number"),
        ({"value": 10**400}, "value=1000"),
        ({"value": True}, "value=True is no number"),
        ({"value": None}, "value=None is no number"),
        ({"metric": "failed"}, "value=15.0 is no text"),
        ({"metric": {}}, "metric={} is no text"),
        ({"seed": 0.5}, "seed=0.5 is no whole number"),
        ({"seed": [0]}, "seed=[0] is no whole number"),
        ({"windows": 3}, "windows=3 is no text"),
        ({"windows": "abc:x"}, "windows is damaged"),
        ({"windows": "abc:AAAA"}, "windows is damaged"),
        ({"se": "0"}, "se='0' is no number"),
        ({"tokens": []}, "tokens=[] is no number"),
        ({"words": ["w"]}, "words=['w'] is no text"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, changes: Row, reason: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row("atp", 0.6, 0, 15.0), {**row("atp", 0.6, 1, 15.0), **changes}]))
    with pytest.raises(UserError) as caught:
        read(file)
    assert f"{str(file)!r} holds no rows of a comparison: rows[1] (method 'atp'): {reason}" in str(caught.value)
    assert str(caught.value).endswith("; correct it, or give another --rows")
    assert len(str(caught.value)) < 400


def test_other_wrong_rows(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    for found, reason in (
        (["text"], "rows[0]: 'text' is no mapping"),
        ([{"method": "atp"}], "rows[0] (method 'atp'): the key 'base' is missing"),
        ([{**row("atp", 0.6, 0, 15.0), "method": ["m"]}], "rows[0] (method ['m']): method=['m'] is no text"),
    ):
        file.write_text(json.dumps(found))
        with pytest.raises(UserError, match=re.escape(reason)):
            read(file)
    optional = {"keep": None, "se": None, "windows": None, "tokens": math.nan, "words": None, "dense_value": math.inf}
    file.write_text(json.dumps([{**row("atp", 0.6, 0, math.nan), **optional}]))
    assert len(read(file)) == 1
