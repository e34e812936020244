"""Which program made a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from slimtune.comparison.program import commit, program


def test_the_digest_follows_the_sources_that_compute(tmp_path: Path) -> None:
    for name in ("train/loop.py", "report/table.py", "comparison/run.py", "cli.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    before = program(tmp_path)
    for name in ("report/table.py", "comparison/run.py", "cli.py"):
        (tmp_path / name).write_text("x = 2\n")
    assert program(tmp_path) == before
    (tmp_path / "train" / "loop.py").write_text("x = 2\n")
    assert program(tmp_path) != before


def test_the_commit_is_that_of_the_package_and_says_when_it_was_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        return subprocess.check_output(
            ["git", "-c", "user.name=a", "-c", "user.email=b", *words], cwd=tmp_path, text=True
        ).strip()

    monkeypatch.setenv("COMMIT", "told")
    package, file = tmp_path / "package", tmp_path / "package" / "version.py"
    package.mkdir()
    file.write_text("1\n")
    git("init", "-q")
    assert commit(package) == "told"  # installed inside a repository that is not its own
    git("add", ".")
    git("commit", "-qm", "first")
    assert commit(package) == git("rev-parse", "--short", "HEAD")
    file.write_text("2\n")
    assert commit(package) == git("rev-parse", "--short", "HEAD") + "-dirty"
