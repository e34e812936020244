from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bases import make_tokenizer
from slimtune.data.batches import ALL, SPLITS, Order, divide, load_splits, place
from slimtune.data.sources import Row
from slimtune.errors import UserError
from slimtune.sections import DataConfig

HALF = {"test_fraction": 0.2, "valid_fraction": 0.2, "decision_fraction": 0.2}
SHARES = [("test", 0.05), ("valid", 0.02), ("decision", 0.1)]
LEARN = frozenset({"train"})


def write(path: Path, *texts: Any) -> str:
    records = [{"text": text} if isinstance(text, str) else text for text in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def texts_of(rows: list[Row]) -> list[str | None]:
    return [row.text for row in rows]


def words(count: int) -> list[str]:
    return [f"document number {index}" for index in range(count)]


def split(config: DataConfig, need: frozenset[str] = ALL) -> tuple[dict[str, list[str | None]], Counter[str]]:
    notes: Counter[str] = Counter()
    rows = divide(config, need, notes)
    return {name: texts_of(rows[name]) for name in SPLITS}, notes


@given(st.lists(st.text(min_size=1), unique=True, min_size=1, max_size=30), st.lists(st.text(), max_size=30), st.randoms())
def test_place_of_a_row_does_not_depend_on_others(texts: list[str], more: list[str], random: Any) -> None:
    before = {text: place(Row(text=text).key, SHARES) for text in texts}
    mixed = [*texts, *more]
    random.shuffle(mixed)
    after = {text: place(Row(text=text).key, SHARES) for text in mixed}
    assert before.items() <= after.items()


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=8, max_size=40))
def test_splits_by_hash_are_disjoint_whatever_the_rows(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = write(tmp_path_factory.mktemp("rows") / "a.jsonl", *texts)
    rows = divide(DataConfig(train=path, **HALF), ALL, Counter())
    keys = {name: {row.key for row in found} for name, found in rows.items()}
    assert sum(len(found) for found in keys.values()) == len(set().union(*keys.values()))
    assert sum(len(found) for found in rows.values()) == len(texts)


def test_shares_are_met_and_adding_rows_moves_none(tmp_path: Path) -> None:
    few, _ = split(DataConfig(train=write(tmp_path / "a.jsonl", *words(2000))))
    many, _ = split(DataConfig(train=write(tmp_path / "b.jsonl", *reversed(words(4000)))))
    for name in few:
        assert set(few[name]) <= set(many[name])
    sizes = {name: len(found) / 4000 for name, found in many.items()}
    assert sizes == pytest.approx({"test": 0.05, "valid": 0.02, "decision": 0.1, "train": 0.83}, abs=0.015)


def test_held_out_rows_never_train_even_if_not_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *words(300))
    everything, _ = split(DataConfig(train=path))
    alone, _ = split(DataConfig(train=path), LEARN)
    assert alone["test"] == everything["test"]
    assert alone["valid"] == everything["valid"]
    assert sorted(alone["train"]) == sorted([*everything["train"], *everything["decision"]])


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    config = DataConfig(train=str(tmp_path / "missing.jsonl"), test=write(tmp_path / "t.jsonl", "x"))
    assert split(config, frozenset({"test"}))[0]["test"] == ["x"]
    with pytest.raises(UserError, match=r"missing.jsonl' does not exist"):
        split(config, frozenset({"valid"}))


@pytest.mark.parametrize(("first", "second"), list(combinations(("test", "valid", "decision", "train"), 2)))
def test_overlap_stops_or_leaves_the_later_split(tmp_path: Path, first: str, second: str) -> None:
    paths = {name: write(tmp_path / f"{name}.jsonl", f"{name} own", f"{name} other") for name in SPLITS}
    write(tmp_path / f"{first}.jsonl", "shared  ROW", f"{first} own")
    write(tmp_path / f"{second}.jsonl", f"{second} own", "Shared row", "shared row")
    message = (
        rf"^2 rows stand in two splits, e.g. \S+{second}.jsonl:2 \(data.{second}\) is the same as "
        rf"\S+{first}.jsonl:1 \(data.{first}\); set data.on_overlap=drop"
    )
    with pytest.raises(UserError, match=message):
        split(DataConfig(**paths))
    rows, notes = split(DataConfig(**paths, on_overlap="drop"))
    assert rows[second] == [f"{second} own"]
    assert rows[first] == ["shared  ROW", f"{first} own"]
    assert notes == {f"{second}.overlap": 2}


