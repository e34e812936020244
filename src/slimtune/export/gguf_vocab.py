"""The tokenizer of a model folder as llama.cpp has it: tokens, merges, special tokens, and the name of its word splitter.

llama.cpp splits words by rules that stand in its code under a name (``tokenizer.ggml.pre``). A wrong name gives other tokens
without a word of warning, so the splitter of ``tokenizer.json`` is recognised by what it says, and refused where it is none of
those that were compared; see ``docs/decisions/0021-gguf.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.errors import UserError
from slimtune.export import gguf_pieces
from slimtune.export.gguf_pieces import ELSEWHERE
from slimtune.models.load import load_tokenizer
from slimtune.sections import ModelConfig

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""``llama_token_type`` of llama.cpp."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = "bytes"
_WHOLE = "a word that is a token is not split"
_SPLITTERS: Mapping[tuple[str, ...], str] = {
    (_GPT2, _BYTES): "gpt-2",
    ("digits", _GPT2, _BYTES): "smollm",
    (_LLAMA3, _BYTES, _WHOLE): "llama-bpe",
    (_QWEN2, _BYTES): "qwen2",
}
"""What a splitter does, in order -> the name under which llama.cpp has the same."""


@dataclass(frozen=True)
class Vocabulary:
    """What goes into a GGUF file.

    Attributes:
        model: ``gpt2`` (byte-level BPE) or ``llama`` (SentencePiece-like BPE with bytes to fall back on).
        pre: name of the word splitter.
        tokens, kinds: by id, as many as the embedding has rows.
        merges: of ``gpt2``, best first.
        scores: of ``llama``, by id.
        special: {``bos`` | ``eos`` | ``pad`` | ``unk``: id}.
        adds_bos: a beginning token is put before every text.
        adds_eos: of ``llama``: an end is put after every text.
        space_prefix: of ``llama``: a space is put before a text.
        note: texts that llama.cpp reads otherwise all the same; empty: none.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    special: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool = False
    space_prefix: bool = False
    note: str = ""
    template: str | None = None


def read(folder: Path, rows: int, special: Mapping[str, int]) -> Vocabulary:
    """The vocabulary of a folder's ``tokenizer.json``.

    Args:
        rows: of the embedding: ids that the tokenizer lacks become unused tokens.
        special: ids by the folder's config, for what the tokenizer itself does not say.

    Raises:
        UserError: there is no ``tokenizer.json``, it is of a kind that llama.cpp does not have, or it has more ids than rows.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{str(folder)!r} has no tokenizer.json, which a GGUF file is made of; add it, or {ELSEWHERE}")
    raw = _parsed(file)
    model = raw["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{str(file)!r} is a {model.get('type')} tokenizer; GGUF is written for BPE alone; {ELSEWHERE}")
    if model.get("byte_fallback"):
        return _of_pieces(folder, rows, special, file)
    tokens, kinds = _tokens(raw, rows, file)
    settings, ids = _settings(folder), {text: index for index, text in enumerate(tokens)}
    texts = {short: _text(settings.get(f"{short}_token")) for short in ("bos", "eos", "pad", "unk")}
    named = {**special, **{short: ids[text] for short, text in texts.items() if text in ids}}
    return Vocabulary(
        model="gpt2",
        pre=splitter(raw, file),
        tokens=tokens,
        kinds=kinds,
        merges=[_merge(pair) for pair in model["merges"]],
        scores=[],
        special=named,
        adds_bos=_adds_bos(raw, tokens, named.get("bos")),
        template=_template(folder),
    )


def _of_pieces(folder: Path, rows: int, special: Mapping[str, int], file: Path) -> Vocabulary:
    """The vocabulary of a SentencePiece-like BPE."""
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)), "RUN")
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    raw["model"]["unk_token"] = raw["model"].get("unk_token") or tokenizer.unk_token
    tokens, kinds = _tokens(raw, rows, file)
    pieces = gguf_pieces.read(tokenizer, raw, tokens, file)
    ids = {short: getattr(tokenizer, f"{short}_token_id") for short in ("bos", "eos", "pad", "unk")}
    named = {**special, **{short: index for short, index in ids.items() if index is not None}}
    if "eos" not in named:  # llama.cpp has one anyway
        raise UserError(
            f"{str(file)!r}: no eos_token is named, and llama.cpp takes token 2 for it; name one in tokenizer_config.json"
        )
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        kinds=kinds,
        merges=[],
        scores=pieces.scores,
        special=named,
        adds_bos=pieces.adds_bos,
        adds_eos=pieces.adds_eos,
        space_prefix=pieces.space_prefix,
        note=pieces.note,
        template=_template(folder),
    )


def splitter(raw: Mapping[str, Any], file: Path) -> str:
    """llama.cpp's name for the word splitter of a ``tokenizer.json``. Raises UserError where it has none that is known here."""
    steps = tuple(step for each in _sequence(raw.get("pre_tokenizer")) for step in _step(each))
    steps += (_WHOLE,) if raw["model"].get("ignore_merges") else ()
    if raw.get("normalizer") and raw["normalizer"].get("type") != "NFC":
        raise UserError(
            f"{str(file)!r} rewrites text before it splits it ({raw['normalizer'].get('type')}), which llama.cpp does not; "
            f"{ELSEWHERE}"
        )
    if steps not in _SPLITTERS:
        raise UserError(
            f"{str(file)!r} splits words in a way that is none of those known to be in llama.cpp "
            f"({', '.join(_SPLITTERS.values())}); {ELSEWHERE}"
        )
    return _SPLITTERS[steps]


