"""A run in one sentence: smaller by, faster by, keeps how much of what."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from slimtune.evaluate.shipped import tasks_of
from slimtune.report.files import kept
from slimtune.report.run import Figures, Run
from slimtune.report.words import metric_name, millions, number, share
from slimtune.train.task_figures import OF_EXPERTS

_MAIN = ("accuracy", "rougeL", "rouge1")
"""Of a task's figures the one that stands for it, the first that it has."""


@cache
def general_tasks() -> tuple[str, ...]:
    """Of the suite ``general``: what a model of a domain should still know."""
    return tuple(tasks_of("general"))


@dataclass(frozen=True)
class Reference:
    """What a run's quality is held to.

    Attributes:
        model: ``dense_lora`` or ``base``.
        called: its name in a sentence; ``of`` it: what is its own.
    """

    model: str
    figures: Figures
    called: str
    of: str


def reference(run: Run, others: Sequence[Run] = ()) -> Reference:
    """Dense LoRA: the run's own, or that of a run beside it with the same base and test rows; else the untuned base."""
    if run.of("dense_lora"):
        return Reference("dense_lora", run.of("dense_lora"), "dense LoRA", "dense LoRA's")
    for other in others:
        if other.of("dense_lora") and _alike(run, other):
            return Reference("dense_lora", other.of("dense_lora"), "dense LoRA", f"dense LoRA's ({other.name})")
    return Reference("base", run.of("base"), "the untuned base", "the untuned base's")


def _alike(run: Run, other: Run) -> bool:
    """Whether two runs are known to be of the same base, and were measured on the same rows."""
    told = [(each.summary.get("weights"), (each.summary.get("data") or {}).get("test")) for each in (run, other)]
    return all(told[0]) and told[0] == told[1] and all(same_rows([run, other], name) for name in run.of("result"))


def same_rows(runs: Iterable[Run], figure: str = "") -> bool:
    """Whether runs that say on which test rows they were measured name the same ones: of a task's figure those of the task."""
    task = figure.partition(".")[0] if "." in figure else ""
    told = [(run.summary.get("task_rows") or {}) if task else (run.summary.get("data") or {}) for run in runs]
    return len({each[task or "test"] for each in told if each.get(task or "test")}) < 2


def verdict(run: Run, others: Sequence[Run] = ()) -> str:
    """One sentence on a run: what is not measured is said to be so.

    Args:
        others: runs beside it, of which one may have the dense LoRA that this one went without.
    """
    if not run.finished:
        return _unfinished(run)
    parts = [_used(run), _smaller(run), _faster(run), _keeps(run, reference(run, others)), _general(run)]
    told = [part for part in parts if part]
    return f"{told[0][0].upper()}{told[0][1:]}{''.join(f'; {part}' for part in told[1:])}."


def _unfinished(run: Run) -> str:
    if not run.main:
        return "This run is not finished, and has no step yet."
    last, steps = run.main[-1], f"{len(run.main):,} step{'s' if len(run.main) > 1 else ''} in all"
    part = f"{share(kept(last))} {'used by a token' if run.experts else 'kept'}"
    where = f"{last['phase']} step {last['step'] + 1}, {part}, {steps}"
    breached = ", ".join(last.get("breached", ()))
    if breached and run.recipe.get("alarm", {}).get("then") == "stop":
        return f"Stopped by a guard ({breached}) at {where}."
    return f"This run is not finished: {where}."


def _smaller(run: Run) -> str:
    base, result = run.of("base"), run.of("result")
    before, after = base.get("parameters"), result.get("parameters")
    if not before or not after:
        stored = " are stored" if run.experts else ""
        return f"{millions(after)} parameters{stored}" if after else "size not measured"
    if before == after:
        return f"as large as its base ({millions(after)} parameters)"
    change = f"{1 - after / before:.1%} smaller" if after < before else f"{after / before:.2f} times as large"
    what = "stored it is " if run.experts else ""
    return f"{what}{change} ({millions(after)} {'of' if after < before else 'for'} {millions(before)} parameters)"


def _used(run: Run) -> str:
    """Of experts: what a token uses of what is stored."""
    active, ratio = (run.of("result").get(name) for name in OF_EXPERTS)
    if not active:
        return ""
    blocks = f", {ratio:.1%} of the base's blocks" if ratio else ""
    return f"a token uses {millions(active)} parameters{blocks}"