def test_duplicates_inside_a_split_are_fine(tmp_path: Path) -> None:
    rows, notes = split(DataConfig(train=write(tmp_path / "a.jsonl", *["same row"] * 5)))
    assert sorted(map(len, rows.values())) == [0, 0, 0, 5]
    assert not notes


def test_order_of_sources_and_their_empty_rows(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a.jsonl", "a", "", "b"), write(tmp_path / "b.jsonl", "c", " ")
    none = dict.fromkeys(("test_fraction", "valid_fraction", "decision_fraction"), 0.0)
    rows, notes = split(DataConfig(train=[one, two], **none))
    assert rows["train"] == ["a", "b", "c"]
    assert notes == {"train.empty": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.train is empty; name a file"),
        ({"train": True, "test_fraction": 0.5, "valid_fraction": 0.5}, "leaves nothing of data.train"),
        ({"train": True, "decision_fraction": 0.0}, "data.decision has no token to learn from"),
        ({"train": True, "test": True, "on_overlap": "drop"}, r"data.train has no token .*train.overlap"),
    ],
)
def test_nothing_to_learn_from(tmp_path: Path, tokenizer: Any, options: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.jsonl", *words(20))
    with pytest.raises(UserError, match=message):
        load_splits(DataConfig(**{key: path if value is True else value for key, value in options.items()}), tokenizer)


def test_load_splits_end_to_end(tmp_path: Path, tokenizer: Any) -> None:
    examples = [
        {"prompt": f"question {index}", "completion": " yes", "choices": [" yes", " no"], "label": 0} for index in range(60)
    ]
    config = DataConfig(train=write(tmp_path / "a.jsonl", *words(60), *examples), max_length=64, **HALF)
    splits = load_splits(config, tokenizer)
    assert sum(splits.rows.values()) == 120
    again, _ = split(config)
    assert {name: len(found) for name, found in again.items()} == splits.rows
    assert 0 < len(splits.choice_rows) < splits.rows["test"]
    assert all(row.label == 0 for row in splits.choice_rows)
    for name in ALL:
        windows = getattr(splits, name)
        assert windows.pad == tokenizer.pad_token_id
        assert 0 < windows.targets < windows.tokens
        assert np.diff(windows.offsets).max() <= 64
    only_test = load_splits(config, tokenizer, frozenset({"test"}))
    assert (len(only_test.train), only_test.rows) == (0, {"test": splits.rows["test"]})
    assert np.array_equal(only_test.test.ids, splits.test.ids)


LONG = [
    {"prompt": "what is it? " * 10, "completion": " fine"},
    {"prompt": "q", "completion": " no"},
    {"prompt": "q", "completion": " it is" * 30},
]


def long_config(tmp_path: Path, **options: Any) -> DataConfig:
    none = dict.fromkeys(("test_fraction", "valid_fraction", "decision_fraction"), 0.0)
    return DataConfig(train=write(tmp_path / "a.jsonl", *LONG), max_length=16, packing=False, **none, **options)


def test_long_examples_stop_with_the_remedies(tmp_path: Path, tokenizer: Any) -> None:
    counts = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in LONG]
    message = (
        rf"a.jsonl:1: {counts[0]} tokens exceed data.max_length=16 \(as do 1 more rows of data.train; the longest has "
        rf"{max(counts)}\); set data.max_length={max(counts)}, or data.on_long=truncate .* or data.on_long=drop"
    )
    with pytest.raises(UserError, match=message):
        load_splits(long_config(tmp_path), tokenizer, LEARN)


