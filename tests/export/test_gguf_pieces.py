"""SentencePiece-like tokenizers in llama.cpp: the same tokens as in ``tokenizers``, or a refusal."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer
from typer.testing import CliRunner

import slimtune
from cuts import UNEVEN, Kept, even
from pieces import BYTES, CORPUS, DOUBLED, MARK, PREPEND, SPECIAL, added, metaspace, tokenizer_json, write_pieces
from slimtune.cli import app
from slimtune.cli_export import _told
from slimtune.errors import UserError
from slimtune.export import gguf_pieces, gguf_vocab
from slimtune.export.gguf_run import run

FIRST = "one space more before a text that begins with a space, and before whatever follows an added token"
ALWAYS = "one space more before a text that begins with a space, and before one after an added token"
FAST = "PreTrainedTokenizerFast"
SPM = tokenizer_json(metaspace("always"), False, normalizer={"type": "Sequence", "normalizers": [PREPEND[1], DOUBLED]})
STYLES: dict[str, tuple[str, Kept | None, dict[str, Any], str, dict[str, Any], bool, str]] = {
    # model, kept, tokenizer.json, its class, tokenizer_config.json, a space is put before a text, what is told
    "llama-2": ("llama", UNEVEN, tokenizer_json(PREPEND), FAST, {}, True, ""),
    "mistral-0.1": ("mistral", None, SPM, "LlamaTokenizer", {"legacy": True}, True, ""),
    "mistral-0.3": ("mistral", even([1], 64), tokenizer_json(metaspace("first")), FAST, {}, True, FIRST),
    "legacy": ("llama", None, tokenizer_json(PREPEND), "LlamaTokenizer", {"legacy": True}, True, ALWAYS),
    "no-prefix": ("llama", None, tokenizer_json(metaspace("never", True), False), FAST, {}, False, ""),
}


ODD = (
    *(
        " ",
        "  ",
        "     ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "\u00a0",
        MARK,
        MARK * 2,
        "7",
        "1984",
        "Ü",
        "größe",
        "日本語",
        "语",
        "\U0001f642",
    ),
    *("e\u0301", "<0x0A>", "<0x", "</s>", "<s>", "[INST]", "<tool>", "[INST", "<", ">", "don't", "_x", "ZQ"),
)
ADDED = ("</s>", "<s>", "[INST]", "<tool>")


def drawn(count: int, seed: str) -> list[str]:
    """Texts of words and of all that a tokenizer may stumble on, which also begin some."""
    rng, words = random.Random(seed), (*" ".join(CORPUS).split(), *ODD, *ODD)
    return [
        *(f"{odd}a b" for odd in ODD),
        *("".join(rng.choice(words) + rng.choice(("", " ")) for _ in range(9)) for _ in range(count)),
    ]


@pytest.mark.parametrize("style", STYLES)
def test_llama_cpp_reads_what_the_tokenizer_does(tmp_path: Path, style: str) -> None:
    name, kept, raw, loaded_as, settings, prefix, told = STYLES[style]
    folder = tmp_path / "phi-3-like"  # by such a name llama.cpp drops spaces after special tokens
    write_pieces(folder, name, kept, raw, loaded_as, **settings)
    done = CliRunner().invoke(app, ["export", str(folder), "--out", str(tmp_path / "x.gguf"), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["tokens_same"] == found["tokens"] == 96
    assert found["logprob_difference"] < 1e-3
    assert found.get("note", "") == (f"llama.cpp reads {told}" if told else "")
    fields = GGUFReader(tmp_path / "x.gguf").fields
    said = {
        key: fields[f"tokenizer.ggml.{key}"].contents()
        for key in ("model", "add_space_prefix", "add_bos_token", "add_eos_token")
    }
    assert said == {"model": "llama", "add_space_prefix": prefix, "add_bos_token": True, "add_eos_token": False}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = drawn(60, style)
    there = [gguf_pieces.as_there(tokenizer, text) for text in texts]
    others = [text for text, other in zip(texts, there, strict=True) if text != other]
    assert bool(others) == bool(told)
    assert all(text[0] in (" ", MARK) or any(map(text.count, ADDED)) for text in others)
    ids = [tokenizer(text)["input_ids"] for text in there]
    ran = run(tmp_path / "x.gguf", [*texts, *ids], tokens=1, top=3)
    assert ran.read == [len(each) for each in (*ids, *ids)]
    for text, read, given in zip(texts, ran.logprobs, ran.logprobs[len(texts) :], strict=False):
        assert read == pytest.approx(given, abs=1e-4), text
    assert any(3 <= tokens[0] < 259 for tokens in ran.tokens)  # bytes, half a letter: told of the first token all the same


def test_kinds_of_tokens_and_what_stands_around_a_text(tmp_path: Path) -> None:
    raw = tokenizer_json(PREPEND)
    ends = [{"SpecialToken": {"id": text, "type_id": 0}} for text in ("<s>", "</s>")]
    around = {**raw["post_processor"], "single": [ends[0], {"Sequence": {"id": "A", "type_id": 0}}, ends[1]]}
    around["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    write_pieces(tmp_path, "llama", None, {**raw, "post_processor": around})
    found = gguf_vocab.read(tmp_path, 6144, {})
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert (found.adds_bos, found.adds_eos) == (True, True)
    assert [kinds[text] for text in ("<unk>", "<s>", "</s>", "[INST]", "<tool>")] == [2, 3, 3, 3, 4]
    assert {kinds[text] for text in BYTES} == {6}
    assert (kinds["river"], kinds[MARK], found.kinds[-1], len(found.kinds)) == (1, 1, 5, 6144)
    assert dict(found.special) == {"bos": 1, "eos": 2, "unk": 0}


def joined(text: str, scores: Mapping[str, float]) -> list[str]:
    """llama.cpp's way: of neighbours that make up a token, those of the highest score, the leftmost of equals."""
    parts = list(text)
    while True:
        pairs = enumerate(itertools.pairwise(parts))
        ranked = [(-scores[left + right], index) for index, (left, right) in pairs if left + right in scores]
        if not ranked:
            return parts
        index = min(ranked)[1]
        parts[index : index + 2] = [parts[index] + parts[index + 1]]


