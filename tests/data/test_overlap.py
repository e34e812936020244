from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.data import ngrams
from slimtune.data.batches import load_splits
from slimtune.data.ngrams import words
from slimtune.data.overlap import Held, apart, shared_words
from slimtune.data.pieces import PIECE, pieces
from slimtune.data.sources import Row
from slimtune.errors import UserError
from slimtune.sections import DataConfig

LEARN = frozenset({"train", "decision"})


def text(tag: str, count: int) -> str:
    return " ".join(f"{tag}{index}" for index in range(count))


def near(train: list[Row], held: list[Row], share: float = 0.5, n: int = 13) -> list[tuple[int, int]]:
    return [(match.row, match.held) for match in Held(held, n).near(train, share)]


def rows(*texts: str) -> list[Row]:
    return [Row(text=each) for each in texts]


def pair(prompt: str, completion: str) -> Row:
    return Row(prompt=prompt, completion=completion)


def test_a_copied_paragraph_inside_a_longer_document_is_found() -> None:
    paragraph = text("p", 40)
    assert near(rows(text("a", 200), f"{text('b', 300)} {paragraph} {text('c', 300)}"), rows(paragraph)) == [(1, 0)]
    assert near(rows(paragraph), rows(text("x", 40), f"{text('b', 300)} {paragraph} {text('c', 300)}")) == [(0, 1)]


def test_a_piece_of_a_long_document_inside_a_longer_row_is_found() -> None:
    held = rows(text("x", 50), text("p", 4000))
    piece = pieces(held[1].content)[2]
    train = rows(text("a", 900), f"{text('b', 400)} {piece} {text('c', 400)}", f"{text('d', 400)} {piece[: PIECE // 4]}")
    assert [(match.row, match.held) for match in Held(held, 13).near(train, 0.5)] == [(1, 1)]


def test_a_run_of_words_stands_in_a_row_once_although_its_pieces_have_it_too() -> None:
    documents = [f"{text('same', 800)} {text(f'own{index}x', 800)}" for index in range(3)]  # no template: in three rows of six
    held = rows(*documents, *(text(f"other{index}x", 20) for index in range(3)))
    assert near(rows(f"{text('new', 20)} {text('same', 700)}"), held) == [(0, 0)]


def test_the_share_is_that_of_the_smaller_row() -> None:
    held = rows(f"{text('p', 32)} {text('q', 20)}")  # 40 n-grams, 20 of them those of p alone
    train = rows(f"{text('p', 32)} {text('r', 500)}")
    assert Held(held, 13).near(train, 0.1)[0].share == 0.5
    assert near(train, held, 0.5) == [(0, 0)]
    assert near(train, held, 0.51) == []


def test_repeated_words_count_once() -> None:
    again = " ".join([text("p", 13)] * 20)  # 13 different n-grams
    assert Held(rows(again), 13).near(rows(f"{text('p', 13)} {text('x', 5)}"), 0.01)[0].share == pytest.approx(1 / 6)


@pytest.mark.parametrize("held_rows", [4, 60])
def test_a_template_alone_is_no_hit(held_rows: int) -> None:
    template = text("template", 40)
    held = [pair(f"{template} {text(f'h{index}x', 10)}", "yes") for index in range(held_rows)]
    train = [pair(f"{template} {text(f't{index}x', 10)}", "yes") for index in range(5)]
    assert near(train, held) == []
    assert near([*train, pair(held[2].prompt or "", "no")], held) == [(5, 2)]


@pytest.mark.parametrize("questions", [3, 6, 41])
def test_a_passage_with_many_questions_is_no_template(questions: int) -> None:
    passage = text("passage", 300)
    held = [pair(f"{passage} {text(f'q{index}x', 12)}", "yes") for index in range(questions)]
    held += [pair(text(f"h{index}x", 60), "no") for index in range(60)]
    train = [Row(text=passage), pair(f"{passage} {text('new', 12)}", "no"), pair(text("other", 60), "no")]
    assert [match.row for match in Held(held, 13, train).near(train, 0.5)] == [0, 1]


