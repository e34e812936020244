"""A written folder's tokenizer is the base's, whatever class transformers chooses for the folder's model type."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import slimtune
from bases import make_tokenizer
from cuts import UNEVEN, Kept, cut_model, even
from pieces import PREPEND, metaspace, tokenizer_json
from slimtune.export.huggingface import save
from slimtune.export.tokenizer import settle
from slimtune.models.load import TOKENIZER_FILES, load_tokenizer
from slimtune.sections import ModelConfig
from slimtune.structure.families import FAMILIES
from slimtune.structure.plan import Plan

TEXTS = (
    *("", "a", " one", "  two  spaces ", "x\n\ny\t", "    return 1", "1234 x1 3.14", "Grüße, größer", "cafe\u0301 \ufb01"),
    *("日本語", "\U0001f642", "I'LL don't", "one<s>two</s>three", "<s> one </s>  two\n", "[INST] what? [/INST]", "a<tool> b"),
)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
KINDS = {"prepend": PREPEND, "metaspace": metaspace("first"), "bytes": None}
CLASSES = (None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "GemmaTokenizer", "Odd")
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 4}


@cache
def files_of(kind: str) -> tuple[dict[str, Any], dict[str, str]]:
    """A tokenizer.json and the special tokens that its settings name."""
    if (rule := KINDS[kind]) is None:
        return json.loads(make_tokenizer(bos=True).backend_tokenizer.to_str()), {**NAMES, "pad_token": "<pad>"}
    return tokenizer_json(rule), {**NAMES, "unk_token": "<unk>"}


def write_tokenizer(folder: Path, kind: str, named: str | None, **settings: Any) -> Path:
    """Its two files, as others write them: on one line, read-only."""
    folder.mkdir(exist_ok=True)
    raw, names = files_of(kind)
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    told = {**names, **settings, **({"tokenizer_class": named} if named else {})}
    (folder / "tokenizer_config.json").write_text(json.dumps(told), encoding="utf-8")
    return folder


def reads(tokenizer: Any) -> tuple[Any, ...]:
    """What a user may notice."""
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    back = [tokenizer.decode(each) for each in ids]
    batch = {key: list(value) for key, value in tokenizer(list(TEXTS[:3])).items()}
    return ids, bare, back, batch, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.padding_side


def typed(folder: Path, model_type: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def carried(base: Path, folder: Path) -> list[str]:
    """The lines told, the files of ``base`` copied to ``folder`` and settled there."""
    told: list[str] = []
    for file in (file for name in TOKENIZER_FILES for file in base.glob(name)):
        (folder / file.name).write_bytes(file.read_bytes())
        (folder / file.name).chmod(0o444)
    settle(lambda: load_tokenizer(ModelConfig(path=str(base))), folder, told.append)
    return told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_a_file_may_name_beside_every_family(family: str, kind: str, tmp_path: Path) -> None:
    """The same model type leaves the files as they are; another one changes no more than is needed."""
    for named in CLASSES:
        base = write_tokenizer(typed(tmp_path / f"base-{named}", family), kind, named)
        try:
            wanted = reads(AutoTokenizer.from_pretrained(base))
        except Exception:  # GemmaTokenizer needs <unk>, which bytes have not
            assert kind == "bytes"
            continue
        for model_type in (family, f"slimtune_{family}", "nemotron-nas", *(["mistral"] if family == "llama" else [])):
            folder = typed(tmp_path / f"{named}-{model_type}", model_type)
            assert carried(base, folder) == []
            assert reads(AutoTokenizer.from_pretrained(folder)) == wanted
            same = (folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
            assert same or (family, model_type, named) == ("llama", "mistral", "LlamaTokenizer") or named is None
            if model_type == family:
                assert same
                assert (folder / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()
