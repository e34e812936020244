"""Rules of CONTRIBUTING that no linter holds."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function with its decorators and docstring left out."""
    described = ast.get_docstring(function) is not None
    text = function.body[0]
    docstring = (text.end_lineno or 0) - text.lineno + 1 if described else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def test_files_are_under_300_lines_and_functions_under_40() -> None:
    assert len(SOURCES) > 50
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    long = [str(path) for path, text in texts.items() if len(text.splitlines()) >= 300]
    long += [
        f"{path}: {node.name}"
        for path, text in texts.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and code_lines(node) >= 40
    ]
    assert not long


def test_records_of_decisions_are_short() -> None:
    records = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [int(path.name[:4]) for path in records] == list(range(1, len(records) + 1))
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 25 for path in records)


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not [path for path in SOURCES if path.stem in ("utils", "helpers", "common", "misc")]
