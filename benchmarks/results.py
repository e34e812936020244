"""Write the tables and figures of a document from the raw rows that it names.

    python benchmarks/results.py docs/RESULTS.md docs/results/FIGURES.md

Between ``<!-- rows FILE: PARTS -->`` and ``<!-- /rows -->`` come the tables of that file of rows (relative to the document):
PARTS are any of ``figures tasks means retention leads``, as ``slimtune compare`` prints them, or one of ``speed``,
``ways``, ``cost``, ``compiling``, ``growth``, ``llamacpp``, ``locking``, ``routing``, ``scale``, ``startup``, ``tomoe`` and
``updates``, as the scripts print them that make those rows; what signs mean is said once in a document.
``![...](X.svg)`` after ``<!-- figure FILE -->`` is drawn anew.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import caught
import compiling
import cost
import decode_ways
import growth
import locking
import routing
import scale
import small_updates
import speed
import startup
import tomoe_gguf
import tomoe_speed

from slimtune.comparison.figure import draw
from slimtune.comparison.rows import Row, read
from slimtune.comparison.sheet import legend_of, markdown
from slimtune.comparison.table import sheets
from slimtune.errors import UserError

START, END = "<!-- rows ", "<!-- /rows -->"
TABLES = re.compile(rf"({START}(?P<file>\S+): (?P<parts>[a-z ]+) -->\n)(?:(?!{START}).)*?({END})", re.DOTALL)
FIGURE = re.compile(r"<!-- figure (?P<file>\S+) -->\n!\[[^\]]*\]\((?P<picture>\S+\.svg)\)")
PARTS = ("figures", "tasks", "means", "retention", "leads")
OWN = {
    "caught": caught.table,
    "speed": speed.tables,
    "ways": decode_ways.table,
    "cost": cost.table,
    "compiling": compiling.table,
    "growth": growth.table,
    "locking": locking.table,
    "routing": routing.table,
    "scale": scale.table,
    "startup": startup.table,
    "tomoe": tomoe_speed.table,
    "llamacpp": tomoe_gguf.table,
    "updates": small_updates.table,
}
"""Parts of rows that are no runs, by the script that makes them."""


def filled(text: str, folder: Path) -> str:
    """``text`` with its tables as the rows have them now.

    Raises:
        UserError: marks do not belong together, a part is unknown, or there are no such rows.
    """
    if not len(TABLES.findall(text)) == text.count(START) == text.count(END):
        raise UserError(f"marks are not in pairs: each '{START}FILE: PARTS -->' needs its '{END}' before the next one")

    said = set[str]()

    def tables(found: re.Match[str]) -> str:
        parts = found["parts"].split()
        if len(parts) == 1 and parts[0] in OWN:
            rows = json.loads((folder / found["file"]).read_text(encoding="utf-8"))
            return f"{found[1]}{OWN[parts[0]](rows)}{found[4]}"
        if unknown := [part for part in parts if part not in PARTS]:
            raise UserError(f"{found['file']}: there is no part {unknown[0]!r}; there are {', '.join((*PARTS, *OWN))}")
        shown = [sheet for sheet in sheets(_there(folder / found["file"])) if sheet.kind in parts]
        table = markdown(shown, said)
        said.update(legend_of(shown))
        return f"{found[1]}{table}{found[4]}"

    return TABLES.sub(tables, text)


def _there(file: Path) -> list[Row]:
    if not (rows := read(file)):
        raise UserError(f"there are no rows in {str(file)!r}")
    return rows


def pictures(text: str, folder: Path) -> list[tuple[Path, Path]]:
    """(rows, picture) of every figure in ``text``."""
    return [(folder / found["file"], folder / found["picture"]) for found in FIGURE.finditer(text)]


def main() -> None:
    """Fill each document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+")
    for document in parser.parse_args().documents:
        try:
            text = document.read_text(encoding="utf-8")
            document.write_text(filled(text, document.parent), encoding="utf-8")
            for rows, picture in pictures(text, document.parent):
                draw(_there(rows), picture)
        except (UserError, OSError) as error:
            raise SystemExit(f"error: {document}: {error}") from error
        print(document)


if __name__ == "__main__":
    main()
