"""SentencePiece-like BPE tokenizers as Llama 2, TinyLlama and Mistral have them, small and trained here, with tiny models."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

from bases import sentences
from cuts import Kept, write_folder

MARK = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = (
    *sentences(120),
    *("x_1 = foo(bar, 3.14)", "Grüße aus Köln, schöne Straße", "    return [item for item in items]", "café naïve 日本語 日本"),
    *("1234 5678 90", "the  two   spaces", "don't, I'll, we've", "<s> and </s> and [INST]"),
)
PREPEND = [
    {"type": "Prepend", "prepend": MARK},
    {"type": "Replace", "pattern": {"String": " "}, "content": MARK},
]
"""The normalizer of older files: a space before every part of a text."""
DOUBLED = {"type": "Replace", "pattern": {"Regex": f"\\A{MARK}"}, "content": MARK * 2}
"""With it a Metaspace puts a space before a space too, as transformers writes it from a SentencePiece model."""


def metaspace(scheme: str, split: bool = False) -> dict[str, Any]:
    """The rule of newer files, and of transformers for a ``LlamaTokenizer`` whatever its file says."""
    return {"type": "Metaspace", "replacement": MARK, "prepend_scheme": scheme, "split": split}


@cache
def trained() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Characters, merges and runs of spaces. Words are learned apart, as SentencePiece does it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    letters = tuple(text for text in model["vocab"] if len(text) == 1)
    return letters, tuple((left, right) for left, right in model["merges"]), (MARK * 2, MARK * 4, MARK * 3)


def piece_model(converted: bool = True) -> dict[str, Any]:
    """A ``model`` of tokenizer.json: special tokens, bytes, pieces, letters.

    Args:
        converted: with a merge for every two tokens that make up a third, as in files made from a SentencePiece model; else
            with the merges that were learned alone, and no runs of spaces.
    """
    letters, learned, runs = trained()
    pieces = [left + right for left, right in learned] + (list(runs) if converted else [])
    known = {*letters, *pieces}
    merges = [(text[:at], text[at:]) for text in pieces for at in range(1, len(text)) if {text[:at], text[at:]} <= known]
    vocab = {text: index for index, text in enumerate((*SPECIAL, *BYTES, *pieces, *letters))}
    model = {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in (merges if converted else learned)]}
    return {**model, "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "dropout": None}


def added(token: str, index: int, **flags: bool) -> dict[str, Any]:
    """An entry of ``added_tokens``."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": token, **plain, "special": True, **flags}


def tokenizer_json(rule: dict[str, Any] | list[dict[str, Any]], converted: bool = True, **changes: Any) -> dict[str, Any]:
    """A whole tokenizer.json; ``rule``: the steps of a normalizer, or a pre-tokenizer."""
    model = piece_model(converted)
    normalizer = {"type": "Sequence", "normalizers": rule} if isinstance(rule, list) else None
    count = len(model["vocab"])
    found = {
        "version": "1.0",
        "added_tokens": [
            *(added(text, index) for index, text in enumerate(SPECIAL)),
            added("[INST]", count),
            added("<tool>", count + 1, special=False),
        ],
        "normalizer": normalizer,
        "pre_tokenizer": None if normalizer else rule,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": model,
    }
    return {**found, **changes}


def write_pieces(
    folder: Path,
    name: str,
    kept: Kept | None,
    raw: dict[str, Any],
    tokenizer_class: str = "PreTrainedTokenizerFast",
    **settings: Any,
) -> PreTrainedModel:
    """A tiny model with that tokenizer; ids beyond it are rows of the embedding alone."""
    extra = {"sliding_window": None} if name == "mistral" else {}
    model = write_folder(folder, name, kept, bos_token_id=1, eos_token_id=2, pad_token_id=None, **extra)
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **settings}), encoding="utf-8")
    return model
