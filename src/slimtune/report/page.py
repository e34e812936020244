"""``slimtune report``: one HTML file that opens offline, of one run or of several."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slimtune.report import curves, experts, made, quality, rates, several, shape
from slimtune.report.ink import Picture, styled
from slimtune.report.quality import Table
from slimtune.report.run import Run, read_runs
from slimtune.report.table import cautions
from slimtune.report.twice import both
from slimtune.report.verdict import decode_ratio, same_rows, scores_kept, verdict
from slimtune.report.words import label, number
from slimtune.runtime import no_full_collections
from slimtune.text_file import named, write
from slimtune.version import __version__

_FEW = 4
"""Runs of which each has pictures of its own."""


@dataclass
class Section:
    """A part of the page.

    Attributes:
        key: of its heading, for links.
        lines: paragraphs.
        folded: opened by the reader alone.
    """

    key: str
    title: str
    lines: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: list[tuple[str, str]] = field(default_factory=list)
    folded: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.lines or self.pictures or self.tables or self.code)


def report(runs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of one run, or of several beside one another.

    Args:
        runs: their folders.
        out: file to write; by default ``report.html`` in the folder of one run, in the present folder for several.

    Returns:
        The file.

    Raises:
        UserError: a folder holds no run, or the file cannot be written.
    """
    with no_full_collections():  # which go over all rows again and again, for nothing
        return _written(read_runs(runs), out)


def _written(read: Sequence[Run], out: str | Path | None) -> Path:
    target = Path(out).expanduser() if out else (read[0].path if len(read) == 1 else Path()) / "report.html"
    named("--out", target)
    write("--out", target, build(read))
    return target


