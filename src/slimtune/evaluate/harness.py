"""Figures of a model object on prepared tasks, taken by lm-evaluation-harness, which is imported when it is first needed."""

from __future__ import annotations

import copy
import importlib.util
import logging
import math
import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from slimtune.errors import UserError
from slimtune.evaluate import folder as written
from slimtune.evaluate import metrics, scoring
from slimtune.evaluate.intervals import chance, interval, majority
from slimtune.evaluate.rows import Prepared

Figure = dict[str, Any]
"""``value``; ``low`` and ``high`` (95% interval) if asked for; ``majority`` beside accuracy and macro-F1, ``chance`` beside
ROUGE and functions of the user's."""
See = Callable[[str, int, int], None]
"""What is being done, how many requests of it are through, and of how many."""
EXTRA = "pip install 'slimtune[eval]'"
_WORK = {"Running loglikelihood requests": "likelihoods", "Running generate_until requests": "answers"}
"""The harness's names of its loops over requests (those of a perplexity are likelihoods too)."""


def check_installed() -> None:
    """Raise UserError unless the harness and what the metrics need are there."""
    for module, package in (("lm_eval", "lm-eval"), ("rouge_score", "rouge-score"), ("datasets", "datasets")):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"tasks are run by lm-evaluation-harness, and the package {package} is not installed: {EXTRA}")


def evaluate_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Prepared],
    *,
    batch: int = 8,
    seed: int = 0,
    bf16: bool = False,
    intervals: bool = True,
    see: See = lambda what, done, total: None,
) -> dict[str, dict[str, Figure]]:
    """Run tasks on a model as it stands: a PEFT model with hooks will do. Answers are written greedily.

    Modes of the modules, tokenizer and random states are left as they were.

    Args:
        model: causal LM on its device, in any mode.
        tokenizer: of the model.
        tasks: their rows, made for this tokenizer and the model's window.
        batch: rows in one pass.
        bf16: run under autocast.
        intervals: make 95% intervals.
        see: told of every request that is through.

    Returns:
        ``{task: {metric: figure}}``; empty on ranks other than the first of a host, for which the harness has no results.

    Raises:
        UserError: the harness is not installed, or a function of the user's has no figure for an answer.
    """
    check_installed()
    with tempfile.TemporaryDirectory(prefix="slimtune-tasks-") as name, _quiet(), _unchanged(model):
        folder = Path(name)
        written.write(folder, tasks)
        with _watched(see), _scored(tasks):
            results = _run(getattr(model, "module", model), tokenizer, tasks, folder, batch, seed, bf16)
    if results is None:
        return {}
    return {task.name: _figures(task, results, seed, intervals) for task in tasks}


@contextmanager
def _scored(tasks: Sequence[Prepared]) -> Iterator[None]:
    try:
        yield
    except metrics.Unscored as error:
        task = next(task for task in tasks if task.name == error.task)
        raise scoring.told(task.task, error, task.scorer.origins if task.scorer else ()) from error


def _run(
    model: Any, tokenizer: Any, tasks: Sequence[Prepared], folder: Path, batch: int, seed: int, bf16: bool
) -> Mapping[str, Any] | None:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # which the harness may give a padding token
        backend="causal",
        batch_size=batch,
        softmax_dtype="float32",
        mixed_precision_dtype="bfloat16" if bf16 else None,
    )
    with _without_questions(evaluator):
        found: Mapping[str, Any] | None = evaluator.simple_evaluate(
            model=lm,
            tasks=[written.PREFIX + task.name for task in tasks],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,  # its standard errors know nothing of macro-F1 and perplexity
            random_seed=seed,
            numpy_random_seed=seed % 2**32,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return found


@contextmanager
def _without_questions(evaluator: Any) -> Iterator[None]:
    """Keep the harness from asking git and the machine about themselves: a second a call, and git's complaints on stderr."""
    asked = {name: getattr(evaluator, name) for name in ("get_git_commit_hash", "add_env_info") if hasattr(evaluator, name)}
    for name in asked:
        setattr(evaluator, name, lambda *_: None)
    try:
        yield
    finally:
        for name, function in asked.items():
            setattr(evaluator, name, function)


def _figures(task: Prepared, results: Mapping[str, Any], seed: int, intervals: bool) -> dict[str, Figure]:
    name = written.PREFIX + task.name
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    kind = task.task.file.kind
    baseline = _baseline(task, intervals)
    figures: dict[str, Figure] = {}
    for metric in written.figures_of(task):
        figure: Figure = {"value": float(results["results"][name][f"{metric},none"])}
        if intervals:
            ends = interval(metric, [sample[metric] for sample in samples], seed, task.name)
            figure["low"], figure["high"] = ends or (None, None)
        if metric in baseline:
            figure["majority" if kind == "choice" else "chance"] = baseline[metric]
        figures[metric] = figure
    return figures


def _baseline(task: Prepared, reported: bool) -> dict[str, float]:
    """What answers get that know nothing; of ROUGE, which takes a while, only beside figures that are reported."""
    if task.task.file.kind == "choice":
        return majority([doc["label"] for doc in task.docs])
    if task.scorer:
        return dict(task.scorer.chance) if reported else {}
    return chance(task.docs) if reported and task.task.file.kind == "rouge" else {}


def flat(figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, float]:
    """``{"rqe.accuracy": 0.6, "rqe.accuracy_low": ...}`` of what ``evaluate_tasks`` gives, for rows and summaries."""
    return {
        f"{task}.{metric}" + ("" if key == "value" else f"_{key}"): float(value)
        for task, found in figures.items()
        for metric, figure in found.items()
        for key, value in figure.items()
        if value is not None and math.isfinite(value)
    }


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Modes of the modules and random states, which belong to a training that goes on afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    python, numbers = random.getstate(), np.random.get_state()
    devices = list({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        if cached is not None:
            config.use_cache = cached  # type: ignore[union-attr]
        for module, mode in modes:
            module.training = mode


class _Counter:
    """Stands in for tqdm in the harness's loops over requests."""

    def __init__(self, see: See, items: Iterable[Any] | None = None, *, total: int = 0, desc: str = "", **_: Any):
        self.see, self.items, self.total, self.what, self.done = see, items or (), total, _WORK.get(desc), 0

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def update(self, number: int = 1) -> None:
        self.done += number
        if self.what:
            self.see(self.what, self.done, self.total)

    def close(self) -> None:
        pass


@contextmanager
def _watched(see: See) -> Iterator[None]:
    """Hear of the harness's loops, also of those whose bars it switches off."""
    from lm_eval.models import huggingface

    bars: Any = getattr(huggingface, "tqdm", None)  # without it there is nothing to hear, and no harm
    huggingface.tqdm = partial(_Counter, see)
    try:
        yield
    finally:
        huggingface.tqdm = bars


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and warnings of the libraries underneath: tqdm reads its switch only as it is imported."""
    from tqdm.std import tqdm

    begin = tqdm.__init__

    def silent(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **{**kwargs, "disable": True})

    tqdm.__init__ = silent
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = begin
