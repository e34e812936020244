"""Which program makes a run: the commit for readers, a digest of its sources for the question whether a run is still good."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from slimtune.version import versions

PACKAGE = Path(__file__).resolve().parent.parent
ASIDE = ("comparison", "report", "estimate", "cli.py", "cli_evaluate.py")
"""What no figure of a run depends on: a change there makes no run old."""


def commit(package: Path = PACKAGE) -> str | None:
    """Of the program, with a mark where its files differ from it; the variable ``COMMIT`` where there is no repository."""

    def git(*words: str) -> str:
        return subprocess.check_output(["git", *words], cwd=package, text=True, stderr=subprocess.DEVNULL).strip()

    try:
        git("ls-files", "--error-unmatch", "version.py")  # an installed package may lie in some other project's repository
        changed = git("status", "--porcelain", "-uno", "--", ".")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT")


def program(package: Path = PACKAGE) -> str:
    """A digest of the sources and of the libraries that compute."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        if name.parts[0] not in ASIDE:
            found.update(name.as_posix().encode() + b"\0" + path.read_bytes())
    for library, number in versions().items():
        found.update(f"{library} {number}".encode())
    return found.hexdigest()[:12]