def build(runs: Sequence[Run]) -> str:
    """The page as text."""
    with styled():
        sections = _one(runs[0]) if len(runs) == 1 else _many(runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    verdicts = [(run.name if len(runs) > 1 else "", verdict(run, runs)) for run in runs]
    warned = [(run.name if len(runs) > 1 else "", line) for run in runs for line in _cautions(run)]
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("slimtune.report", "")
    page = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return page.get_template("page.html.jinja").render(
        title=title,
        verdicts=verdicts,
        cautions=warned,
        cards=_cards(runs[0]) if len(runs) == 1 else [],
        sections=[section for section in sections if not section.empty],
        version=__version__,
    )


def _cautions(run: Run) -> list[str]:
    found = [line.removeprefix("caution").strip() for line in cautions(run.summary)] if run.finished else []
    breached = list(dict.fromkeys(rule["guard"] for rule in run.summary.get("guard", ()) if not rule["holds"]))
    if not run.finished:
        breached = list(next((row["breached"] for row in reversed(run.main) if "valid_ppl" in row and "breached" in row), ()))
    return [*found, *([f"out of the bounds of guard: {', '.join(breached)}"] if breached else [])]


def _cards(run: Run) -> list[tuple[str, str, str]]:
    """The few numbers to see first: value, what it is, what to hold it against."""
    result, base = run.of("result"), run.of("base")
    other = run.of("dense_lora") or base
    called = "dense LoRA" if run.of("dense_lora") else "base"
    found = []
    sizes = [(figure, base, "base") for figure in ("parameters", "active_parameters", "bytes")]
    for figure, beside, name in (*sizes, ("ppl", other, called)):
        if result.get(figure) is not None:
            against = f"{name} {number(figure, beside[figure])}" if beside.get(figure) is not None else ""
            stored = run.experts and figure == "parameters"
            found.append((number(figure, result[figure]), label(figure) + (" stored" if stored else ""), against))
    kept, _ = scores_kept(run, other)
    if kept:  # one of the tasks that the sentence is on
        task = next(iter(kept))
        found.append((number(task, result[task]), label(task), f"{called} {number(task, other[task])}"))
    ratio = decode_ratio(run.bench["ratios"]) if run.bench else None
    if ratio:
        spread = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        found.append((f"{ratio['faster']:.2f} x", f"decode speed, batch {ratio['batch']}", spread))
    return found


def _kept(*given: Any) -> list[Any]:
    return [each for each in given if each is not None]


def _one(run: Run) -> list[Section]:
    drawn = quality.telling(curves.followed([run]))
    tasks = [curves.validation([run], figure, f"task{index}") for index, figure in enumerate(drawn)]
    level = curves.loss([run], "loss"), curves.kept([run], "kept"), curves.validation([run], "ppl", "ppl")
    tables = (
        quality.overview(run, "overview") if run.of("base") or run.finished else None,
        quality.tasks(run, "tasks"),
        quality.tasks(run, "general", general=True),
        *_evaluations(run),
    )
    return [
        Section("shape", "Shape", pictures=_kept(*(draw(run, name) for name, draw in _SHAPES.items()))),
        Section("quality", "Quality", pictures=_kept(quality.dots(run, "dots")), tables=_kept(*tables)),
        Section("speed", "Speed", pictures=_kept(rates.picture(run, "rates")), tables=_kept(rates.table(run, "bench"))),
        Section("guards", "Guards", lines=made.breaches(run), tables=_kept(made.guards(run, "rulings"))),
        Section("training", "Training", pictures=_kept(*level, *tasks)),
        Section("validation", "Validation figures as a table", tables=_kept(curves.evaluations(run, "valid")), folded=True),
        _how(run, "made", "How it was made"),
    ]


_SHAPES: dict[str, Callable[[Run, str], Picture | None]] = {
    "shape": shape.final,
    "experts": experts.loads,
    "moving": shape.moving,
    "changing": shape.changing,
}


_FINAL: dict[str, Callable[[Run, str], Picture | None]] = {"shape": shape.final, "experts": experts.loads}
"""Those of them that each of a few runs has."""


def _titled(run: Run, picture: Picture) -> str:
    return run.name if picture.key.startswith("shape") else f"{run.name}: {picture.title[0].lower()}{picture.title[1:]}"


def _how(run: Run, key: str, title: str, folded: bool = False) -> Section:
    code = [("To repeat it", made.command(run)), ("Recipe, every default written out", made.recipe(run))]
    tables = [made.facts(run, f"{key}-facts")]
    return Section(f"{key}", title, tables=tables, code=[item for item in code if item[1]], folded=folded)


def _evaluations(run: Run) -> Iterable[Table]:
    """What ``slimtune evaluate`` found of the run's model or its base, file by file."""
    for index, (name, found) in enumerate(run.evaluations.items()):
        rows = []
        for task, entry in found["tasks"].items():
            for metric, figure in entry["figures"].items():
                flat = {f"x.{metric}": figure["value"], f"x.{metric}_low": figure["low"], f"x.{metric}_high": figure["high"]}
                baseline = figure.get("majority", figure.get("chance"))
                told = number(f"x.{metric}", baseline)
                rows.append(
                    [task, quality.metric_name(metric), quality.interval(flat, f"x.{metric}"), told, f"{entry['rows']:,}"]
                )
        of = "the result" if found["parameters"] == run.of("result").get("parameters") else "the uncut model"
        head = ["task", "figure", "value (95%)", "baseline", "rows"]
        note = f"{name}: slimtune evaluate of {of}, {found.get('split', '')} rows."
        yield Table(f"evaluation{index}", f"Evaluation: {name}", head, rows, note, numbers=2)


def _many(runs: Sequence[Run]) -> list[Section]:
    compared, trained = both(lambda: _compared(runs), lambda: _trained(runs))
    return [*compared, *trained]


def _compared(runs: Sequence[Run]) -> list[Section]:
    figures = ["ppl", *quality.telling(dict.fromkeys(figure for run in runs for figure in quality.task_figures(run)))]
    alike = [figure for figure in figures if same_rows([run for run in runs if figure in run.of("result")], figure)]
    sizes = [several.against_size(runs, figure, f"size{index}") for index, figure in enumerate(alike)]
    unlike = ", ".join(label(figure) for figure in figures if figure not in alike)
    told = [f"Not held against size, for the test rows of these runs differ: {unlike}."] if unlike else []
    few = list(enumerate(runs)) if len(runs) <= _FEW else []
    drawn = [(run, draw(run, f"{name}{index}")) for index, run in few for name, draw in _FINAL.items()]
    named = [replace(picture, title=_titled(run, picture)) for run, picture in drawn if picture]
    apart, tables = _differences(runs)
    return [
        Section("sizes", "Quality against size", told, _kept(*sizes), [several.beside(runs, "beside")]),
        Section("shapes", "Shapes", pictures=[*_kept(several.shapes(runs, "shapes")), *named]),
        apart,
        Section("tables", "Plans as tables", tables=tables, folded=True),
    ]


def _trained(runs: Sequence[Run]) -> list[Section]:
    drawn = quality.telling(curves.followed(runs))
    tasks = [curves.validation(runs, figure, f"task{index}") for index, figure in enumerate(drawn)]
    level = curves.loss(runs, "loss"), curves.kept(runs, "kept"), curves.validation(runs, "ppl", "ppl")
    return [
        Section("training", "Training", pictures=_kept(*level, *tasks)),
        *(_how(run, f"made{index}", f"How {run.name} was made", folded=True) for index, run in enumerate(runs)),
    ]


def _differences(runs: Sequence[Run]) -> tuple[Section, list[Table]]:
    """Plans of the other runs against the first one's: few are drawn one by one."""
    first, others = runs[0], [run for run in runs[1:] if several.comparable(runs[0], run)]
    pictures = (
        [several.plan_difference(first, run, f"plan{index}") for index, run in enumerate(others)] if len(runs) <= _FEW else []
    )
    section = Section(
        "plans", "Plans, layer by layer", pictures=[*_kept(several.agreement(first, others, "agreement")), *pictures]
    )
    left = [run.name for run in runs[1:] if run not in others]
    if left:
        section.lines.append(f"No Plan, or one of another base than that of {first.name}, and left out: {', '.join(left)}.")
    return section, [several.plan_table(first, run, f"plan{index}-table") for index, run in enumerate(others)]