def some_merges(rng: random.Random) -> tuple[list[str], list[tuple[str, str]]]:
    """A small vocabulary and its merges: as learned, in any order, with all that make up a token, or with a token too many."""
    vocab, merges, letters = dict.fromkeys("abc"[: rng.randint(1, 3)]), list[tuple[str, str]](), rng.randint(0, 3)
    alphabet = list(vocab)
    for _ in range(rng.randint(1, 10)):
        left, right = rng.choice(list(vocab)), rng.choice(list(vocab))
        if (left, right) not in merges and len(left + right) < 8:
            merges.append((left, right))
            vocab[left + right] = None
    if letters == 1:
        rng.shuffle(merges)
    if letters == 2:
        made = dict.fromkeys(left + right for left, right in merges)
        merges = [
            (text[:at], text[at:]) for text in made for at in range(1, len(text)) if {text[:at], text[at:]} <= vocab.keys()
        ]
    if letters == 3:
        vocab["".join(rng.choices(alphabet, k=rng.randint(2, 5)))] = None
    return list(vocab), merges


def test_scores_join_what_merges_join_or_are_refused() -> None:
    """Exactly: with scores all texts come out the same, and a token that is refused is itself a text that does not."""
    rng, counts = random.Random(1), {"same": 0, "refused": 0}
    for _ in range(400):
        vocab, merges = some_merges(rng)
        tokenizer = Tokenizer(models.BPE(vocab={text: index for index, text in enumerate(vocab)}, merges=merges))
        letters = [text for text in vocab if len(text) == 1]
        try:
            scores = gguf_pieces.scores({"merges": merges}, vocab, set(), Path("x"))
        except UserError as error:
            counts["refused"] += 1
            token = str(error).split("has the token ")[1].split("'")[1]
            assert len(tokenizer.encode(token).tokens) == 2
            continue
        counts["same"] += 1
        by_text = {text: score for text, score in zip(vocab, scores, strict=True) if len(text) > 1}
        for text in ("".join(rng.choices(letters, k=rng.randint(2, 12))) for _ in range(40)):
            assert tokenizer.encode(text).tokens == joined(text, by_text), (merges, text)
    assert min(counts.values()) > 50


@pytest.fixture
def one_more(tmp_path: Path) -> Path:
    """A model whose vocabulary has a token that no merge makes, of two that stand side by side in a text of the check."""
    raw = tokenizer_json(PREPEND)
    vocab = raw["model"]["vocab"]
    pieces = [
        text for text in Tokenizer.from_str(json.dumps(raw)).encode("The first section describes").tokens if text in vocab
    ]
    token = next(one + other for one, other in itertools.pairwise(pieces[1:]) if not {one, other} & set(BYTES))
    assert token not in vocab
    vocab[token] = len(vocab)
    raw["added_tokens"] = raw["added_tokens"][:3]
    write_pieces(tmp_path / "model", "llama", None, raw)
    return tmp_path


def test_a_token_that_no_merge_makes_is_refused(one_more: Path) -> None:
    with pytest.raises(UserError, match=r"has the token '▁T' and leaves its text as '▁' and 'T', which llama.cpp would join"):
        slimtune.export_model(one_more, check=False)
    assert not list(one_more.glob("*.gguf"))


