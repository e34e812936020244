"""A written folder's tokenizer is the base's, whatever class transformers chooses for the folder's model type."""

from __future__ import annotations

import json
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

TEXTS = (
    *("", "a", " one", "  two  spaces ", "x\n\ny\t", "    return 1", "1234 x1 3.14", "Grüße, größer", "cafe\u0301 \ufb01"),
    *("日本語", "\U0001f642", "I'LL don't", "one<s>two</s>three", "<s> one </s>  two\n", "[INST] what? [/INST]", "a<tool> b"),
)
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
KINDS = {"prepend": PREPEND, "metaspace": metaspace("first"), "bytes": None}
CLASSES = (None, "PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2TokenizerFast", "GemmaTokenizer")
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
    return (
        ids,
        bare,
        back,
        batch,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.padding_side,
    )


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


@pytest.mark.parametrize("family", FAMILIES)
def test_every_class_a_file_may_name_beside_every_family(family: str, tmp_path: Path) -> None:
    for named in CLASSES:
        base = write_tokenizer(typed(tmp_path / f"base-{named}", family), "prepend", named)
        wanted = reads(AutoTokenizer.from_pretrained(base))
        for model_type in (f"slimtune_{family}", *(["mistral", "nemotron-nas"] if family == "llama" else [])):
            folder = typed(tmp_path / f"{named}-{model_type}", model_type)
            assert carried(base, folder) == []
            assert reads(AutoTokenizer.from_pretrained(folder)) == wanted


@pytest.mark.parametrize(("kind", "named"), [("bytes", "GPT2TokenizerFast"), ("bytes", None), ("metaspace", "LlamaTokenizer")])
@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_files_that_give_the_same_tokenizer_stay_as_they_are(family: str, kind: str, named: str | None, tmp_path: Path) -> None:
    base, folder = write_tokenizer(typed(tmp_path / "base", family), kind, named), typed(tmp_path / "folder", family)
    assert carried(base, folder) == []
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (base / file).read_bytes()


SAVED: dict[str, tuple[str, Kept, dict[str, Any], str, bool]] = {
    # family of the base, whose files name LlamaTokenizer; what it is cut to; the folder's model type; tokenizer.json stays
    "by layer": ("mistral", UNEVEN, {}, "slimtune_mistral", True),
    "granite": ("granite", UNEVEN, {}, "slimtune_granite", True),
    "llama as mistral": ("llama", even([0, 1, 3], 96), WIDE, "mistral", False),
}


@pytest.mark.parametrize(("name", "kept", "overrides", "model_type", "stays"), SAVED.values(), ids=SAVED)
def test_a_runs_folder_and_what_is_made_of_it(
    name: str, kept: Kept, overrides: dict[str, Any], model_type: str, stays: bool, tmp_path: Path
) -> None:
    base = write_tokenizer(typed(tmp_path / "base", name), "prepend", "LlamaTokenizer", legacy=True, model_max_length=77)
    wanted = reads(AutoTokenizer.from_pretrained(base))
    model, plan = cut_model(name, kept, vocab_size=1024, **overrides)
    said: list[str] = []
    save(model, ModelConfig(path=str(base)), plan, tmp_path / "model", None, {}, say=said.append)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == model_type
    for to in ("", "hf", "hf-uniform"):
        folder = Path(slimtune.export_model(tmp_path, to, check=False, say=said.append)["file"]) if to else tmp_path / "model"
        assert reads(AutoTokenizer.from_pretrained(folder)) == wanted
        assert ((folder / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()) is stays
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        assert (settings["tokenizer_class"], settings["model_max_length"]) == ("PreTrainedTokenizerFast", 77)
    assert not [line for line in said if line.startswith("tokenizer")]


def test_a_layer_wise_llama_as_a_stock_mistral(tmp_path: Path) -> None:
    three: Kept = ({"kv_group": [0, 1, 3], "ffn": range(50)}, {"kv_group": [2], "ffn": range(96)})
    base = write_tokenizer(typed(tmp_path / "base", "llama"), "prepend", "LlamaTokenizer")
    model, plan = cut_model("llama", three, vocab_size=1024, num_hidden_layers=2, **WIDE)
    save(model, ModelConfig(path=str(base)), plan, tmp_path / "model", None, {})
    made = {"model": "slimtune_llama", "model-hf-uniform": "mistral", "model-vllm-deci": "nemotron-nas"}
    slimtune.export_model(tmp_path, "hf-uniform", check=False)
    slimtune.export_model(tmp_path, "vllm", form="deci", check=False)
    for name, model_type in made.items():
        assert json.loads((tmp_path / name / "config.json").read_text())["model_type"] == model_type
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=False)
        assert reads(tokenizer) == reads(AutoTokenizer.from_pretrained(base))


def test_code_of_others_is_told_in_one_line_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Their code is not run, so nothing is known of what it does."""
    base = write_tokenizer(
        typed(tmp_path / "base", "llama"), "bytes", "OddTokenizer", auto_map={"AutoTokenizer": ["odd.Odd", None]}
    )
    (base / "tokenization_odd.py").write_text("class Odd:\n    pass\n")
    model, plan = cut_model("llama", UNEVEN, vocab_size=320)
    save(model, ModelConfig(path=str(base)), plan, tmp_path / "model", None, {})
    (line,) = [each.message for each in caplog.records if each.name == "slimtune"]
    assert line.startswith("tokenizer: its files are copied as they are and were not compared with the base's")
    assert len(line.splitlines()) == 1
    for file in ("tokenizer.json", "tokenizer_config.json", "tokenization_odd.py"):
        assert (tmp_path / "model" / file).read_bytes() == (base / file).read_bytes()


class Shifted:
    """A tokenizer that no files of these give."""

    backend_tokenizer = None

    def __init__(self, real: Any):
        self._real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def __len__(self) -> int:
        return len(self._real)

    def __call__(self, text: str, **settings: Any) -> dict[str, list[int]]:
        return {"input_ids": [token + 1 for token in self._real(text, **settings)["input_ids"]]}


def test_a_tokenizer_that_no_files_give_is_told_and_the_files_are_left(tmp_path: Path) -> None:
    base = write_tokenizer(typed(tmp_path / "base", "llama"), "bytes", "LlamaTokenizer")
    told: list[str] = []
    before = (base / "tokenizer_config.json").read_bytes()
    settle(lambda: Shifted(make_tokenizer()), base, told.append)
    assert told == [
        "tokenizer: from this folder transformers makes another one than the base's Shifted; its files are copied as they are, "
        "so load the base's"
    ]
    assert (base / "tokenizer_config.json").read_bytes() == before


def test_a_folder_without_a_tokenizer_is_not_looked_at(tmp_path: Path) -> None:
    settle(lambda: pytest.fail("loaded"), typed(tmp_path, "llama"), pytest.fail)
