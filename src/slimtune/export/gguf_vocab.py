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

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""``llama_token_type`` of llama.cpp."""
ELSEWHERE = "use the model's folder as it is"

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
        space_prefix: of ``llama``: a space is put before a text.
    """

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str]
    scores: Sequence[float]
    special: Mapping[str, int]
    adds_bos: bool
    space_prefix: bool = False
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
    tokens, kinds = _tokens(raw, rows, file)
    settings = _settings(folder)
    ids = {text: index for index, text in enumerate(tokens)}
    named = {
        short: ids[text] for short in ("bos", "eos", "pad", "unk") if (text := _text(settings.get(f"{short}_token"))) in ids
    }
    sentencepiece = bool(model.get("byte_fallback"))
    spaced = _prepends_space(raw, kinds.count(BYTE), file) if sentencepiece else False
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else splitter(raw, file),
        tokens=tokens,
        kinds=kinds,
        merges=[] if sentencepiece else [_merge(pair) for pair in model["merges"]],
        scores=_scores(model, tokens) if sentencepiece else [],
        special={**special, **named},
        adds_bos=_adds_bos(raw, tokens, {**special, **named}.get("bos")),
        space_prefix=spaced,
        template=settings.get("chat_template") if isinstance(settings.get("chat_template"), str) else _template(folder),
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
        kinds |= {
            index: BYTE for index, text in ids.items() if len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        }
    for token in raw.get("added_tokens", ()):
        ids[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token.get("special") else USER_DEFINED
    unknown = raw["model"].get("unk_token")
    kinds |= {index: UNKNOWN for index, text in ids.items() if unknown is not None and text == unknown}
    if max(ids) >= rows:
        raise UserError(f"{str(file)!r} has the id {max(ids)} and the embedding {rows} rows; give the tokenizer of this model")
    return [ids.get(index, f"[PAD{index}]") for index in range(rows)], [kinds.get(index, UNUSED) for index in range(rows)]


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Tokens that are merged earlier have a higher score, as in a SentencePiece model."""
    rank: dict[str, int] = {}
    for index, pair in enumerate(model["merges"]):
        left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
        rank.setdefault(left + right, index)
    worst = -float(len(rank) + 1)
    return [-float(rank[token]) if token in rank else worst for token in tokens]


def _merge(pair: str | Sequence[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _adds_bos(raw: Mapping[str, Any], tokens: Sequence[str], bos: int | None) -> bool:
    steps = raw.get("post_processor") or {}
    every = steps.get("processors", [steps]) if steps else []
    first = [step["single"][0] for step in every if step.get("type") == "TemplateProcessing" and step.get("single")]
    return bos is not None and any(part.get("SpecialToken", {}).get("id") == tokens[bos] for part in first)


_MARK = "\u2581"
"""A space, in tokens of the SentencePiece kind."""


def _prepends_space(raw: Mapping[str, Any], byte_tokens: int, file: Path) -> bool:
    """Whether a text gets a space in front. Raises UserError where more is done to it, or a byte has no token of its own."""
    rules = raw.get("normalizer") or {}
    normalizer = [step["type"] for step in (rules["normalizers"] if rules.get("type") == "Sequence" else [rules]) if step]
    steps = _sequence(raw.get("pre_tokenizer"))
    known = normalizer in ([], ["Replace"], ["Prepend", "Replace"]) and all(step["type"] == "Metaspace" for step in steps)
    if not known or bool(normalizer) == bool(steps) or byte_tokens < 256:
        raise UserError(
            f"{str(file)!r} treats spaces, text or bytes in a way that is not known to be llama.cpp's (a space mark put by its "
            f"normalizer or a Metaspace, 256 byte tokens); {ELSEWHERE}"
        )
    if steps:
        return bool(steps[0].get("replacement", _MARK) == _MARK and steps[0].get("prepend_scheme", "always") != "never")
    return "Prepend" in normalizer


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
    file = folder / "chat_template.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
