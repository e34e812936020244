from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimtune.data.sources import Row, read, read_counted
from slimtune.errors import UserError
from slimtune.sections import Source


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def rows_of(tmp_path: Path, *records: Any, **options: Any) -> list[Row]:
    return read(Source(path=write(tmp_path / "rows.jsonl", *records), **options))


@pytest.mark.parametrize(("suffix", "opener"), [("", open), (".gz", gzip.open), (".xz", lzma.open), (".bz2", bz2.open)])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt"])
def test_every_kind_and_compression(tmp_path: Path, kind: str, suffix: str, opener: Any) -> None:
    content = {
        ".jsonl": '{"text": "one, é"}\n\n{"text": "two"}\n',
        ".json": '[{"text": "one, é"},\n {"text": "two"}]',
        ".csv": 'id,text\n1,"one, é"\n2,two\n',
        ".txt": "one, é\n<|doc|>\ntwo\n",
    }[kind]
    path = tmp_path / f"rows{kind}{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    rows = read(Source(path=str(path), separator="<|doc|>" if kind == ".txt" else None))
    assert [(row.text or "").strip() for row in rows] == ["one, é", "two"]
    last = {".jsonl": 3, ".json": 2, ".csv": 3, ".txt": 3}[kind]
    assert [row.origin for row in rows] == [f"{path}:{1 if kind != '.csv' else 2}", f"{path}:{last}"]


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow comes with the extra 'hub'")
    import pyarrow

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"prompt": ["q"], "completion": ["a"], "choices": [["a", "b"]]}), path)
    assert read(Source(path=str(path))) == [Row(prompt="q", completion="a", choices=("a", "b"), label=0, origin=f"{path}:1")]
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        read(Source(path=str(path)))


def test_a_txt_without_separator_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert [row.text for row in read(Source(path=str(tmp_path / "a.txt")))] == ["one\n\ntwo\n"]


def test_fields_are_detected_in_order(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    first, second, third, fourth = rows_of(
        tmp_path,
        {"messages": chat, "text": "t"},
        {"conversations": sharegpt},
        {"prompt": "p", "completion": "c", "text": "t"},
        {"text": "t", "other": 1},
    )
    assert first.messages == second.messages == tuple(chat)
    assert (third.prompt, third.completion, third.text) == ("p", "c", None)
    assert fourth.text == "t"


def test_templates_reach_nested_lists(tmp_path: Path) -> None:
    record = {"question": "Q", "context": {"contexts": ["one.", "two."]}, "year": 1994, "parts": [{"a": "x"}]}
    template = "{context[contexts]} {{{year}}}\n{parts[0][a]} {context[contexts][1]}"
    (row,) = rows_of(tmp_path, record, prompt="Question: {question}\nAnswer:", completion=template)
    assert (row.prompt, row.completion) == ("Question: Q\nAnswer:", "one. two. {1994}\nx two.")
    (row,) = rows_of(tmp_path, record, text="{question}")
    assert row.text == "Q"


def test_templates_do_not_reach_attributes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="finds no '__class__' in str"):
        rows_of(tmp_path, {"text": "x"}, text="{text.__class__}")


@pytest.mark.parametrize("label", [1, "1", " no", "no"])
def test_choices_keep_the_label_as_an_index(tmp_path: Path, label: Any) -> None:
    record = {"prompt": "p", "completion": " no", "choices": [" yes", " no"], "label": label}
    (row,) = rows_of(tmp_path, record)
    assert (row.choices, row.label) == ((" yes", " no"), 1)


def test_a_label_outside_the_choices_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:1: label=2 is neither"):
        rows_of(tmp_path, {"prompt": "p", "completion": "a", "choices": ["a", "b"], "label": 2})


def test_choices_of_another_shape_are_not_choices(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"prompt": "p", "completion": "a", "choices": {"text": ["a"]}, "label": "A"})
    assert (row.choices, row.label) == (None, None)