def _faster(run: Run) -> str:
    if not run.bench or not run.bench["ratios"]:
        return "" if _same_size(run) else "speed not measured (slimtune bench)"
    found = decode_ratio(run.bench["ratios"])
    if found is None:
        return "speed not measured (slimtune bench)"
    way = "" if found["how"] == "eager" else f", {found['how']}"
    than = f" as {beside(run)}" if beside(run) else ""
    spread = f"{found['low']:.2f} to {found['high']:.2f}"
    return f"decodes {found['faster']:.2f} times as fast{than} ({spread}, batch {found['batch']}{way}, {run.bench['machine']})"


def beside(run: Run) -> str:
    """The model that the bench held the run's own against, where it is another one than its base; else nothing."""
    other, base = run.bench["models"][-1] if run.bench else {}, run.of("base").get("parameters")
    return "" if base is None or other.get("parameters") in (None, base) else str(other["name"])


def _same_size(run: Run) -> bool:
    return not run.experts and run.of("base").get("parameters") == run.of("result").get("parameters")


def decode_ratio(ratios: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of what a bench compared, decoding; see ``fastest``."""
    return fastest([ratio for ratio in ratios if ratio["what"] == "decode"])


def fastest(ratios: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of ratios of one kind that of the smallest batch, launched as a graph where there is one: then Python is no brake."""
    batch = min((ratio["batch"] for ratio in ratios), default=0)
    order = {"compiled graph": 0, "graph": 1}
    some = [ratio for ratio in ratios if ratio["batch"] == batch]
    return min(some, key=lambda ratio: order.get(ratio["how"], 2), default=None)


def _keeps(run: Run, held_to: Reference) -> str:
    result, other = run.of("result"), held_to.figures
    parts = []
    if result.get("ppl") and other.get("ppl"):
        parts.append(f"perplexity {number('ppl', result['ppl'])} for {held_to.of} {number('ppl', other['ppl'])}")
    scores, tasks = scores_kept(run, other)
    if scores:
        names = sorted({metric_name(key.rpartition(".")[2]) for key in scores})
        mean, keeps = statistics.fmean(scores.values()), "keeps " if held_to.model == "dense_lora" else ""
        parts.append(f"{keeps}{mean:.0%} of {held_to.of} {' and '.join(names)} on {_on(list(scores), tasks)}")
    elif tasks:
        parts.append(f"on none of {tasks} tasks did {held_to.called} do better than the baseline")
    return ", ".join(parts)


def _on(figures: Sequence[str], tasks: int) -> str:
    if len(figures) < tasks:
        return f"the {len(figures)} of {tasks} tasks in which that beats the baseline"
    return f"{tasks} tasks" if tasks > 1 else figures[0].partition(".")[0]


def scores_kept(run: Run, other: Figures) -> tuple[dict[str, float], int]:
    """{figure: the result's over the other's} for the main figure of each task of scores, and how many such tasks there are.

    Left out is a task in which the other's interval does not lie above what an answer gets that knows nothing: who keeps all of
    that has kept nothing.
    """
    result = run.of("result")
    found: dict[str, float] = {}
    names = dict.fromkeys(key.partition(".")[0] for key in result if "." in key and not key.startswith("speed."))
    mains = [next((f"{task}.{name}" for name in _MAIN if f"{task}.{name}" in result), None) for task in names]
    keys = [key for key in mains if key and other.get(key, 0) > 0 and run.better(key) == "higher"]
    for key in keys:
        baseline = other.get(f"{key}_majority", other.get(f"{key}_chance"))
        if baseline is None or other.get(f"{key}_low", other[key]) > baseline:
            found[key] = result[key] / other[key]
    return found, len(keys)


def _general(run: Run) -> str:
    changes = general_changes(run)
    if not changes:
        return ""
    told = ", ".join(f"{change:+.1%} on {task}" for task, change in changes.items())
    return f"general text, bits per byte against its base: {told}"


def general_changes(run: Run) -> dict[str, float]:
    """{task: relative change of bits per byte, base to result} of the general tasks that the run followed."""
    base, result = run.of("base"), run.of("result")
    keys = {task: f"{task}.bits_per_byte" for task in general_tasks()}
    return {task: result[key] / base[key] - 1 for task, key in keys.items() if key in base and key in result}
