"""Rows and metrics for tasks of lm-evaluation-harness.

Copied as it is into every folder of written tasks, so that plain ``lm_eval`` gives the same figures; it therefore imports
nothing of slimtune.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROUGE = ("rouge1", "rouge2", "rougeL")


def rows(file: str, scoring: Mapping[str, Any] | None = None, **_: Any) -> dict[str, Any]:
    """The data set of a task: ``{"test": rows}`` from a jsonl file beside this one, held in memory.

    Args:
        scoring: what ``own`` needs to know: it is shown a row and nothing else.
    """
    from datasets import Dataset

    lines = (Path(__file__).parent / file).read_text(encoding="utf-8").split("\n")
    docs = [json.loads(line) for line in lines if line]
    if scoring:
        docs = [{**doc, "scoring": {**scoring, "row": number}} for number, doc in enumerate(docs, 1)]
    return {"test": Dataset.from_list(docs)}


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


class Unscored(Exception):
    """The function of a task gave no figures for the answer to a row.

    Attributes:
        task: its name; row: its number, from 1.
        reason: what the function did, in words that follow its name.
        answer: the beginning of the answer that it did so with.
    """

    def __init__(self, task: str, row: int, function: str, reason: str, answer: str):
        super().__init__(f"task {task!r}, row {row}: {function} {reason}, for the answer {answer!r}")
        self.task, self.row, self.reason, self.answer = task, row, reason, answer


def own(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """What the function of a task gives for an answer: ``{figure: number}``; true and false stay what they are.

    It is called with the answer and the row: its prompt, its completion, and all other fields of its record.

    Raises:
        Unscored: it raised an exception, or what it gave is neither a finite number nor a mapping of names to such numbers,
            or its names are not those of the other rows.
    """
    how, answer = doc["scoring"], results[0].strip()
    row = {**json.loads(doc["fields"]), "prompt": doc["prompt"], "completion": doc["completion"].strip()}

    def unscored(reason: str) -> Unscored:
        return Unscored(how["task"], how["row"], how["function"], reason, answer[:80])

    try:
        found = function(how["function"])(answer, row)
    except Exception as error:
        has = f" (the row has {', '.join(row)})" if isinstance(error, KeyError) and not {*map(str, error.args)} & {*row} else ""
        raise unscored(f"raised {type(error).__name__}{f': {error}'[:200] if str(error) else ''}{has}") from error
    values = dict(found) if isinstance(found, Mapping) else {how["function"].rpartition(":")[2]: found}
    numbers = {name: _number(value) for name, value in values.items()}
    if wrong := [name for name, value in numbers.items() if value is None]:
        where = f" under {wrong[0]!r}" if isinstance(found, Mapping) else ""
        raise unscored(f"returned {values[wrong[0]]!r:.80}{where}")
    if not numbers or (how["figures"] and set(numbers) != set(how["figures"])):
        others = f", and for other answers {', '.join(how['figures'])}" if how["figures"] else ""
        raise unscored(f"returned the figures {', '.join(map(str, numbers)) or '(none)'}{others}")
    return {name: value for name, value in numbers.items() if value is not None}


@cache
def function(name: str) -> Callable[[str, dict[str, Any]], Any]:
    """A function by ``FILE.py:NAME``, the file beside this one or with its whole path, or by ``MODULE:NAME``.

    It stays the same until the cache is cleared, whatever becomes of the file: a figure is one function's.
    """
    where, _, attribute = name.rpartition(":")
    found: Callable[[str, dict[str, Any]], Any] = getattr(module(where), attribute)
    return found


def module(where: str) -> ModuleType:
    """A module by its name, or by its file, which ends in ``.py``."""
    return _from_file(Path(__file__).parent / where) if where.endswith(".py") else importlib.import_module(where)


def _from_file(path: Path) -> ModuleType:
    """A file as a module; its code runs once in a process (it may load a model), and again after it was changed."""
    text = path.read_bytes()
    name = f"{path.stem}_{hashlib.sha256(str(path).encode() + text).hexdigest()[:12]}"
    if name not in sys.modules:
        made = sys.modules[name] = ModuleType(name)  # there before its code runs: dataclasses look themselves up
        made.__file__ = str(path)
        try:
            exec(compile(text, str(path), "exec"), vars(made))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _number(value: Any) -> float | None:
    """A finite number, of numpy and torch as well; None of anything else."""
    if getattr(value, "size", None) == 1 or getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, bool):
        return value
    return float(value) if isinstance(value, (int, float)) and abs(value) <= sys.float_info.max else None