def test_empty_rows_are_skipped_and_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": " \n"}, {"text": "x"}, {"text": None}, {"prompt": "p", "completion": ""})
    rows, skipped = read_counted(Source(path=path))
    assert ([row.text for row in rows], skipped) == (["x"], 3)


def test_rows_limits_what_is_read(tmp_path: Path) -> None:
    assert [row.text for row in rows_of(tmp_path, {"text": "a"}, {"text": "b"}, {"text": 3}, rows=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        ({"txt": "x"}, {}, r"rows.jsonl:1: no row can be made of the fields \['txt'\].*Did you mean 'text'"),
        ({"text": 3}, {}, "field 'text' must be a string, found int"),
        ([1], {}, "a row must be an object .* found list"),
        ({"question": "x"}, {"text": "{qestion}"}, "no field 'qestion'.*Did you mean 'question'"),
        (
            {"text": "x"},
            {"text": "{zzz}"},
            r"no field 'zzz'; its fields are \['text'\].* Name one of them in the source's templ",
        ),
        ({"a": {"b": ["x"]}}, {"text": "{a}"}, r"not dict; reach inside, e.g. \{a\[b\]\}"),
        ({"a": None}, {"text": "{a}"}, "not NoneType"),
        ({"a": "x"}, {"text": "{a"}, "template '{a' is not valid"),
        ({"a": "x"}, {"prompt": "{a}"}, "no completion"),
        ({"a": "x"}, {"text": "{a}", "messages": "a"}, "templates for text and messages"),
        ({"messages": "hi"}, {}, "messages must be a list"),
        ({"messages": [{"role": "user"}]}, {}, r"string 'content', found only the fields \['role'\]"),
        ({"messages": [{"role": "user", "content": None}]}, {}, "string 'content', found NoneType"),
        ({"text": ""}, {}, "all of its 1 rows are empty"),
    ],
)
def test_bad_rows_name_the_place_and_the_remedy(tmp_path: Path, record: Any, options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows_of(tmp_path, record, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a.jsonl:2: not valid JSON"),
        ("a.json", b'{"text": "x"}\n{"text": "y"}', "rename it to .jsonl"),
        ("a.json", b'{"text": "x"}', "must hold a list of objects, found dict"),
        ("a.jsonl", b"", "has no usable row: it is empty"),
        ("a.json", b"", "has no usable row: it is empty"),
        ("a.csv", b"text\na,b\n", "a.csv:2: more cells than the 1 of the header"),
        ("a.txt", b"\xff\xfe", "is not UTF-8"),
        ("a.jsonl.xz", b"junk", "cannot be read"),
        ("a.jsonl.gz", b"junk", "cannot be read"),
        ("a.pdf", b"junk", r"unknown kind of file '.pdf'; known: .jsonl"),
    ],
)
def test_bad_files_name_the_file_and_the_remedy(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(Source(path=str(tmp_path / name)))


@pytest.mark.parametrize("path", ["./no", "no/such/file.jsonl", "data/train.jsonl", "train.jsonl", "word", "~/no", "~/no.csv"])
def test_what_is_no_file_and_no_hub_id_never_reaches_the_network(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it would now fail
    with pytest.raises(UserError, match=f"data source '{path}' does not exist"):
        read(Source(path=path))


def test_a_folder_is_refused_and_hides_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    with pytest.raises(UserError, match="'org' is a directory"):
        read(Source(path="org"))
    with pytest.raises(UserError, match="'org/name' does not exist"):
        read(Source(path="org/name"))


def test_a_hub_id_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class HubError(Exception):
        pass

    class Hub:
        exceptions = type("exceptions", (), {"DatasetsError": HubError})

        @staticmethod
        def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, str]]:
            calls.append((path, name, split))
            if path == "org/gone":
                raise FileNotFoundError("404")
            if path == "org/torn":
                raise HubError("an error occurred while generating")
            return [{"text": "a"}, {"text": "b"}]

    monkeypatch.setitem(sys.modules, "datasets", Hub)  # type: ignore[arg-type]
    rows = read(Source(path="org/name", name="config", split="test", rows=1))
    assert calls == [("org/name", "config", "test")]
    assert rows == [Row(text="a", origin="org/name[test]:0")]
    with pytest.raises(UserError, match=r"'org/gone' .*cannot be loaded from the hub: 404; check the id"):
        read(Source(path="org/gone"))
    with pytest.raises(UserError, match=r"'org/torn' .*cannot be loaded from the hub: an error occurred while generating"):
        read(Source(path="org/torn"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs datasets: pip install"):
        read(Source(path="org/name"))


def test_an_unknown_built_in_is_refused() -> None:
    with pytest.raises(UserError, match="'builtin:java-docs' is not known"):
        read(Source(path="builtin:java-docs"))


def test_key_ignores_case_space_and_unicode_form() -> None:
    assert Row(text="The  Straße\nﬁne ").key == Row(text="the STRASSE fine", origin="x:1").key
    assert Row(text="a b").key != Row(text="a c").key
    assert Row(prompt="a", completion="b").key == Row(text="a b").key
    chat = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert Row(messages=chat).key == Row(text="a b").key


@given(st.text())
def test_every_text_has_a_key(text: str) -> None:
    assert len(Row(text=text).key) == 64
    assert Row(text=text).key == Row(text=f" {text}\n").key


def test_a_label_template_finds_the_completion_among_the_choices(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"q": "Which?", "options": ["one", "two"], "answer": 1}) + "\n")
    choices = (" {options[0]}", " {options[1]}")
    (row,) = read(Source(path=str(file), prompt="{q}", label="{answer}", choices=choices))
    assert (row.prompt, row.completion, row.choices, row.label) == ("Which?", " two", (" one", " two"), 1)
    with pytest.raises(UserError, match=r"label=2 is neither one of the choices"):
        read(Source(path=str(file), prompt="{q}", label="2", choices=choices))
    for wrong in ({"completion": " two", "choices": choices}, {}):
        with pytest.raises(UserError, match="has a label: that goes with a prompt and choices, without a completion"):
            read(Source(path=str(file), prompt="{q}", label="{answer}", **wrong))