@pytest.mark.parametrize(("many", "to_learn", "to_measure"), [(3, 300, 60), (4, 160, 80), (10, 500, 120)])
def test_several_templates_of_a_few_rows_each_are_known_by_the_rows_to_learn_from(
    many: int, to_learn: int, to_measure: int
) -> None:
    templates = [text(f"template{index}x", 60) for index in range(many)]
    held = [pair(f"{templates[index % many]} {text(f'h{index}x', 15)}", "yes") for index in range(to_measure)]
    train = [pair(f"{templates[index % many]} {text(f't{index}x', 15)}", "yes") for index in range(to_learn)]
    assert Held(held, 13, train).near(train, 0.5) == []
    leaked = [*train, pair(held[4].prompt or "", "no")]
    assert [match.row for match in Held(held, 13, leaked).near(leaked, 0.5)] == [to_learn]


def test_a_passage_under_a_template_is_found() -> None:
    template, passage = text("template", 100), text("passage", 60)
    held = [pair(f"{template} {passage} {text(f'q{index}x', 8)}", "yes") for index in range(10)]
    held += [pair(f"{template} {text(f'h{index}x', 60)}", "yes") for index in range(100)]
    train = [pair(f"{template} {text(f't{index}x', 60)}", "yes") for index in range(200)]
    train += [pair(f"{template} {passage} {text('new', 8)}", "yes")]
    assert [match.row for match in Held(held, 13, train).near(train, 0.5)] == [200]


def test_what_leaked_often_is_still_found() -> None:
    question = text("q", 30)
    held = [pair(question, "right"), *(pair(text(f"h{index}x", 30), "y") for index in range(20))]
    train = [pair(question, text(f"t{index}x", 60)) for index in range(300)]
    assert near(train, held) == [(index, 0) for index in range(300)]


@pytest.mark.parametrize("prompt", ["Which of these is a virus?", text("long", 30)])
def test_the_same_prompt_with_another_completion_is_a_hit(prompt: str) -> None:
    held = [pair(prompt, text("right", 100))]
    other = pair("Who of those was a poet?", text("b", 100))
    assert near([other, pair(prompt.upper() + " ", text("wrong", 100))], held) == [(1, 0)]
    chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text("wrong", 100)}]
    assert near([Row(messages=tuple(chat))], held) == [(0, 0)]


def test_a_prompt_is_compared_with_prompts_only() -> None:
    question = "Which of these is a virus?"
    assert near(rows(question), [pair(question, text("right", 100))]) == []


@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        lambda each: each.replace(" ", ",\n "),
        lambda each: each.replace("p", "\uff50"),
        lambda each: each.replace("p", "p\u00ad\u200b"),
        lambda each: "\ufeff" + each,
    ],
)
def test_case_punctuation_space_width_and_unseen_characters_do_not_count(change: Any) -> None:
    for count in (8, 40):
        assert near(rows(change(text("p", count))), rows(text("p", count))) == [(0, 0)]


def test_languages_without_spaces_have_a_word_a_character() -> None:
    assert words("Das Ma\u00df, it's 3_4") == ["das", "mass", "it", "s", "3", "4"]
    assert words("\u7981\u6b62abc\u3042\u3044") == ["\u7981", "\u6b62", "abc", "\u3042", "\u3044"]


def test_short_generic_texts_are_no_hit() -> None:
    assert (
        near([pair("Continue:", text("a", 20)), *rows("Yes!", "I do not know.")], [pair("Continue:", "x"), *rows("yes")]) == []
    )
    assert near(rows("I really do not know."), rows("I really do not know")) == [(0, 0)]


