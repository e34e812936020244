"""Folders of runs as a watcher finds them on the way, and frames as text."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from runs import ruling, write_run
from slimtune.recipe import parse
from slimtune.runtime import RunFolder
from slimtune.train.claim import place
from slimtune.watch.follow import Watched
from slimtune.watch.frame import frame

Row = dict[str, Any]
UNITS = {"ffn": [100, 100, 100, 100], "kv_group": [4, 4, 4, 4]}
COSTS = {"tune": 150.0, "search": 40.0, "recover": 50.0}


def step(phase: str, number: int, stage: str = "main", **more: Any) -> Row:
    """A row: half a second a step."""
    return {
        "stage": stage,
        "phase": phase,
        "step": number,
        "adapt_loss": 3.0 - number / 10,
        "kept": 1.0,
        "seconds": 0.5,
        **more,
    }


def closing(number: int, **more: Any) -> Row:
    """A row of a search that closes gates."""
    widths = {"widths_ffn": [90 - number, 80, 70, 60], "widths_kv_group": [4, 3, 2, 1], "closed": 0.03, "reopened": 0.01}
    return step("search", number, decide_loss=3.5, decide_target=0.9 - number / 100, **widths, **{"kept": 0.9, **more})


REFERENCE = [step("tune", number, "dense_lora") for number in range(15)]
SEARCH = [closing(number) for number in range(5)]
RECOVERY = [step("recover", number, kept=0.6) for number in range(10)]


class Folder:
    """A run of dense LoRA (15 steps), search (5) and recovery (10), as far as a test lets it come."""

    def __init__(self, path: Path, **recipe: Any):
        self.path = path
        path.mkdir()
        raw = {
            "out": str(path),
            "model": {"path": "org/base"},
            "data": {"train": "rows.jsonl"},
            "budget": {"keep": 0.6},
            "search": {"steps": 5},
            "recover": {"steps": 10},
            **recipe,
            "evaluate": {"dense_lora": True, **recipe.get("evaluate", {})},
        }
        (path / "recipe.yaml").write_text(parse(raw).to_yaml(), encoding="utf-8")

    def stages(self, **stages: Any) -> Folder:
        """What tune writes of the run's facts."""
        facts = {"costs": COSTS, "units": UNITS, "place": place(), "base": {"valid_ppl": 36.0}}
        (self.path / "stages.json").write_text(json.dumps(facts | stages), encoding="utf-8")
        return self

    def rows(self, *rows: Row) -> Folder:
        """Append rows."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return self

    def look(self) -> Watched:
        """At the folder anew."""
        watched = Watched(self.path)
        watched.look()
        return watched

    def held(self) -> AbstractContextManager[None]:
        """As by a process that is at it."""
        return RunFolder(self.path).held()

    def shown(self, width: int = 80) -> str:
        """A frame as text, while a process is at the run."""
        with self.held():
            return text(self.look(), width)


def text(watched: Watched, width: int = 80, height: int | None = None, **how: Any) -> str:
    console = Console(file=StringIO(), width=width, **how)
    console.print(frame(watched, console, height))
    written: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(each.rstrip() for each in written.splitlines())


def line(frame: str, start: str) -> str:
    """The line of a frame that begins so."""
    return next(each for each in frame.splitlines() if each.startswith(start))


def guarded(path: Path, begin: str = "search") -> Folder:
    """Of a run with guards of all kinds."""
    guard = {"seconds": "<= 100", "rqe.accuracy": ">= 0.9 x dense", "ppl": "<= 1.2 x dense_lora"}
    tasks = {"every": 5, "tasks": ["rqe"]}
    run = Folder(path, guard=guard, alarm={"begin": begin}, evaluate=tasks)
    return run.stages(valid={"dense": {"rqe.accuracy": 0.5}, "dense_lora": {"ppl": 20.0}})


def finished(path: Path, holds: bool = True) -> Path:
    """A run with a guard that holds, or does not."""
    folder = write_run(path, guard={"ppl": "<= 1.2 x dense"})
    summary = json.loads((folder / "summary.json").read_text())
    summary["guard"] = [ruling(holds=holds)]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
