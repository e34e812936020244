"""What a check found: a table for the terminal, Markdown for a comment, JUnit XML for a CI server."""

from __future__ import annotations

from xml.etree import ElementTree

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from slimtune.guard.ruling import Ruling, apart
from slimtune.report.check import SAME_DATA, Checked
from slimtune.report.words import number

HEAD = ("", "figure", "value", "baseline", "bound")


def render(found: Checked) -> RenderableType:
    """The table, failures last, where the eye ends, and the verdict below."""
    table = Table(title=Text(_title(found), "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(HEAD):
        long = name in ("figure", "bound")  # of which neither leaves the other a letter a line
        how = {"overflow": "fold", "min_width": 18} if long else {"no_wrap": True}
        table.add_column(name, justify="right" if index in (2, 3) else "left", **how)
    for ruling in sorted(found.rulings, key=lambda each: not each.holds):
        style = "" if ruling.holds else "bold red"
        table.add_row(*(Text(cell) for cell in _cells(found, ruling)), style=style)
    return Group(table, *(Text(line) for line in _closing(found)))


def _title(found: Checked) -> str:
    return f"{found.run} against {found.baseline}" if found.baseline else found.run


def _cells(found: Checked, ruling: Ruling) -> list[str]:
    verdict = "ok" if ruling.holds else "FAILED"
    if ruling.figure.startswith(SAME_DATA):
        return [verdict, ruling.figure, "same" if ruling.holds else "other", "", ruling.condition]
    value = "not measured" if ruling.value is None else number(ruling.figure, ruling.value)
    limit = "unknown" if ruling.limit is None else number(ruling.figure, ruling.limit)
    baseline = number(ruling.figure, found.values.get(ruling.figure))
    if value == limit and ruling.value != ruling.limit:
        value, limit = apart(ruling.value, ruling.limit)
        baseline, _ = apart(found.values.get(ruling.figure), ruling.limit)  # in the same unit
    plain = not ruling.words and ruling.limit is not None
    bound = ruling.condition if plain else f"{ruling.condition} = {limit}"
    return [verdict, ruling.figure, value, baseline, bound]


def _closing(found: Checked) -> list[str]:
    lines = []
    if found.unknown:
        lines.append("Whether both were measured on the same test data is not known: a summary.json has no hash of them.")
    if found.left_out:
        lines.append(f"Not compared, for only one of both runs has it: {', '.join(found.left_out)}.")
    if any("noise" in ruling.condition for ruling in found.rulings):
        lines.append("noise: half the 95% interval of the difference of both runs.")
    failed = found.failed
    if failed:
        names = dict.fromkeys(ruling.figure for ruling in failed)
        lines.append(f"FAILED: {len(failed)} of {len(found.rulings)} gates: {', '.join(names)}")
    else:
        lines.append(f"passed: {len(found.rulings)} gates")
    return lines


def markdown(found: Checked) -> str:
    """For a comment, a job's summary or a page; failures first."""
    verdict = f"**{len(found.failed)} of {len(found.rulings)} gates failed**" if found.failed else "all gates hold"
    rows = [_cells(found, ruling) for ruling in sorted(found.rulings, key=lambda each: each.holds)]
    lines = [
        f"### slimtune check: {_plain(_title(found))}: {verdict}",
        "",
        _line(["verdict", *HEAD[1:]]),
        _line(["---"] * len(HEAD)),
    ]
    lines += [_line([f"**{row[0]}**" if row[0] == "FAILED" else row[0], *map(_plain, row[1:])]) for row in rows]
    return "\n".join([*lines, "", *(_plain(line) for line in _closing(found)[:-1])]).rstrip() + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def junit(found: Checked) -> str:
    """JUnit XML: a test case for each row, which fails where its figure is out of its bound.

    A case is named as its gate, whatever the bound: CI servers know a case from one build to the next by class and name.
    """
    suite = _suite(_title(found), tests=len(found.rulings), failures=len(found.failed))
    for place, ruling in enumerate(found.rulings):
        name = ruling.guard if ruling.guard == ruling.figure else f"{ruling.guard} ({ruling.figure})"
        case = _case(suite, found.run if place < found.asked else f"{found.run}.default", name)
        values = {"bound": ruling.condition, "value": ruling.value, "limit": ruling.limit, **ruling.words}
        told = "\n".join(f"{key} = {value}" for key, value in values.items() if value is not None)
        if not ruling.holds:
            other = f"test data of {_title(found)} are not the same"
            message = f"{ruling.figure}: {other}" if ruling.figure.startswith(SAME_DATA) else ruling.told
            ElementTree.SubElement(case, "failure", {"message": message, "type": "gate"}).text = told
        ElementTree.SubElement(case, "system-out").text = told
    return _xml(suite)


def junit_error(run: str, message: str) -> str:
    """JUnit XML of a check that could not be made: one test case, with the error."""
    suite = _suite(run, tests=1, errors=1)
    case = _case(suite, run, "slimtune check")
    ElementTree.SubElement(case, "error", {"message": message, "type": "input"}).text = message
    return _xml(suite)


def _suite(name: str, tests: int, failures: int = 0, errors: int = 0) -> ElementTree.Element:
    counts = {"tests": str(tests), "failures": str(failures), "errors": str(errors), "time": "0"}
    return ElementTree.Element("testsuite", {"name": name, **counts, "skipped": "0"})


def _case(suite: ElementTree.Element, run: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", {"classname": f"slimtune.{run}", "name": name, "time": "0"})


def _xml(suite: ElementTree.Element) -> str:
    counts = {key: value for key, value in suite.items() if key not in ("name", "skipped")}  # which the root may not have
    root = ElementTree.Element("testsuites", {"name": "slimtune check", **counts})
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
