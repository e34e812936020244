"""Hold the figures of ``slimtune evaluate`` against those of plain lm_eval, on one model folder.

    python benchmarks/plain_lm_eval.py MODEL [--suite healthcare] [--tasks a,b] [--limit N] [--device cpu] [--rows FILE.json]

``slimtune evaluate --write-tasks`` writes the tasks; its README's command then runs in a process that has no slimtune on its
path. Exits 1 where a figure differs by more than 1e-3 (a perplexity: by more than 1e-3 of itself).
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT = 1e-3


def evaluated(words: list[str], folder: Path) -> dict[str, Any]:
    """What ``slimtune evaluate`` finds; the tasks are in ``folder/tasks`` afterwards."""
    file = folder / "ours.json"
    ours = [sys.executable, "-m", "slimtune", "evaluate", *words, "--json", str(file), "--write-tasks", str(folder / "tasks")]
    subprocess.run(ours, check=True)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def plain(command: str, folder: Path) -> dict[str, Any]:
    """The results of lm_eval's own command in ``folder/tasks``."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, "-P", "-m", *shlex.split(command), "--output_path", str(folder / "plain")]
    subprocess.run(words, cwd=folder / "tasks", env=environment, check=True)
    (file,) = (folder / "plain").rglob("results_*.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return found


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each figure: ours, theirs, and the difference (of a perplexity, relative)."""
    rows = []
    for name, task in ours["tasks"].items():
        for metric, figure in task["figures"].items():
            value, other = figure["value"], theirs[f"slimtune_{name}"][f"{metric},none"]
            difference = abs(value - other) / (abs(other) if metric == "perplexity" else 1)
            row = {"task": name, "rows": task["rows"], "metric": metric, "ours": value, "plain": other}
            rows.append({**row, "difference": difference, "dtype": ours["dtype"], "device": ours["device"], **ours["versions"]})
    return rows


def main(words: list[str] | None = None) -> None:
    """Run both and print a line a figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=Path)
    given, rest = parser.parse_known_args(words)
    with tempfile.TemporaryDirectory() as name:
        model = str(Path(given.model).resolve()) if Path(given.model).exists() else given.model
        ours = evaluated([model, *rest], Path(name))
        rows = compared(ours, plain(ours["lm_eval"], Path(name)))
    for row in rows:
        print(f"{row['task']:18s} {row['metric']:14s} {row['ours']:.6f} {row['plain']:.6f}  {row['difference']:.1e}")
    if given.rows:
        given.rows.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    worst = max(row["difference"] for row in rows)
    print(f"{len(rows)} figures, largest difference {worst:.1e}")
    sys.exit(worst > LIMIT)


if __name__ == "__main__":
    main()
