"""Rows and metrics for tasks of lm-evaluation-harness.

Copied as it is into every folder of written tasks, so that plain ``lm_eval`` gives the same figures; it therefore imports
nothing of slimtune.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL")


def rows(file: str, **_: Any) -> dict[str, Any]:
    """The data set of a task: ``{"test": rows}`` from a jsonl file beside this one, held in memory."""
    from datasets import Dataset

    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").split("\n")
    return {"test": Dataset.from_list([json.loads(line) for line in lines if line])}


def choice(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """The choice with the largest log-likelihood, summed over its tokens; of equal ones the first."""
    scores = [score for score, _ in results]
    answer = scores.index(max(scores))
    return {"accuracy": float(answer == doc["label"]), "macro_f1": [doc["label"], answer]}


def macro_f1(pairs: Sequence[Sequence[int]]) -> float:
    """Mean F1 over the classes that occur among labels or answers, from (label, answer) pairs."""
    classes = sorted({value for pair in pairs for value in pair})
    scores = []
    for name in classes:
        hits = sum(label == answer == name for label, answer in pairs)
        scores.append(2 * hits / sum((label == name) + (answer == name) for label, answer in pairs))
    return sum(scores) / len(scores)


def rouge(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with stemming, 0 to 1."""
    scores = _scorer().score(doc["completion"].strip(), results[0].strip())
    return {name: scores[name].fmeasure for name in ROUGE}


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)


def perplexity(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Log-likelihood (nats) of a text with the tokens and bytes that it has."""
    ((score, _),) = results
    return {"perplexity": [score, doc["tokens"]], "bits_per_byte": [score, doc["bytes"]]}


def token_perplexity(pairs: Sequence[Sequence[float]]) -> float:
    """exp(-sum of log-likelihoods / sum of tokens), of losses that a float's exponential holds."""
    return math.exp(min(-_ratio(pairs), 700.0))


def bits_per_byte(pairs: Sequence[Sequence[float]]) -> float:
    """-sum of log-likelihoods / (ln 2 x sum of bytes)."""
    return -_ratio(pairs) / math.log(2)


def _ratio(pairs: Sequence[Sequence[float]]) -> float:
    return sum(score for score, _ in pairs) / sum(size for _, size in pairs)
