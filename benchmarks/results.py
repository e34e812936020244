"""Write the tables and figures of a document from the raw rows that it names.

    python benchmarks/results.py docs/RESULTS.md README.md

Between ``<!-- rows FILE: PARTS -->`` and ``<!-- /rows -->`` come the tables of that file of rows (relative to the document):
PARTS are any of ``figures means leads`` (as ``slimtune compare`` prints them), after which ``of NAME,NAME`` picks methods.
``![...](X.svg)`` after ``<!-- figure FILE -->`` is drawn anew.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from slimtune.comparison.figure import draw
from slimtune.comparison.rows import read
from slimtune.comparison.table import markdown, sheets

TABLES = re.compile(
    r"(<!-- rows (?P<file>\S+): (?P<parts>[a-z ]+?)(?: of (?P<methods>\S+))? -->\n).*?(<!-- /rows -->)", re.DOTALL
)
FIGURE = re.compile(r"<!-- figure (?P<file>\S+) -->\n!\[[^\]]*\]\((?P<picture>\S+\.svg)\)")


def filled(text: str, folder: Path) -> str:
    """``text`` with its tables as the rows have them now."""

    def tables(found: re.Match[str]) -> str:
        rows, names = read(folder / found["file"]), found["methods"]
        if names:
            rows = [row for row in rows if row["method"] in names.split(",")]
        shown = [sheet for sheet in sheets(rows) if sheet.kind in found["parts"].split()]
        if not shown:
            raise SystemExit(f"{found['file']}: no {found['parts']} in these rows")
        return f"{found[1]}{markdown(shown)}{found[5]}"

    return TABLES.sub(tables, text)


def pictures(text: str, folder: Path) -> list[tuple[Path, Path]]:
    """(rows, picture) of every figure in ``text``."""
    return [(folder / found["file"], folder / found["picture"]) for found in FIGURE.finditer(text)]


def main() -> None:
    """Fill each document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+")
    for document in parser.parse_args().documents:
        text = document.read_text()
        document.write_text(filled(text, document.parent))
        for rows, picture in pictures(text, document.parent):
            draw(read(rows), picture)
            print(picture)
        print(document)


if __name__ == "__main__":
    main()