def test_choices_of_the_recipe_find_the_label_by_the_completion(tmp_path: Path) -> None:
    templates = {"prompt": "{q}?", "completion": " {answer}", "choices": (" {good}", " no")}
    yes, no = rows_of(
        tmp_path, {"q": "a", "answer": "fine", "good": "fine"}, {"q": "b", "answer": "no", "good": "well"}, **templates
    )
    assert (yes.choices, yes.label, yes.completion) == ((" fine", " no"), 0, " fine")
    assert (no.choices, no.label) == ((" well", " no"), 1)


def test_a_completion_that_is_no_choice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl:1: the completion 'maybe' is none of the choices \[' yes', ' no'\]"):
        rows_of(tmp_path, {"q": "a", "a": "maybe"}, prompt="{q}", completion="{a}", choices=(" yes", " no"))
    with pytest.raises(UserError, match="has choices but no prompt and completion"):
        rows_of(tmp_path, {"text": "a"}, choices=(" yes", " no"))


def test_half_of_a_character_becomes_the_sign_for_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"text": "a \ud83d cut"}' + "\n" + r'{"text": "a \ud83d\ude00 whole"}' + "\n", encoding="utf-8")
    assert [row.text for row in read(Source(path=str(path)))] == ["a \ufffd cut", "a \U0001f600 whole"]
    assert [row.text for row in read(Source(path=str(path), text="{text}!"))] == ["a \ufffd cut!", "a \U0001f600 whole!"]
    path.write_text(r'{"messages": [{"role": "user", "content": "\udc00"}]}' + "\n", encoding="utf-8")
    (row,) = read(Source(path=str(path)))
    assert row.content == "\ufffd"