def test_long_examples_are_dropped_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    splits = load_splits(long_config(tmp_path, on_long="drop"), tokenizer, LEARN)
    assert (len(splits.train), splits.rows, splits.notes) == (1, {"train": 3}, {"train.long": 2})


def test_long_examples_lose_the_left_of_the_prompt(tmp_path: Path, tokenizer: Any) -> None:
    splits = load_splits(long_config(tmp_path, on_long="truncate"), tokenizer, LEARN)
    assert splits.notes == {"train.long": 2}
    first, second, third = (splits.train.collate([index]) for index in range(3))
    assert [batch["input_ids"].shape[1] for batch in (first, second, third)] == [16, 4, 16]
    text = tokenizer.decode(first["input_ids"][0])
    assert text.startswith("<s>")
    assert text.endswith("what is it?  fine</s>")
    assert tokenizer.decode(first["labels"][0][first["labels"][0] >= 0]) == " fine</s>"
    assert tokenizer.decode(third["input_ids"][0]).startswith("<s> it is it is")  # only an answer too long is cut itself


def test_chats_without_an_answer_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    chats = [{"messages": [{"role": role, "content": f"{role} {i}"}]} for i in range(2) for role in ("user", "assistant")]
    none = dict.fromkeys(("test_fraction", "valid_fraction", "decision_fraction"), 0.0)
    splits = load_splits(DataConfig(train=write(tmp_path / "a.jsonl", *chats), **none), tokenizer, LEARN)
    assert splits.notes == {"train.no_answer": 2}


@given(st.integers(1, 50), st.integers(0, 2**63), st.integers(0, 200), st.integers(0, 120))
def test_order_is_a_function_of_seed_and_position(n: int, seed: int, start: int, count: int) -> None:
    whole = Order(n, seed).indices(0, start + count)
    assert Order(n, seed).indices(start, count) == whole[start:]
    for epoch in range((start + count) // n):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == list(range(n))


def test_order_differs_by_epoch_and_seed_and_survives_jumps() -> None:
    order = Order(40, 1)
    first, second = order.indices(0, 40), order.indices(40, 40)
    assert order.indices(0, 40) == first
    assert first != second
    assert first != Order(40, 2).indices(0, 40)
    with pytest.raises(UserError, match="nothing to order"):
        Order(0, 1)


@pytest.mark.parametrize(
    ("task", "choices", "near"),
    [("healthcare/pubmedqa", 3, 0), ("healthcare/rqe", 2, 1643), ("healthcare/medmcqa_dev", 4, 9), ("legal/casehold", 5, 1)],
)
def test_real_tasks_load_without_overlap(shared_data: Path, task: str, choices: int, near: int) -> None:
    transformers = pytest.importorskip("transformers")
    real = transformers.AutoTokenizer.from_pretrained(shared_data / "models" / "base-44m")
    files = {name: str(shared_data / "data" / task / f"{name}.jsonl.xz") for name in ("train", "valid", "test")}
    splits = load_splits(DataConfig(**files, max_length=1024, on_overlap="drop"), real, frozenset({"decision", "test"}))
    assert len(splits.choice_rows) == splits.rows["test"] > 0
    assert {len(row.choices or ()) for row in splits.choice_rows} == {choices}
    assert all((row.choices or ())[row.label or 0] == row.completion for row in splits.choice_rows)
    assert sum(splits.notes.values()) == splits.notes.get("train.near", 0) + splits.notes.get("decision.near", 0) == near
    assert splits.decision.targets >= 2 * splits.rows["decision"]  # the answer and EOS


def test_rows_that_are_all_held_out_leave_nothing_to_learn(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "one row", "another row")
    config = DataConfig(train=path, test=path, on_overlap="drop", max_length=16)
    with pytest.raises(
        UserError, match=r"give rows that stand in no held-out split: 2 were left out because they do, or nearly"
    ):
        load_splits(config, make_tokenizer())