def test_the_check_would_find_it(one_more: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = gguf_pieces.scores
    monkeypatch.setattr(gguf_pieces, "scores", lambda model, tokens, names, file: refusing(model, tokens, {*names, "▁T"}, file))
    with pytest.raises(UserError, match=r"llama.cpp splits .* into \d+ tokens and the tokenizer of .* into \d+; no file"):
        slimtune.export_model(one_more)


def test_the_check_finds_as_many_tokens_that_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pieces(tmp_path / "model", "llama", None, tokenizer_json(PREPEND))
    read = gguf_vocab._tokens

    def swapped(*given: Any) -> tuple[list[str], list[int]]:
        tokens, kinds = read(*given)
        one, other = tokens.index("<0xC3>"), tokens.index("<0xF0>")
        tokens[one], tokens[other] = tokens[other], tokens[one]
        return tokens, kinds

    monkeypatch.setattr(gguf_vocab, "_tokens", swapped)
    with pytest.raises(
        UserError, match=r"llama.cpp splits 'na.*' into (\d+) other tokens and the tokenizer of .* into \1; no file"
    ):
        slimtune.export_model(tmp_path)


def changed(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: tokenizer_json(PREPEND, **changes)


def model_with(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**(raw := tokenizer_json(PREPEND)), "model": {**raw["model"], **changes}}


def without_a_byte() -> dict[str, Any]:
    raw = tokenizer_json(PREPEND)
    raw["model"]["vocab"]["odd"] = raw["model"]["vocab"].pop("<0x41>")
    return raw


def with_joined_bytes() -> dict[str, Any]:
    raw = tokenizer_json(PREPEND)
    raw["model"]["vocab"]["<0xE2><0x82>"] = len(raw["model"]["vocab"]) + 2
    raw["model"]["merges"].append(["<0xE2>", "<0x82>"])
    return raw


NFKC = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, *PREPEND]}
PAIR = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[INST]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
}
PAIR |= {"pair": [*PAIR["single"], {"Sequence": {"id": "B", "type_id": 0}}]}
PAIR |= {"special_tokens": {"[INST]": {"id": "[INST]", "ids": [680], "tokens": ["[INST]"]}}}
REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "normalizer": (
        changed(normalizer=NFKC),
        r"prepares texts by NFKC, Prepend, Replace; llama.cpp only writes ▁ for a space.*folder as it is",
    ),
    "mark": (lambda: tokenizer_json({**metaspace("first"), "replacement": "_"}), r"prepares texts by Metaspace"),
    "words": (
        lambda: tokenizer_json(metaspace("first", True)),
        r"splits texts at spaces and has the token '▁▁', which llama.cpp",
    ),
    "strip": (changed(added_tokens=[added("<s>", 1), added("</s>", 2, lstrip=True)]), r"added token '</s>' with lstrip, which"),
    "sought": (
        changed(added_tokens=[added("</s>", 2), added("<tool>", 700, special=False, normalized=True)]),
        r"looks for the added token '<tool>' after it has written spaces \(\"normalized\": true\).*say false there, or use",
    ),
    "whole": (model_with(ignore_merges=True), r"joins pieces in a way that llama.cpp does not \(ignore_merges=True\)"),
    "chance": (model_with(dropout=0.5), r"joins pieces in a way that llama.cpp does not \(dropout=0.5\)"),
    "byte": (without_a_byte, r"has no token '<0x41>': llama.cpp wants one for each of the 256 bytes"),
    "bytes": (with_joined_bytes, r"joins bytes \('<0xE2>' and '<0x82>'\)"),
    "around": (changed(post_processor=PAIR), r"puts other tokens around a text than its beginning and its end"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pieces") / "model"
    write_pieces(folder, "llama", None, tokenizer_json(PREPEND))
    return folder


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_does_not_do_is_refused_by_name(folder: Path, make: Callable[[], dict[str, Any]], reason: str) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(make()), encoding="utf-8")
    with pytest.raises(UserError, match=reason):
        gguf_vocab.read(folder, 6144, {})


def test_special_tokens_that_are_looked_for_later_are_told(folder: Path) -> None:
    later = [added(text, index, normalized=True) for index, text in enumerate(SPECIAL)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(PREPEND, added_tokens=later)), encoding="utf-8")
    found = slimtune.export_model(folder, out=folder.parent / "x.gguf")
    assert found["note"].startswith("llama.cpp looks for '<unk>' in a text before it writes spaces, this tokenizer after")
    assert _told(found)["note"] == found["note"]


def test_an_end_that_nothing_names_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(PREPEND)), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "tokenizer_class": FAST}), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"no eos_token is named, and llama.cpp takes token 2 for it; name one in tokenizer_config"
    ):
        gguf_vocab.read(folder, 6144, {})
