"""Figures of tasks in words, from how they stand among a model's: ``{"rqe.accuracy": 0.6, "rqe.accuracy_low": 0.5, ...}``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Literal

Better = Literal["lower", "higher"]
LOWER = ("perplexity", "bits_per_byte", "ppl", "loss")
"""Figures that are the better the lower they are; all others, but those of which a task says so, the higher."""
OF_EXPERTS = {"active_parameters": "parameters", "active_ratio": "block_ratio"}
"""Figures that only models with experts have, and what they are of a model of which a token uses all."""
_BASELINES = ("_majority", "_chance")
_BESIDE = (".rows", "_low", "_high", *_BASELINES)


def better(figure: str, lower: Collection[str] = ()) -> Better:
    """Which way a figure of quality is the better, by its name: ``ppl``, ``rqe.accuracy``, ``valid_rqe.accuracy``.

    Args:
        lower: those of which tasks say so: ``lower_is_better`` in a run's summary.
    """
    names = {figure, figure.removeprefix("valid_")}
    return "lower" if names & {*lower} or any(name.rpartition(".")[2] in LOWER for name in names) else "higher"


def names_of(models: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """{key: what to call it} of the task figures that any of the models has: with what answers get that know nothing."""
    models = list(models)
    found: dict[str, str] = {}
    for key in dict.fromkeys(key for figures in models for key in figures if "." in key and not key.endswith(_BESIDE)):
        baselines = [figures[key + end] for figures in models for end in _BASELINES if key + end in figures]
        baseline = f" (baseline {baselines[0]:.3f})" if baselines else ""  # of the rows, so the same for all models
        found[key] = key.replace(".", ", ").replace("_", " ") + baseline
    return found


def told(figures: Mapping[str, float], key: str) -> str:
    """A figure with its interval where it has one; nothing where it is not there."""
    if key not in figures:
        return ""
    ends = [figures[key + end] for end in ("_low", "_high") if key + end in figures]
    return f"{figures[key]:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if len(ends) == 2 else "")
