"""The demo domain: the documentation that comes with the running Python.

Language topics (``pydoc_data.topics``) and the docstrings of the standard library. Sources are parsed, never imported,
so reading them has no side effects. Works on CPython 3.11 and later.
"""

from __future__ import annotations

import ast
import functools
import gc
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimtune.errors import UserError

MIN_CHARS = 300
"""Smaller pieces of a module are joined until they reach this many characters."""

_SKIP = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "encodings"}
_SKIP |= {"site-packages", "dist-packages"}
_LEGAL = re.compile(r"(?i)copyright|\(c\) *\d{4}|all rights reserved|licen[sc]ed? (under|to)|permission (is|to)")
_Named = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def documents() -> tuple[tuple[str, str], ...]:
    """(name, text) of every document, in a fixed order; parsed once a process (about three seconds).

    Raises:
        UserError: this Python carries neither topics nor library sources.
    """
    with _uncollected():
        found = (*_topics(), *library(Path(sysconfig.get_paths()["stdlib"])))
    if not found:
        raise UserError("builtin:python-docs: this Python carries no documentation; give your own data.train instead")
    return found


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the cyclic garbage collector: syntax trees hold no cycles, and looking for some doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # left out by some distributions
        return []
    return [(f"topics.{name}", text.strip()) for name, text in sorted(topics.items())]


def library(root: Path) -> Iterator[tuple[str, str]]:
    """Documents of the modules under ``root``, by path. Files that do not parse are passed over."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIP.intersection(parts[:-1]) or parts[0].startswith("config-"):
            continue
        tree = _parse(path)
        if tree is not None:
            yield from _joined(list(_pieces(tree, ".".join(part for part in parts if part != "__init__"))))


def _parse(path: Path) -> ast.Module | None:
    try:
        with warnings.catch_warnings():  # invalid escapes in old files are not this program's business
            warnings.simplefilter("ignore")
            return ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):  # ValueError: another encoding, null bytes
        return None


def _pieces(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    if doc := _doc(tree):
        yield module, f"{module}\n\n{doc}"
    for node in tree.body:
        if isinstance(node, _Named) and (entries := list(_entries(node, module))):
            yield f"{module}.{node.name}", "\n\n".join(entries)


def _entries(node: _Named, prefix: str) -> Iterator[str]:
    """The entry of a definition (``module.Class.method(args)``, its docstring), then those of a class's members."""
    name = f"{prefix}.{node.name}"
    if doc := _doc(node):
        title = f"class {name}" if isinstance(node, ast.ClassDef) else f"{name}({ast.unparse(node.args)})"
        yield f"{title}\n\n{doc}"
    if isinstance(node, ast.ClassDef):
        for child in node.body:
            if isinstance(child, _Named):
                yield from _entries(child, name)


def _doc(node: ast.Module | _Named) -> str:
    paragraphs = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").split("\n\n")
    return "\n\n".join(part for part in paragraphs if not _LEGAL.search(part)).strip()


def _joined(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pieces of one module joined to documents of at least ``MIN_CHARS``; a shorter rest goes to the last document."""
    found: list[tuple[str, str]] = []
    name, text = "", ""
    for title, piece in pieces:
        name, text = name or title, f"{text}\n\n{piece}" if text else piece
        if len(text) >= MIN_CHARS:
            found.append((name, text))
            name, text = "", ""
    if text and found:
        found[-1] = (found[-1][0], f"{found[-1][1]}\n\n{text}")
    return found
