"""A GGUF file in llama.cpp against the folder that it was made from in torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from slimtune.export.gguf_pieces import as_there
from slimtune.export.gguf_run import run
from slimtune.export.greedy import continued, same
from slimtune.models.load import pretrained
from slimtune.sections import ModelConfig

LARGEST = {"f32": 0.01, "f16": 0.1, "bf16": 0.3}
"""By kind, the largest difference of log-probabilities from which on a file is another model."""
MEAN = {"q8_0": 0.2, "q5_1": 0.75, "q5_0": 0.75, "q4_1": 1.5, "q4_0": 1.5}
"""The same of their mean, as with fewer bits the largest says little: about five times what honest files were seen to have."""
_MEAN_OF_OTHERS = max(MEAN.values())
_TEXTS = ("The first section describes", "In the case of a patient who", "    return [item for item in")
_MORE = (
    *_TEXTS,
    " one space",
    "  two  spaces",
    "\ttab\n\n\nlines ",
    "1234567 x1y2 3.14",
    "na\u00efve caf\u00e9 Stra\u00dfe \u65e5\u672c\u8a9e \U0001f642",
    "I'LL don't",
)
"""Texts whose splitting is compared, and one with the end of a text within."""
_TOKENS = 32
_TOP, _FEW = 50, 5


@torch.no_grad()
def compared(folder: Path, file: Path) -> dict[str, Any]:
    """llama.cpp on ``file`` and torch on ``folder`` (fp32), from the same tokens.

    Returns:
        ``tokens_same`` of ``tokens``: greedy ones of all texts, each up to the first that differs; ``logprob_difference``: the
        largest among the likeliest first tokens, ``logprob_mean``: the mean; ``load_s`` in llama.cpp; ``texts``: those that
        are split otherwise, as (text, number of tokens by the folder's tokenizer, by llama.cpp), but for what the export
        tells (``note``).

    Raises:
        UserError: one of them does not run.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [list(tokenizer(text)["input_ids"]) for text in _TEXTS]
    ran = run(file, prompts, _TOKENS, _TOP, threads=torch.get_num_threads())
    model: Any = pretrained(ModelConfig(path=str(folder)), {"dtype": torch.float32}, "RUN").eval()
    alike, differences = 0, []
    for prompt, tokens, logprobs in zip(prompts, ran.tokens, ran.logprobs, strict=True):
        alike += same(continued(model, prompt, _TOKENS), tokens)
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        differences += [abs(expected[token].item() - value) for token, value in logprobs.items()]
    told = torch.tensor(differences, dtype=torch.float64)  # whose maximum keeps NaN
    figures: dict[str, Any] = {"tokens_same": alike, "tokens": _TOKENS * len(prompts)}
    figures |= {"logprob_difference": told.max().item(), "logprob_mean": told.mean().item(), "load_s": ran.load_s}
    return {**figures, "texts": _split_otherwise(tokenizer, file)}


def judged(found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Whether figures of ``compared`` are those of the same model in ``kind``.

    Returns:
        ``limit``; ``limit_of``: the name of the figure that it holds for; ``ok``: not for a figure that is no number.
    """
    name = "logprob_difference" if kind in LARGEST else "logprob_mean"
    limit = LARGEST[kind] if kind in LARGEST else MEAN.get(kind, _MEAN_OF_OTHERS)
    return {"limit": limit, "limit_of": name, "ok": math.isfinite(found["logprob_difference"]) and found[name] <= limit}


def _split_otherwise(tokenizer: Any, file: Path) -> list[tuple[str, int, str]]:
    """Texts that llama.cpp splits into other tokens. It tells their number alone, so it also goes on from these tokens."""
    end = tokenizer.added_tokens_decoder.get(tokenizer.eos_token_id)
    texts = [*_MORE, *([f"one{end}two"] if end and not end.normalized else [])]
    ids = [list(tokenizer(as_there(tokenizer, text))["input_ids"]) for text in texts]
    ran = run(file, [*texts, *ids], 1, _FEW, threads=torch.get_num_threads())
    found = []
    for text, mine, count, read, given in zip(texts, ids, ran.read, ran.logprobs, ran.logprobs[len(texts) :], strict=False):
        both = read.keys() & given.keys()  # the last of the few may change places with the next
        if count != len(mine):
            found.append((text, len(mine), str(count)))
        elif not both or any(abs(read[token] - given[token]) > 1e-3 for token in both):
            found.append((text, len(mine), f"{count} other"))
    return found