def _sequence(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if not step:
        return []
    return list(step["pretokenizers"]) if step["type"] == "Sequence" else [step]


def _step(step: Mapping[str, Any]) -> tuple[str, ...]:
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return (_GPT2, _BYTES) if step.get("use_regex", True) else (_BYTES,)
    if step["type"] == "Digits" and step.get("individual_digits"):
        return ("digits",)
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return (str(step["pattern"].get("Regex")),)
    return (json.dumps(step, sort_keys=True),)


def _tokens(raw: Mapping[str, Any], rows: int, file: Path) -> tuple[list[str], list[int]]:
    ids = {index: text for text, index in raw["model"]["vocab"].items()}
    kinds = dict.fromkeys(ids, NORMAL)
    if raw["model"].get("byte_fallback"):
        kinds |= {index: BYTE for index, text in ids.items() if text in gguf_pieces.BYTES}
    for token in raw.get("added_tokens", ()):
        ids[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    unknown = raw["model"].get("unk_token")
    kinds |= {index: UNKNOWN for index, text in ids.items() if unknown is not None and text == unknown}
    if max(ids) >= rows:
        raise UserError(f"{str(file)!r} has the id {max(ids)} and the embedding {rows} rows; give the tokenizer of this model")
    return [ids.get(index, f"[PAD{index}]") for index in range(rows)], [kinds.get(index, UNUSED) for index in range(rows)]


def _merge(pair: str | Sequence[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _adds_bos(raw: Mapping[str, Any], tokens: Sequence[str], bos: int | None) -> bool:
    steps = raw.get("post_processor") or {}
    every = steps.get("processors", [steps]) if steps else []
    first = [step["single"][0] for step in every if step.get("type") == "TemplateProcessing" and step.get("single")]
    return bos is not None and any(part.get("SpecialToken", {}).get("id") == tokens[bos] for part in first)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    return _parsed(file) if file.is_file() else {}


def _parsed(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{str(file)!r} is not JSON ({error}); fetch or save the tokenizer again") from error
    return found


def _template(folder: Path) -> str | None:
    if isinstance(given := _settings(folder).get("chat_template"), str):
        return given
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
