"""How long the command line takes to answer where there is nothing to do, beside Python's own start.

    python benchmarks/startup.py --runs 20 --rows docs/results/startup.json
    python benchmarks/startup.py --table --rows docs/results/startup.json    # only print the table

By turns. A test holds that nothing heavy is imported (tests/test_cli.py): seconds are the machine's and its hour's, for which
imports of typer and pydantic alone are timed beside. ``--beside NAME=FOLDER...`` times the help with other packages as well, or
another slimtune, that lie in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SLIMTUNE = (sys.executable, "-m", "slimtune")
HELP = ("--help", "tune --help")
TOLD = """
import importlib.metadata, json
from slimtune.comparison.program import commit
found = {name: importlib.metadata.version(name) for name in ("typer", "rich", "pydantic")}
print(json.dumps({**found, "commit": commit()}))
"""
COMMANDS = {
    "python -c pass": (sys.executable, "-c", "pass"),
    "python -c 'import typer'": (sys.executable, "-c", "import typer"),
    "python -c 'from pydantic import BaseModel'": (sys.executable, "-c", "from pydantic import BaseModel"),
    **{f"slimtune {words}": (*SLIMTUNE, *words.split()) for words in (*HELP, "--version", "tuen", "recipe")},
}


def seconds(command: tuple[str, ...], first: str) -> float:
    """Of one run, for which ``first`` is looked into before all other folders of packages."""
    started = time.perf_counter()
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, env={**os.environ, "PYTHONPATH": first}, check=False, **nowhere)
    return time.perf_counter() - started


def measured(runs: int, beside: dict[str, str]) -> list[dict[str, Any]]:
    """A row a command."""
    tried = {name: (command, "") for name, command in COMMANDS.items()}
    for name, folder in beside.items():
        tried |= {f"slimtune {words} ({name})": ((*SLIMTUNE, *words.split()), folder) for words in HELP}
    taken: dict[str, list[float]] = {name: [] for name in tried}
    for _ in range(runs):
        for name, what in tried.items():
            taken[name].append(seconds(*what))
    known = {"runs": runs, "python": platform.python_version(), "machine": platform.machine()}
    versions = {folder: versions_of(folder) for _, folder in tried.values()}
    figures = {name: {"seconds": statistics.median(each), "fastest": min(each)} for name, each in taken.items()}
    return [{"command": name, **figures[name], **known, **versions[folder]} for name, (_, folder) in tried.items()]


def versions_of(folder: str) -> dict[str, str]:
    """Of what the start takes its time for, and slimtune's commit, where ``folder`` is looked into first."""
    done = subprocess.run(
        (sys.executable, "-c", TOLD), env={**os.environ, "PYTHONPATH": folder}, check=True, stdout=subprocess.PIPE
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    own = rows[0]["seconds"]
    lines = ["| command | median | fastest | of Python's own |", f"|{' --- |' * 4}"]
    for row in rows:
        cells = [row["command"], f"{row['seconds']:.3f} s", f"{row['fastest']:.3f} s", f"{row['seconds'] / own:.1f}x"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--beside", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if args.table and not args.rows:
        parser.error("--table needs --rows FILE")
    beside = dict(each.split("=", 1) for each in args.beside)
    rows = json.loads(args.rows.read_text()) if args.table else measured(args.runs, beside)
    if args.rows and not args.table:
        args.rows.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    print(table(rows))


if __name__ == "__main__":
    main()
