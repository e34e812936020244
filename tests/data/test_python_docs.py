from __future__ import annotations

import sys
from pathlib import Path

from slimtune.data.python_docs import MIN_CHARS, documents, library
from slimtune.data.sources import read
from slimtune.sections import Source

LONG = "word " * 80


def test_the_running_python_gives_a_few_megabytes_without_importing_it() -> None:
    before = set(sys.modules)
    found = documents()
    assert set(sys.modules) - before <= {"pydoc_data", "pydoc_data.topics"}
    names = [name for name, _ in found]
    assert len(set(names)) == len(names) > 1000
    assert 1.5e6 < sum(len(text) for _, text in found) < 6e6
    texts = dict(found)
    assert "argparse.ArgumentParser.parse_args" not in names  # a method stands in its class's document
    assert texts["argparse.ArgumentParser"].startswith("class argparse.ArgumentParser\n\nObject for parsing")
    assert not any(name.startswith(("test.", "idlelib", "lib2to3", "turtledemo", "site-packages")) for name in names)
    assert "topics.lambda" in names


def test_documents_are_read_as_rows() -> None:
    first = read(Source(path="builtin:python-docs", rows=1))[0]
    assert first.origin == f"builtin:python-docs:{documents()[0][0]}"


def test_a_library_is_parsed_grouped_and_cleaned(tmp_path: Path) -> None:
    (tmp_path / "pkg" / "test").mkdir(parents=True)
    (tmp_path / "pkg" / "__init__.py").write_text(f'"""Package.\n\nCopyright (c) 2001 Someone.\n\n{LONG}"""\nraise OSError\n')
    (tmp_path / "pkg" / "mod.py").write_text(
        "def f(a, *, b=1):\n"
        f'    """First {LONG}\n\n        indented\n    """\n'
        'async def g():\n    "short"\n'
        "class C:\n"
        f'    "{LONG}"\n'
        '    def m(self):\n        "Method."\n'
        '    class D:\n        "Inner."\n'
        'def last():\n    "Tail."\n'
    )
    (tmp_path / "pkg" / "test" / "test_mod.py").write_text(f'"{LONG}"')
    (tmp_path / "broken.py").write_text("def (:")
    (tmp_path / "latin.py").write_bytes(b'"""\xff"""')
    (tmp_path / "tiny.py").write_text('"Too small to be a document."')
    found = dict(library(tmp_path))
    assert list(found.items()) == list(library(tmp_path))
    assert list(found) == ["pkg", "pkg.mod.f", "pkg.mod.g"]
    assert found["pkg"].startswith("pkg\n\nPackage.\n\nword")
    assert "Someone" not in found["pkg"]
    assert found["pkg.mod.f"].startswith("pkg.mod.f(a, *, b=1)\n\nFirst word")
    assert found["pkg.mod.f"].endswith("word \n\nindented")
    assert found["pkg.mod.g"].startswith("pkg.mod.g()\n\nshort\n\nclass pkg.mod.C\n\nword")
    assert "pkg.mod.C.m(self)\n\nMethod.\n\nclass pkg.mod.C.D\n\nInner." in found["pkg.mod.g"]
    assert found["pkg.mod.g"].endswith("pkg.mod.last()\n\nTail.")
    assert all(len(text) >= MIN_CHARS for text in found.values())