@pytest.mark.parametrize("held", [[], rows("yes", "no")])
def test_nothing_to_compare_with(held: list[Row]) -> None:
    assert near(rows(text("a", 30)), held) == []
    assert near([], rows(text("a", 30))) == []
    assert Held(held, 13).percent_seen(held) == 0.0


LETTERS = st.sampled_from([f"w{index}" for index in range(400)])


@given(st.data(), st.lists(LETTERS, min_size=13, max_size=60), st.floats(0.1, 1.0), st.booleans(), st.integers(1, 14))
def test_a_contiguous_copy_is_always_found(data: st.DataObject, held: list[str], share: float, inside: bool, n: int) -> None:
    grams = [tuple(held[at : at + n]) for at in range(len(held) - n + 1)] or [tuple(held)]
    length = data.draw(st.integers(min(n, len(held)), len(held)))
    at = data.draw(st.integers(0, len(held) - length))
    copy = held[at : at + length]
    enough = len({tuple(copy[i : i + n]) for i in range(length - n + 1)} or {tuple(copy)}) / len(set(grams)) >= share
    around = [f"other{index}" for index in range(200)] if inside and length >= n else []
    found = near(rows(" ".join([*around, *copy, *around])), rows(" ".join(held)), share, n)
    assert found == [(0, 0)] if enough or not around else not found


@given(st.lists(st.lists(LETTERS, max_size=40), max_size=5), st.lists(st.lists(LETTERS, max_size=40), max_size=5))
def test_disjoint_vocabularies_never_match(train: list[list[str]], held: list[list[str]]) -> None:
    mine, theirs = (
        rows(*(" ".join(tag + word for word in each) for each in part)) for tag, part in (("a", train), ("b", held))
    )
    assert near(mine, theirs, 0.01, 3) == []


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=12), min_size=1, max_size=8),
    st.randoms(),
    st.integers(1, 30),
)
def test_hits_depend_neither_on_the_order_of_rows_nor_on_chunks(texts: list[list[str]], random: Any, chunk: int) -> None:
    train = rows(*(" ".join(each) for each in texts))
    held = rows("a b c a b c", "b b b a c c a", "c a c a a b")
    expected = {train[row].text for row, _ in near(train, held, 0.3, 3)}
    random.shuffle(train)
    random.shuffle(held)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ngrams, "CHUNK_WORDS", chunk)
        assert {train[row].text for row, _ in near(train, held, 0.3, 3)} == expected


def test_percent_seen_is_of_the_rows_that_stay() -> None:
    half, copy = rows(f"{text('p', 32)} {text('q', 20)}", text("z", 30))  # 40 and 18 n-grams
    held = Held([half, copy], 13)
    assert near(rows(text("z", 30)), [half, copy]) == [(0, 1)]
    held.near(rows(f"{text('p', 22)} {text('r', 500)}", text("z", 30)), 0.5, remember=True)
    assert held.percent_seen([half]) == pytest.approx(100 * 10 / 40)
    assert held.percent_seen([copy]) == 0.0
    assert held.percent_seen([half, copy]) == pytest.approx(100 * 10 / 58)


def test_the_shared_words_of_a_message() -> None:
    assert shared_words(*rows(f"a b {text('p', 20)} c", f"x {text('p', 20)} y"), 13) == text("p", 13) + " ..."
    same = shared_words(pair("One two three four five?", "a"), pair("one two, three four five", "b"), 13)
    assert same == "one two three four five"
    assert shared_words(pair(f"Read: {text('p', 20)}", "b"), *rows(f"x {text('p', 15)}"), 13) == text("p", 13) + " ..."


COPY, SAME, OWN = text("copy", 40), text("question", 9), text("own", 50)


def files(tmp_path: Path, **splits: list[Any]) -> dict[str, str]:
    for name, found in splits.items():
        lines = [json.dumps({"text": row} if isinstance(row, str) else row) for row in found]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return {name: str(tmp_path / f"{name}.jsonl") for name in splits}


