"""Tasks and suites that come with the package, by name: what a report of files asks, without what reads tasks."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml


def where(kind: Literal["tasks", "suites"]) -> Path:
    """Where their files are, named after them."""
    return Path(str(files("slimtune"))) / "assets" / kind


def built_in(kind: Literal["tasks", "suites"]) -> list[str]:
    """Names of the tasks or suites that are shipped."""
    return sorted(file.stem for file in where(kind).glob("*.yaml"))


def tasks_of(suite: str) -> list[str]:
    """Names of the tasks that a shipped suite names itself."""
    return list(yaml.safe_load((where("suites") / f"{suite}.yaml").read_text(encoding="utf-8"))["tasks"])
