"""``slimtune check``: a run's figures held to gates, those of a baseline among them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimtune.bench.named import speeds
from slimtune.condition import Condition
from slimtune.errors import UserError, nearest
from slimtune.evaluate.shipped import built_in
from slimtune.evaluate.tasks import find_suites
from slimtune.guard.names import SPEED
from slimtune.guard.ruling import Ruling, rule
from slimtune.report.quality import task_figures, telling
from slimtune.report.run import Run, read_run, read_runs
from slimtune.report.verdict import fastest
from slimtune.train.task_figures import OF_EXPERTS
from slimtune.yaml_file import read_yaml

SAME_DATA = "data."
"""Rows that hold data of both runs to be the same, else their figures do not compare: ``data.test``, ``data.TASK``."""
NOISY = {"lower": "<= baseline + noise", "higher": ">= baseline - noise"}
"""Default gates of figures with intervals: worse than chance alone would have it is a regression."""
PLAIN = {"lower": "<= 1.02 x baseline", "higher": ">= 0.98 x baseline"}
"""Of figures of quality without one."""
SIZE, FASTER = "<= 1.01 x baseline", ">= 0.9 x baseline"
"""Of parameters and bytes; of how many times as fast as its base a model is, which another machine changes little."""
_SIZES = ("parameters", "active_parameters", "bytes")
_FASTER = re.compile(r"speed\.(?:prefill|first_token|decode)_faster")
_NORMAL = 1.959964
"""Standard errors of half a 95% interval."""


@dataclass(frozen=True)
class Checked:
    """What a check found.

    Attributes:
        run, baseline: their names; no baseline is empty.
        rulings: a row for each gate and figure.
        values: of the baseline's figures, for those who read.
        left_out: figures that only one of both has, where the default gates were asked for.
        unknown: whether it is not known of both on which test data they were measured.
        asked: how many rows come of what was asked for; those of the default gates follow.
    """

    run: str
    baseline: str
    rulings: list[Ruling]
    values: dict[str, float]
    left_out: list[str]
    unknown: bool = False
    asked: int = 0

    @property
    def failed(self) -> list[Ruling]:
        """Rows out of their bounds."""
        return [ruling for ruling in self.rulings if not ruling.holds]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        rows = [ruling.to_dict() for ruling in self.rulings]
        told = {"left_out": self.left_out, "test_data_unknown": self.unknown}
        return {"run": self.run, "baseline": self.baseline, "passed": not self.failed, "rows": rows, **told}


def check(
    run: str | Path,
    baseline: str | Path | None = None,
    gates: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> Checked:
    """Hold a finished run to its gates.

    Args:
        run: its folder, or one with its ``summary.json``.
        baseline: another one's, which gates may be relative to.
        gates: ``{figure: condition}``, beside those of ``file``. With neither the guards of the run's recipe hold, and with a
            baseline the default gates: no figure worse than the baseline's beyond its noise.
        file: a YAML file of such gates.

    Raises:
        UserError: a run is missing or not finished, a gate is none, or there is nothing to check.
    """
    read = read_runs([run, baseline]) if baseline is not None else [read_run(run)]
    for each in read:
        if not each.finished:
            raise UserError(f"RUN {str(each.path)!r} is not finished: it has no summary.json; go on with --resume")
    mine, other = read[0], read[1] if len(read) > 1 else None
    given = {**(_from_file(file) if file else {}), **(gates or {})}
    asked = given or dict(mine.recipe.get("guard") or {}) or _held(mine)
    if not asked and other is None:
        raise UserError(
            f"nothing to check: the recipe of {mine.name} has no guard; give --baseline RUN2, or gates: --gate 'ppl=<= 30'"
        )
    rulings = [ruling for name, text in asked.items() for ruling in _ruled(name, text, mine, other)]
    count = len(rulings)
    left_out: list[str] = []
    if other is not None and not given:
        extra, left_out = defaults(mine, other)
        known = {(ruling.figure, ruling.condition) for ruling in rulings}
        rows = [ruling for name, text in extra.items() for ruling in _ruled(name, text, mine, other)]
        rulings += [ruling for ruling in rows if (ruling.figure, ruling.condition) not in known]
    if other is None:
        return Checked(mine.name, "", rulings, {}, left_out, asked=count)
    same = _same_data(mine, other, [ruling.figure for ruling in rulings])
    unknown = not any(ruling.figure == "data.test" for ruling in same)
    values = figures_of(other, beside=mine)
    return Checked(mine.name, other.name, [*same, *rulings], values, left_out, unknown, len(same) + count)


def _held(run: Run) -> dict[str, str]:
    """The guards of a summary that is alone: it says what each was."""
    return {ruling["guard"]: ruling["condition"] for ruling in run.summary.get("guard", ())}


def _from_file(file: str | Path) -> dict[str, str]:
    raw = read_yaml(file, "--gates", "gates.yaml")
    raw = raw["guard"] if set(raw) == {"guard"} and isinstance(raw["guard"], dict) else raw
    for name, text in raw.items():
        if not isinstance(text, str):
            raise UserError(f"--gates {str(file)!r}: {name}: {text!r} is no condition; write e.g. {name}: '<= 1.02 x baseline'")
    if not raw:
        raise UserError(f"--gates {str(file)!r} holds no gate; write e.g. ppl: '<= 1.02 x baseline'")
    return {str(name): text for name, text in raw.items()}


def figures_of(run: Run, model: str = "result", beside: Run | None = None) -> dict[str, float]:
    """All figures of a model that are numbers, with those of the bench; of the result also how many times as fast it is.

    Args:
        beside: the run that it is compared with: of the ways to launch a model those count that both benches timed.
    """
    found = {name: float(value) for name, value in run.of(model).items() if isinstance(value, (int, float))}
    if beside and beside.experts and not run.experts:  # a token uses all of it
        found |= {name: found[stored] for name, stored in OF_EXPERTS.items() if stored in found}
    if not run.bench or model == "dense_lora":
        return found
    timed = list(speeds(run.bench).values())
    if model == "result":
        return {**found, **timed[0], **faster(run.bench, beside.bench if beside else None)}
    return {**found, **timed[-1]} if len(timed) > 1 else found


def faster(bench: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> dict[str, float]:
    """``speed.decode_faster``: how many times as fast as the model beside it, at the smallest batch; see ``fastest``.

    Args:
        beside: another run's bench; what it did not time the same way does not count.
    """
    ways = {_way(ratio) for ratio in (beside or bench)["ratios"]}
    ratios: list[Mapping[str, Any]] = [ratio for ratio in bench["ratios"] if _way(ratio) in ways]
    whats = dict.fromkeys(ratio["what"] for ratio in ratios)
    found = {what: fastest([ratio for ratio in ratios if ratio["what"] == what]) for what in whats}
    return {f"speed.{what.replace(' ', '_')}_faster": float(ratio["faster"]) for what, ratio in found.items() if ratio}


def _way(ratio: Mapping[str, Any]) -> tuple[Any, ...]:
    return ratio["what"], ratio["how"], ratio["batch"]


def defaults(run: Run, baseline: Run) -> tuple[dict[str, str], list[str]]:
    """The gates of figures that both have, and what only one of them has."""
    mine, theirs = figures_of(run, beside=baseline), figures_of(baseline, beside=run)
    tasks = telling(dict.fromkeys([*task_figures(run), *task_figures(baseline)]))
    quality = ["ppl", "valid_ppl", "accuracy", *tasks]
    speeds = sorted(name for name in {*mine, *theirs} if "_faster" in name)
    gates = {name: _quality_gate(name, run, baseline) for name in quality}
    gates |= dict.fromkeys(_SIZES, SIZE) | dict.fromkeys(speeds, FASTER)
    left_out = [name for name in gates if (name in mine) != (name in theirs)]
    return {name: text for name, text in gates.items() if name in mine and name in theirs}, left_out


def _quality_gate(name: str, run: Run, baseline: Run) -> str:
    way = run.better(name)
    return (PLAIN if noise(name, run, baseline) is None else NOISY)[way]


def noise(figure: str, run: Run, other: Run) -> float | None:
    """Half the width of the 95% interval of the difference of two runs' figure; None where it is not known.

    Of the perplexity on the same test windows that of the paired difference, window by window. Else both runs' rows are taken
    as drawn apart, which on the same rows makes it wider than it is.
    """
    if figure in ("ppl", "loss") and (paired := _paired(run, other)) is not None:
        return paired * (run.of("result")["ppl"] if figure == "ppl" else 1.0)
    halves = [_half(each.of("result"), figure) for each in (run, other)]
    return None if None in halves else math.hypot(*(half for half in halves if half is not None))


def _half(figures: Mapping[str, Any], figure: str) -> float | None:
    if figures.get(f"{figure}_se") is not None:
        return _NORMAL * float(figures[f"{figure}_se"])
    ends = [figures.get(f"{figure}_{end}") for end in ("low", "high")]
    return None if None in ends else (float(ends[1]) - float(ends[0])) / 2  # type: ignore[arg-type]


def _paired(run: Run, other: Run) -> float | None:
    """Of the loss, in nats: from what each test window adds to both."""
    one, two = (_windows(each) for each in (run, other))
    if not one or not two or one["windows"] != two["windows"] or len(one["numbers"]) != len(two["numbers"]):
        return None
    differences = [a - b for a, b in zip(one["numbers"], two["numbers"], strict=True)]
    count = len(differences)
    return _NORMAL * math.sqrt(math.fsum(each**2 for each in differences) / max(1, count - 1) / count) if count > 1 else None


def _windows(run: Run) -> dict[str, Any]:
    try:
        found = json.loads((run.path / "windows.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and {"windows", "numbers"} <= found.keys() else {}


def _ruled(name: str, text: str, run: Run, baseline: Run | None) -> Iterable[Ruling]:
    condition = Condition.of(text, name)
    if baseline is None and {"baseline", "noise"} & set(condition.words):
        raise UserError(f"{name}: {text!r} is relative to a baseline; give one with --baseline RUN2")
    mine, theirs = figures_of(run, beside=baseline), figures_of(baseline, beside=run) if baseline else {}
    references = {"dense": figures_of(run, "base"), "dense_lora": figures_of(run, "dense_lora"), "baseline": theirs}
    for figure in resolve(name, [*mine, *theirs]):
        wide = noise(figure, run, baseline) if baseline is not None else None
        yield rule(name, figure, condition, mine, {**references, "noise": {} if wide is None else {figure: wide}})


def resolve(name: str, known: Sequence[str]) -> list[str]:
    """The figures that a gate is for; a suite may stand before a task, or for all of its tasks.

    Raises:
        UserError: no run has such a figure.
    """
    if name in known or SPEED.fullmatch(name) or _FASTER.fullmatch(name):  # of a speed that was not measured, that is told
        return [name]
    suite, _, rest = name.partition(".")
    if suite in built_in("suites"):
        if rest in known:
            return [rest]
        tasks = [task.name for task in find_suites([suite]).get(suite, ())]
        if found := [f"{task}.{rest}" for task in tasks if f"{task}.{rest}" in known]:
            return found
    shown = [key for key in dict.fromkeys(known) if not key.endswith(("_se", "_low", "_high", "_majority", "_chance", ".rows"))]
    like = nearest(rest if suite in built_in("suites") else name, shown)
    raise UserError(f"gate {name!r}: no run has such a figure.{like} Figures: {', '.join(shown)}")


def _same_data(run: Run, baseline: Run, figures: Sequence[str]) -> list[Ruling]:
    """Whether both were measured on the same test tokens, where both say so; and tasks of ``figures`` whose rows differ."""
    mine, theirs = (each.summary.get("data") or {} for each in (run, baseline))
    pairs = {"test": (mine["test"], theirs["test"])} if mine.get("test") and theirs.get("test") else {}
    mine, theirs = (each.summary.get("task_rows") or {} for each in (run, baseline))
    tasks = dict.fromkeys(figure.partition(".")[0] for figure in figures)
    pairs |= {
        task: (mine[task], theirs[task])
        for task in tasks
        if mine.get(task) != theirs.get(task) and task in mine.keys() & theirs
    }
    told = "the same in both runs"
    return [
        Ruling(f"{SAME_DATA}{name}", f"{SAME_DATA}{name}", told, float(a == b), 1.0, a == b, {})
        for name, (a, b) in pairs.items()
    ]
