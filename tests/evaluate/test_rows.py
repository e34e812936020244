"""Rows of tasks: training's prompts, cut to the window; pieces of text; where they are read from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bases import make_tokenizer, write_rows
from slimtune.data.pieces import PIECE
from slimtune.errors import UserError
from slimtune.evaluate.rows import Prepared, prepare, window_of
from slimtune.evaluate.tasks import find_task

CHOICE = {"prompt": "Does the doctor help?", "completion": " yes", "choices": ["yes", "no"], "label": 0}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def made(folder: Path, metric: str, rows: list[dict[str, Any]], tokenizer: Any, window: int = 2048, **options: Any) -> Prepared:
    write_rows(folder / "rows-test.jsonl", rows)
    file = folder / "task.yaml"
    file.write_text(f"metric: {metric}\nsources: [{{path: 'rows-{{split}}.jsonl'}}]\n" + options.pop("more", ""))
    return prepare(find_task(str(file)), "test", tokenizer, window, **options)


def test_choices_carry_the_space_of_the_completion(tmp_path: Path, tokenizer: Any) -> None:
    found = made(tmp_path, "choice", [CHOICE], tokenizer)
    assert found.docs == [{"prompt": CHOICE["prompt"], "choices": [" yes", " no"], "label": 0}]
    assert found.source == str(tmp_path / "rows-test.jsonl")


def test_a_limit_takes_rows_from_all_over_and_the_hash_is_theirs(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**CHOICE, "prompt": f"Question {number}?"} for number in range(10)]
    whole, part = (made(tmp_path, "choice", rows, tokenizer, limit=limit) for limit in (None, 2))
    assert [doc["prompt"] for doc in part.docs] == ["Question 2?", "Question 7?"]
    assert len(whole.docs) == 10
    assert whole.sha256 != part.sha256
    assert made(tmp_path, "choice", rows, make_tokenizer(bos=True), window=1000).sha256 == whole.sha256
    assert len(made(tmp_path, "choice", rows, tokenizer, more="rows: 3").docs) == 3


@pytest.mark.parametrize("bos", [False, True])
def test_long_prompts_are_cut_from_the_left_to_fit(bos: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos)
    rows = [CHOICE, {**CHOICE, "prompt": "the old baker sees a friend. " * 40 + "Does he?"}]
    found = made(tmp_path, "choice", rows, tokenizer, window=64)
    short, long = found.docs
    assert found.cut == 1
    assert short["prompt"] == CHOICE["prompt"]
    assert rows[1]["prompt"].endswith(long["prompt"])
    assert 60 <= len(tokenizer(long["prompt"] + " yes")["input_ids"]) <= 64


def test_prompts_but_not_texts_are_cut_to_the_length_of_training(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{**CHOICE, "prompt": "the old baker sees a friend. " * 40 + "Does he?"}]
    assert made(tmp_path, "choice", rows, tokenizer, window=512, max_length=64) == made(
        tmp_path, "choice", rows, tokenizer, window=64
    )
    assert made(tmp_path, "choice", rows, tokenizer, window=64, max_length=512).cut == 1
    answers = [{"prompt": "the pilot calls her brother. " * 40, "completion": " a call"}]
    assert made(tmp_path, "rouge", answers, tokenizer, window=512, max_length=32).tokens == 16
    texts = [{"text": "the old baker sees a friend. " * 60}]
    short, long = (made(tmp_path, "perplexity", texts, tokenizer, window=256, max_length=length) for length in (32, None))
    assert short.docs == long.docs


@pytest.mark.parametrize(
    ("choices", "why"),
    [
        (["yes", "yes"], "give two different ones, none empty"),
        (["yes"], "give two different ones"),
        (["yes", " "], "none empty"),
        (
            ["yes", "the doctor helps her friend " * 40],
            r"the choice '.*' has \d+ tokens, which leaves no room for a prompt in 64",
        ),
    ],
)
def test_choices_that_tell_nothing_or_do_not_fit_are_errors(
    choices: list[str], why: str, tmp_path: Path, tokenizer: Any
) -> None:
    with pytest.raises(UserError, match=why):
        made(tmp_path, "choice", [{**CHOICE, "choices": choices}], tokenizer, window=64)


def test_summaries_leave_room_for_the_answer(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "the pilot calls her brother. " * 40, "completion": " a call"}]
    found = made(tmp_path, "rouge", rows, tokenizer, window=64, more="tokens: 20")
    assert found.tokens == 20
    assert len(tokenizer(found.docs[0]["prompt"])["input_ids"]) <= 44
    assert made(tmp_path, "rouge", rows, tokenizer, window=64, more="tokens: 500").tokens == 32


@pytest.mark.parametrize(("bos", "before"), [(False, "</s>"), (True, "")])
def test_texts_are_cut_into_pieces_that_fit_and_nothing_is_lost(bos: bool, before: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos)
    text = "the doctor sees a friend at home today. " * 150
    found = made(tmp_path, "perplexity", [{"text": text}, {"text": "a nurse"}], tokenizer, window=128)
    assert "".join(doc["text"] for doc in found.docs) == text + "a nurse"
    assert {doc["prompt"] for doc in found.docs} == {before}
    for doc in found.docs:
        assert doc["tokens"] == len(tokenizer(doc["text"], add_special_tokens=False)["input_ids"]) < 128
        assert doc["bytes"] == len(doc["text"].encode())


def test_joined_rows_are_lines_of_one_text(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": f"line {number} of a longer text"} for number in range(400)]
    found = made(tmp_path, "perplexity", rows, tokenizer, more="join: ''")
    assert "".join(doc["text"] for doc in found.docs) == "\n".join(row["text"] for row in rows)
    assert len(found.docs) < 40
    assert max(len(doc["text"]) for doc in found.docs) <= PIECE


def test_wikitext_by_lines_as_the_hub_has_it_is_wikitext_as_a_file(tmp_path: Path, tokenizer: Any) -> None:
    lines = [" ", " = Baker = ", " ", *(f" line {number} of a longer text . " for number in range(300)), " "]
    (tmp_path / "whole.txt").write_text("\n".join(lines), encoding="utf-8")
    write_rows(tmp_path / "lines.jsonl", [{"text": line + "\n" if line.strip() else ""} for line in lines])
    whole, by_line = (
        prepare(find_task("wikitext2").reading(str(tmp_path / name)), "test", tokenizer, 512)
        for name in ("whole.txt", "lines.jsonl")
    )
    assert len(whole.docs) > 1
    assert by_line.docs == whole.docs
    assert by_line.sha256 == whole.sha256


@pytest.mark.parametrize(
    ("metric", "needs"), [("choice", "prompt, choices and label"), ("rouge", "prompt and completion"), ("perplexity", "text")]
)
def test_a_row_of_another_shape_is_told(metric: str, needs: str, tmp_path: Path, tokenizer: Any) -> None:
    row = {"text": "a"} if metric != "perplexity" else CHOICE
    with pytest.raises(UserError, match=rf"rows-test.jsonl:1: .*{needs}"):
        made(tmp_path, metric, [row], tokenizer)


def test_unreadable_data_name_the_reasons_and_the_remedy(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = r"name a file \(slimtune evaluate --data rqe=FILE\)"
    for folder, remedy in (
        (tmp_path, f"SLIMTUNE_DATA='{tmp_path}' does not hold it: set it to the folder that does, or {file}"),
        (tmp_path / "no", f"SLIMTUNE_DATA='{tmp_path / 'no'}' is no folder: set it to the one that holds the file, or {file}"),
    ):
        monkeypatch.setenv("SLIMTUNE_DATA", str(folder))
        with pytest.raises(UserError, match=rf"'{folder}/.*rqe/test.jsonl.xz' does not exist. Remedy: {remedy}"):
            prepare(find_task("rqe"), "test", tokenizer, 128)
    monkeypatch.delenv("SLIMTUNE_DATA")
    with pytest.raises(UserError, match=r"SLIMTUNE_DATA is not set; .*lex_glue.*cannot be loaded from the hub"):
        prepare(find_task("casehold"), "test", tokenizer, 128)
    with pytest.raises(UserError, match=rf"Remedy: set SLIMTUNE_DATA to the folder that holds them, or {file}"):
        prepare(find_task("rqe"), "test", tokenizer, 128)


@pytest.mark.parametrize(("given", "why"), [("gone.jsonl", "does not exist; give a file"), ("", "is a directory; name a file")])
def test_a_given_file_that_is_missing_is_named(given: str, why: str, tmp_path: Path, tokenizer: Any) -> None:
    path = str(tmp_path / given)
    with pytest.raises(UserError, match=rf"^--data rqe={path}: data source '{path}' {why}") as raised:
        prepare(find_task("rqe").reading(path), "test", tokenizer, 128)
    assert "SLIMTUNE_DATA" not in str(raised.value)


def test_a_damaged_file_is_not_passed_over(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows-test.jsonl").write_text("{")
    file = tmp_path / "task.yaml"
    file.write_text("metric: choice\nsources: [{path: 'rows-{split}.jsonl'}]")
    with pytest.raises(UserError, match=r"rows-test.jsonl:1: not valid JSON"):
        prepare(find_task(str(file)), "test", tokenizer, 128)


def test_data_of_the_users_own_with_the_tasks_template(tmp_path: Path, tokenizer: Any) -> None:
    file = write_rows(tmp_path / "mine.jsonl", [{"sentence1": "A.", "sentence2": "B.", "gold_label": "neutral"}])
    found = prepare(find_task("mednli").reading(file), "test", tokenizer, 2048)
    assert found.docs[0]["prompt"].startswith("Premise: A.\nHypothesis: B.\n")
    assert found.docs[0]["choices"][found.docs[0]["label"]] == " neutral"


def test_rows_without_an_answer_are_counted_but_blank_texts_are_nothing(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "A", "completion": " a"}, {"prompt": "B", "completion": " "}, {"prompt": "C", "completion": ""}]
    assert made(tmp_path, "rouge", rows, tokenizer).empty == 2
    assert made(tmp_path, "choice", [CHOICE], tokenizer).empty == 0
    assert made(tmp_path, "perplexity", [{"text": "a"}, {"text": "\n"}], tokenizer).empty == 0


def test_the_window_is_found_as_the_harness_finds_it() -> None:
    assert window_of(SimpleNamespace(text_config=SimpleNamespace(max_position_embeddings=7), n_positions=3)) == 7
    assert window_of(SimpleNamespace(n_positions=3)) == 3
    assert window_of(SimpleNamespace()) == 2048


@pytest.mark.parametrize("split", ["test", "valid"])
@pytest.mark.parametrize("name", ["pubmedqa", "meqsum", "wikitext2", "uscode_headings"])
def test_shipped_tasks_read_the_shared_data(name: str, split: Any, shared_data: Path, tokenizer: Any) -> None:
    found = prepare(find_task(name), split, tokenizer, 2048, limit=5)
    assert str(shared_data) in found.source
    assert split in found.source
    assert len(found.docs) >= 5