@pytest.fixture
def leaky(tmp_path: Path) -> dict[str, str]:
    return files(
        tmp_path,
        train=[OWN, f"{text('a', 100)} {COPY} {text('b', 100)}", {"prompt": SAME, "completion": " other"}],
        decision=[text("d", 40), f"{COPY} {text('e', 60)}"],
        valid=[text("v", 40), {"prompt": SAME, "completion": " answer"}],
        test=[text("t", 40), f"{COPY} {text('f', 5)}"],
    )


def test_near_rows_stop_the_run_with_an_example(leaky: dict[str, str], tokenizer: Any) -> None:
    message = (
        r"^3 rows to learn from are nearly the same as a held-out row, or have its prompt \(data.ngram_share=0.5 or more of "
        r"the runs of 13 words\), e.g. \S+train.jsonl:3 \(data.train\) and \S+valid.jsonl:2 \(data.valid\) share "
        rf'"{SAME}"; set data.on_overlap=drop'
    )
    with pytest.raises(UserError, match=message):
        load_splits(DataConfig(**leaky), tokenizer, LEARN)


def test_near_rows_are_dropped_and_counted(leaky: dict[str, str], tokenizer: Any) -> None:
    splits = load_splits(DataConfig(**leaky, on_overlap="drop"), tokenizer)
    assert splits.rows == {"test": 2, "valid": 2, "decision": 1, "train": 1}
    assert splits.notes == {"train.near": 2, "decision.near": 1}
    assert splits.in_train == {"test": 0.0, "valid": 0.0}
    assert splits.summary["rows"]["train.near"] == 2
    assert load_splits(DataConfig(**leaky, on_overlap="drop"), tokenizer).fingerprint == splits.fingerprint


def test_what_stays_in_train_is_told(leaky: dict[str, str], tokenizer: Any) -> None:
    splits = load_splits(DataConfig(**leaky, on_overlap="drop", ngram_share=1.0), tokenizer)
    assert splits.notes == {"train.near": 1}  # the prompt
    assert splits.summary["ngrams_in_train_percent"] == {"test": round(100 * 28 / 61, 2), "valid": 0.0}


def test_without_ngrams_only_the_same_text_counts(leaky: dict[str, str], tokenizer: Any) -> None:
    splits = load_splits(DataConfig(**leaky, ngram=0), tokenizer)
    assert splits.rows == {"test": 2, "valid": 2, "decision": 2, "train": 3}
    assert (splits.notes, splits.in_train) == ({}, {})


def test_rows_of_later_evaluations_are_not_learned(tmp_path: Path, tokenizer: Any) -> None:
    paths = files(
        tmp_path,
        train=[OWN, COPY, f"{text('later', 40)} end", "the same"],
        decision=[text("d", 40)],
        valid=[text("v", 40)],
        test=[text("t", 40)],
        protect=[f"begin {COPY}", text("later", 40), "The Same", text("t", 40)],
    )
    with pytest.raises(
        UserError, match=r"train.jsonl:4 \(data.train\) is the same as \S+protect.jsonl:3 \(data.protect or evaluate.tasks\)"
    ):
        load_splits(DataConfig(**paths), tokenizer)
    splits = load_splits(DataConfig(**paths, on_overlap="drop"), tokenizer)
    assert splits.notes == {"train.overlap": 1, "train.near": 2}
    assert splits.rows == {"test": 1, "valid": 1, "decision": 1, "train": 1}


def test_measuring_alone_compares_nothing(leaky: dict[str, str], tokenizer: Any) -> None:
    assert load_splits(DataConfig(**leaky), tokenizer, frozenset({"test"})).rows == {"test": 2}


def test_notes_of_apart_leave_decision_and_train_alone(leaky: dict[str, str]) -> None:
    both = rows(COPY)
    kept, _ = apart({"test": [], "valid": [], "protect": [], "decision": both, "train": both}, DataConfig(), Counter())
    assert (kept["decision"], kept["train"]) == (both, both)
